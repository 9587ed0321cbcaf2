"""The commands, one a file. They alone compose the stages, and import a stage only when they run."""
