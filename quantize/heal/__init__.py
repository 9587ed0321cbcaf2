"""Training for a few steps under the types of the file."""
