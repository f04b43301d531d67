"""Tracing a Keras model into a graph of primitive operations."""
