"""Models of the TensorFlow Model Optimization toolkit, as kquant models."""

from kquant.keras.tfmot.from_tfmot import from_tfmot

__all__ = ["from_tfmot"]
