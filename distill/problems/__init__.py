"""Problems: read from files, hubs and generators, split by a hash of the question."""
