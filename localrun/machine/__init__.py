"""What this machine has, and how much of it a model takes."""
