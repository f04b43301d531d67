"""Quantized graphs as Keras models, which simulate the target."""
