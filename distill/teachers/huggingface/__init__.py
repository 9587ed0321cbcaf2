"""A teacher that transformers runs in this process."""
