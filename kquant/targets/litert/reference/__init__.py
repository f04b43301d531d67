"""LiteRT's kernels in numpy, bit for bit."""
