"""LiteRT: kernels, files and the interpreter."""
