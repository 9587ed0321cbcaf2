"""Run a GGUF file on this machine: engine, chat, and files for phones. It never imports torch or transformers."""
