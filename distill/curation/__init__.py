"""Which traces train."""
