"""kquant: quantize Keras 3 models and run them as integers with TFLite.

import kquant

qmodel = kquant.quantize_model(model, calibration_data, config="w8a8")
kquant.export_tflite(qmodel, "model.tflite")
print(kquant.verify_tflite(qmodel, "model.tflite", data))
"""

from kquant.graph.backend import check_backend

check_backend()

from kquant.budget.compress import compress  # noqa: E402
from kquant.budget.latency import LatencyTable  # noqa: E402
from kquant.budget.profile import profile  # noqa: E402
from kquant.budget.records import Profile  # noqa: E402
from kquant.budget.result import SearchResult  # noqa: E402
from kquant.budget.search import search  # noqa: E402
from kquant.config.pruning import Prune  # noqa: E402
from kquant.config.quant_config import QuantConfig  # noqa: E402
from kquant.config.specs import AdaRound, QuantSpec, Rule, Training  # noqa: E402
from kquant.diagnosis.diagnose import diagnose  # noqa: E402
from kquant.diagnosis.records import Diagnosis  # noqa: E402
from kquant.diagnosis.tasks import (  # noqa: E402
    OutputMetric,
    mean_average_precision,
    mean_iou,
    pixel_accuracy,
)
from kquant.errors import (  # noqa: E402
    BackendError,
    CalibrationError,
    ConfigError,
    DiagnosisError,
    ExportError,
    KQuantError,
    MissingPackageError,
    ModelError,
    PackError,
    QuantizationWarning,
)
from kquant.graph.tracing.registry import register_layer  # noqa: E402
from kquant.keras.export import ExportReport, export_tflite  # noqa: E402
from kquant.keras.model import QuantizedModel  # noqa: E402
from kquant.keras.outputs import select_outputs  # noqa: E402
from kquant.keras.quantize_model import quantize_model  # noqa: E402
from kquant.keras.tfmot import from_tfmot  # noqa: E402
from kquant.qat.batch_norm import reestimate_batch_norm  # noqa: E402
from kquant.qat.callbacks import FreezeQuantizers, LogQuantizers  # noqa: E402
from kquant.qat.distill import Distiller  # noqa: E402
from kquant.qat.prepare import prepare_qat  # noqa: E402
from kquant.qat.prune import PruneGradually  # noqa: E402
from kquant.targets.litert.runtime import TFLiteModel  # noqa: E402
from kquant.targets.storage.packing.container import pack_tflite, unpack_tflite  # noqa: E402
from kquant.targets.target import Target, get_target, register_target  # noqa: E402
from kquant.verify.parity import ParityReport, verify_tflite  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AdaRound",
    "BackendError",
    "CalibrationError",
    "ConfigError",
    "Diagnosis",
    "DiagnosisError",
    "Distiller",
    "ExportError",
    "ExportReport",
    "FreezeQuantizers",
    "KQuantError",
    "LogQuantizers",
    "MissingPackageError",
    "LatencyTable",
    "ModelError",
    "OutputMetric",
    "PackError",
    "ParityReport",
    "Prune",
    "PruneGradually",
    "Profile",
    "QuantConfig",
    "QuantSpec",
    "QuantizationWarning",
    "QuantizedModel",
    "Rule",
    "SearchResult",
    "TFLiteModel",
    "Target",
    "Training",
    "compress",
    "diagnose",
    "export_tflite",
    "from_tfmot",
    "get_target",
    "mean_average_precision",
    "mean_iou",
    "pack_tflite",
    "pixel_accuracy",
    "prepare_qat",
    "profile",
    "quantize_model",
    "reestimate_batch_norm",
    "register_layer",
    "register_target",
    "search",
    "select_outputs",
    "unpack_tflite",
    "verify_tflite",
]
