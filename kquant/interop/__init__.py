"""Models of other quantization libraries, as kquant models."""

from kquant.interop.tfmot import from_tfmot

__all__ = ["from_tfmot"]
