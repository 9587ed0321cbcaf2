"""Run a GGUF file on this machine: the engine, its thinking, and the chat. Never imports torch or transformers."""
