"""llama.cpp behind one engine: loading, sampling, batching, grammars, images."""
