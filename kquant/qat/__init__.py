"""Quantization-aware training: section 4 of the white paper."""
