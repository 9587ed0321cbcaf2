"""What this machine has, and what a model will take of it."""
