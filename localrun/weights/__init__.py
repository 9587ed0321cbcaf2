"""Read the activations and swap the weights of a model while it runs."""
