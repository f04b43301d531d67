"""Tracing a Keras model into an immutable graph of primitive operations."""
