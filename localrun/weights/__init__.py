"""A loaded model's weights and activations, read and swapped while it runs."""
