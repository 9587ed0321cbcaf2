"""A teacher behind an OpenAI-compatible server."""
