"""Where a file comes from: licence chain, metadata, model card."""
