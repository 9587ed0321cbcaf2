"""GGUF files: their header, their parts, and ggml's own (de)quantization."""
