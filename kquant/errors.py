"""Errors that a user can act on: each names the layer, what was found and what to do."""


class KQuantError(Exception):
    """Base class of every error that kquant raises on purpose."""


class BackendError(KQuantError, RuntimeError):
    """Keras runs on a backend other than TensorFlow."""


class ConfigError(KQuantError, ValueError):
    """A setting is unknown, matches nothing, or is impossible for the target."""


class ModelError(KQuantError, ValueError):
    """The model cannot be traced, or holds values that cannot be quantized."""


class CalibrationError(KQuantError, ValueError):
    """Calibration data is missing, empty, of the wrong shape or type, or not finite."""


class ExportError(KQuantError, ValueError):
    """The model cannot be written as, or read from, a TFLite file."""


class PackError(KQuantError, ValueError):
    """What should be unpacked is no packed file, of another version, or damaged."""


class QuantizationWarning(UserWarning):
    """Quantization destroys what a tensor holds: which, why, and what to do."""


class DiagnosisError(KQuantError, ValueError):
    """A text is not a saved diagnosis."""


class MissingPackageError(KQuantError, ImportError):
    """An optional package is not installed."""
