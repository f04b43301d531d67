"""Which settings are the best at 8 bits: agreement with the float model, and KL, which are less noisy than accuracy.

Every variant is calibrated on the same samples; files run on LiteRT. Agreement is the share of samples whose top class
is that of the float model. KL is that of the float model's probabilities to the file's, the mean over samples; a file's
zeros count as half a step of 1/256. The converter is TensorFlow's, at full integers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

import kquant

from . import zoo
from .tables import Options, Table

HEADER = ("model", "variant", "samples", "float", "top-1", "agreement %", "KL / 1000", "seconds", "bytes")
MSE, BIAS = {"activations": {"method": "mse"}}, {"correct_bias": True}
MIN_MAX = {"activations": {"method": "min_max"}}
OFF = {"correct_bias": False, "adaround": False}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "min_max": {**MIN_MAX, **OFF},
    "mse": {**MSE, **OFF},
    "min_max, bias correction": {**MIN_MAX, **BIAS},
    "mse, bias correction": {**MSE, **BIAS},
    "mse, AdaRound": {**MSE, "adaround": True},
}
PRESETS = {"per channel": "w8a8", "per tensor": "w8a8-per_tensor"}


def defaults(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """A row for the converter and for every variant, per channel and per tensor."""
    model, entry = zoo.load_model(name), zoo.record(name)
    source = zoo.calibration(name, options.calibration)
    data = [source] if isinstance(source, np.ndarray) else list(source)
    batches = list(entry.evaluation(options.samples))
    expected = np.concatenate([np.asarray(model.predict_on_batch(x)) for x, _ in batches])
    labels = np.concatenate([y for _, y in batches])
    top1 = 100 * float(np.mean(expected.argmax(-1) == labels))
    for granularity, preset in PRESETS.items():
        makers: dict[str, Callable[[], bytes]] = {
            f"{granularity}, converter": partial(convert, model, data, granularity == "per tensor")
        }
        for variant, settings in VARIANTS.items():
            makers[f"{granularity}, {variant}"] = partial(_quantize, model, data, {"preset": preset, **settings})
        for variant, make in makers.items():
            if not options.wants(variant):
                continue
            start = time.perf_counter()
            content = make()
            seconds = time.perf_counter() - start
            found = _predict(content, batches)
            right = 100 * float(np.mean(found.argmax(-1) == labels))
            cells = f"{top1:.2f}", f"{right:.2f}", f"{agreement(expected, found):.2f}"
            divergence = f"{1000 * kl(expected, found):.2f}"
            yield name, variant, len(labels), *cells, divergence, f"{seconds:.1f}", len(content)


def agreement(expected: np.ndarray, found: np.ndarray) -> float:
    """Percentage of samples with the same top class."""
    return 100 * float(np.mean(expected.argmax(-1) == found.argmax(-1)))


def kl(expected: np.ndarray, found: np.ndarray) -> float:
    """Mean over samples of sum p log(p / q), with q at least half a step of an 8-bit softmax, and normalized.

    Models that return logits get a softmax.
    """
    if np.abs(expected.sum(-1) - 1).max() > 1e-3:
        expected, found = (np.exp(y - y.max(-1, keepdims=True)) for y in (expected, found))
        expected, found = (y / y.sum(-1, keepdims=True) for y in (expected, found))
    p = np.maximum(np.asarray(expected, np.float64), 1e-12)
    q = np.maximum(np.asarray(found, np.float64), 1 / 512)
    return float(np.mean(np.sum(p * np.log(p / (q / q.sum(-1, keepdims=True))), -1)))


def _quantize(model: Any, data: Any, config: Mapping[str, Any]) -> bytes:
    return kquant.export_tflite(kquant.quantize_model(model, data, config, progress=False)).content


def convert(model: Any, data: Iterable[Any], per_tensor: bool) -> bytes:
    """TensorFlow's converter: full-integer post-training quantization."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([x[None]] for batch in data for x in batch)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    converter._experimental_disable_per_channel = per_tensor
    return converter.convert()


def _predict(content: bytes, batches: Iterable[Any]) -> np.ndarray:
    file = kquant.TFLiteModel(content)
    return np.concatenate([file.predict(x, batch_size=len(x))[0] for x, _ in batches])


TABLES = {"defaults": Table(defaults, HEADER, ("model", "variant"))}
