"""Real models and their data, outside the repository (`models.data`).

Everything comes preprocessed for the model in question; ImageNet is decoded batch by batch (as float32
its images would take most of a GB).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kquant
from kquant.targets.litert.flatbuffer import only_integer_ops
from kquant_tools.data import Batches, load_data
from models import mobilenet_v2_cifar
from models.data import MissingData, cifar10, path

SPEECH_SCALE, SPEECH_ZERO_POINT = 0.5847029, 83
SPEECH = {"calibration": slice(0, 200), "test": slice(200, 1000)}


@dataclass(frozen=True)
class RealModel:
    """A float model with its data.

    Attributes:
        file: in DATA/models.
        calibration: limit -> batches of inputs; never images that are scored.
        evaluation: limit -> batches of (inputs, labels).
        top1: accuracy of the float model on all evaluation samples, in percent.
        converter: the same of TensorFlow's int8 per-channel file.
        converter_bytes: its size.
        calibration_size: samples that the converter was calibrated with.
        training: limit -> all training (inputs, labels); None where there are none.
    """

    file: str
    calibration: Callable[[int | None], Any]
    evaluation: Callable[[int | None], Any]
    top1: float
    converter: float
    converter_bytes: int
    calibration_size: int
    training: Callable[[int | None], tuple[np.ndarray, np.ndarray]] | None = None


def load_model(name: str) -> keras.Model:
    """The float model of a key of MODELS or OWN."""
    file = Path(OWN[name].file) if name in OWN else path(f"models/{MODELS[name].file}.keras")
    if not file.is_file():
        raise MissingData(f"needs {file}, which the command in that folder's module of the same name makes")
    return keras.saving.load_model(file, compile=False)


def imagenet_val(limit: int | None = None, batch_size: int = 50) -> Batches:
    """(images [n, 224, 224, 3] in -1..1, labels [n]): the scored validation images, cut from 227 pixels."""
    return _imagenet("imagenet/val1300_227_original_jpeg.npz", limit, batch_size, labels=True)


def imagenet_calibration(limit: int | None = None, batch_size: int = 50) -> Batches:
    """Images [n, 224, 224, 3] in -1..1 of the training set, each of another class."""
    return _imagenet("imagenet/train1000_one_per_class_224_q90.npz", limit, batch_size, labels=False)


def _imagenet(file: str, limit: int | None, batch_size: int, labels: bool) -> Batches:
    image = keras.KerasTensor((None, 224, 224, 3), name="image")
    options: dict[str, Any] = {"preprocess": "tf", "fit": "crop", "limit": limit, "batch_size": batch_size}
    return load_data(str(path(file)), [image], labels=labels, **options)


def speech(split: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """MFCC features [n, 49, 10, 1] float32 and labels [n] of "calibration" (200) or "test" (800)."""
    with np.load(path("speech_commands/ds_cnn_eval1000.npz")) as file:
        x, y = file["x"][SPEECH[split]], file["y"][SPEECH[split]]
    x = (x.astype(np.float32) - SPEECH_ZERO_POINT) * np.float32(SPEECH_SCALE)
    return x.reshape(-1, 49, 10, 1)[:limit], y[:limit]


def _cut(arrays: tuple[np.ndarray, np.ndarray], size: int = 250) -> list[tuple[np.ndarray, np.ndarray]]:
    """Arrays as batches."""
    x, y = arrays
    return [(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]


def _cifar10(file: str, preprocess: str, top1: float, converter: float, converter_bytes: int) -> RealModel:
    return RealModel(
        file,
        calibration=lambda limit: cifar10("train", limit, preprocess)[0],
        evaluation=lambda limit: _cut(cifar10("test", limit, preprocess)),
        top1=top1,
        converter=converter,
        converter_bytes=converter_bytes,
        calibration_size=500,
        training=lambda limit: cifar10("train", limit, preprocess),
    )


def _mobilenet(file: str, top1: float, converter: float, converter_bytes: int) -> RealModel:
    return RealModel(file, imagenet_calibration, imagenet_val, top1, converter, converter_bytes, calibration_size=200)


MODELS = {
    "mobilenet_v1": _mobilenet("mobilenet_v1_0.25_imagenet", 64.77, 63.15, 508_320),
    "mobilenet_v2": _mobilenet("mobilenet_v2_1.0_imagenet", 79.77, 80.08, 3_588_592),
    "resnet8": _cifar10("resnet8_cifar10_mlperf_tiny", "none", 75.48, 75.60, 90_432),
    "resnet20": _cifar10("resnet20_cifar10", "torch", 81.03, 81.10, 291_232),
    "resnet56": _cifar10("resnet56_cifar10", "torch", 83.20, 83.03, 909_192),
    "ds_cnn": RealModel(
        "ds_cnn_speech_commands_mlperf_tiny",
        calibration=lambda limit: speech("calibration", limit)[0],
        evaluation=lambda limit: _cut(speech("test", limit)),
        top1=91.25,
        converter=91.50,  # on all 1000 samples, where the float model reaches 91.30
        converter_bytes=35_568,
        calibration_size=200,
    ),
}


# what the project trained itself; its accuracies are in docs/results.md
OWN = {"mobilenet_v2_cifar": _cifar10(str(mobilenet_v2_cifar.PATH), "tf", math.nan, math.nan, 0)}


def record(name: str) -> RealModel:
    """The entry of MODELS or OWN."""
    return OWN[name] if name in OWN else MODELS[name]


def trainable() -> list[str]:
    """The names of those with training data."""
    return [name for name, entry in {**MODELS, **OWN}.items() if entry.training]


def top1(content: bytes, batches: Iterable[Any], kernels: str = "default") -> tuple[float, int]:
    """Accuracy in percent of a file on LiteRT, and the number of samples.

    Args:
        content: the file.
        batches: (inputs, labels), see `RealModel.evaluation`.
        kernels: of `kquant.TFLiteModel`.
    """
    # LiteRT's float convolution computes garbage for few channels when several threads share it
    model = kquant.TFLiteModel(content, kernels, threads=cpus() if only_integer_ops(content) else 1)
    return _top1(lambda x: model.predict(x, batch_size=len(x))[0], batches)


def float_top1(model: keras.Model, batches: Iterable[Any]) -> float:
    """Accuracy in percent of a float model, or of a simulation."""
    return _top1(model.predict_on_batch, batches)[0]


def _top1(predict: Callable[[Any], Any], batches: Iterable[Any]) -> tuple[float, int]:
    right = seen = 0
    for x, y in batches:
        right += int(np.sum(np.argmax(predict(x), -1) == y))
        seen += len(y)
    return 100 * right / seen, seen


def cpus() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def calibration(name: str, size: int | None = None) -> Any:
    """The calibration set, as large as the converter's in the record, or of `size` samples."""
    return record(name).calibration(size or record(name).calibration_size)
