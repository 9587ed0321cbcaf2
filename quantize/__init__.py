"""Turn a Hugging Face checkpoint into a GGUF file and measure what was lost. Converts without torch."""
