"""kquant: quantize Keras 3 models and run them as integers with TFLite.

import kquant

qmodel = kquant.quantize_model(model, calibration_data, config="w8a8")
kquant.export_tflite(qmodel, "model.tflite")
print(kquant.verify_tflite(qmodel, "model.tflite", data))
"""

from kquant.backend import check_backend

check_backend()

from kquant.config import QuantConfig  # noqa: E402
from kquant.errors import (  # noqa: E402
    BackendError,
    CalibrationError,
    ConfigError,
    ExportError,
    KQuantError,
    ModelError,
)
from kquant.export import ExportReport, export_tflite  # noqa: E402
from kquant.graph.registry import register_layer  # noqa: E402
from kquant.insert import QuantizedModel  # noqa: E402
from kquant.quantize import quantize_model  # noqa: E402
from kquant.specs import AdaRound, QuantSpec, Rule  # noqa: E402
from kquant.targets import Target, get_target  # noqa: E402
from kquant.tflite.parity import ParityReport, verify_tflite  # noqa: E402
from kquant.tflite.runtime import TFLiteModel  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AdaRound",
    "BackendError",
    "CalibrationError",
    "ConfigError",
    "ExportError",
    "ExportReport",
    "KQuantError",
    "ModelError",
    "ParityReport",
    "QuantConfig",
    "QuantSpec",
    "QuantizedModel",
    "Rule",
    "TFLiteModel",
    "Target",
    "export_tflite",
    "get_target",
    "quantize_model",
    "register_layer",
    "verify_tflite",
]
