"""The student's forward and backward pass as a CPU likes them; each piece is held to plain PyTorch by a test."""
