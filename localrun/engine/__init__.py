"""llama.cpp behind one engine: load, sample, batch, follow a grammar, see images."""
