"""Code of a model, run in a sandbox against tests."""
