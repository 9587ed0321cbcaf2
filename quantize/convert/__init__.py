"""A Hugging Face checkpoint, streamed into a GGUF tensor by tensor."""
