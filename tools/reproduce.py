r"""Regenerates the tables of docs/results.md on the evaluation data (KQUANT_DATA).

    python -m tools.reproduce --table=accuracy
    python -m tools.reproduce --table=parity --models=resnet20 --configs=w8a8,w4a4

accuracy: top-1 of the exported file on all evaluation samples, against the float model and the
TensorFlow converter. parity: the contract of `verify_tflite`, and the share of equal elements.
Calibration uses the calibration sets only.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from absl import app, flags

import kquant
from kquant.tflite.flatbuffer import only_integer_ops

from . import zoo

FLAGS = flags.FLAGS
TABLES = ("accuracy", "configs", "collapse", "equalize", "parity")
TABLE = flags.DEFINE_enum("table", "accuracy", TABLES, "What to regenerate.")
MODELS = flags.DEFINE_list("models", list(zoo.MODELS), "Keys of tools.zoo.MODELS.")
CONFIGS = flags.DEFINE_list("configs", ["w8a8", "w8a8-per_tensor", "w4a8", "w8a16", "w4a4"], "Presets.")
SAMPLES = flags.DEFINE_integer("samples", None, "Evaluate on at most this many samples, spread evenly.")

MIN_MAX = {"weights": {"method": "min_max"}}


def converted(model: keras.Model, name: str) -> bytes:
    """TensorFlow's full-integer post-training quantization, per channel, on the same data."""
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([x[None]] for batch in _batches(zoo.calibration(name)) for x in batch)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    with contextlib.redirect_stdout(io.StringIO()):
        return converter.convert()


def _batches(data: Any) -> Iterator[np.ndarray]:
    return iter([data]) if isinstance(data, np.ndarray) else iter(data)


def accuracy(name: str) -> Iterator[Sequence[Any]]:
    """w8a8 per channel against float and the converter."""
    model = zoo.load_model(name)
    report = kquant.export_tflite(kquant.quantize_model(model, zoo.calibration(name), "w8a8"))
    ours, seen = zoo.top1(report.content, name, SAMPLES.value)
    expected = zoo.float_top1(model, name, SAMPLES.value)
    theirs = converted(model, name)
    their_top1, _ = zoo.top1(theirs, name, SAMPLES.value)
    integer = "yes" if only_integer_ops(report.content) else "NO"
    ratio = f"{len(report.content) / len(theirs):.3f}"
    row = (name, seen, expected, ours, ours - expected, their_top1, integer, len(report.content), len(theirs), ratio)
    yield row


def configs(name: str) -> Iterator[Sequence[Any]]:
    """Every preset, exported, against float."""
    model = zoo.load_model(name)
    expected = zoo.float_top1(model, name, SAMPLES.value)
    for config in CONFIGS.value:
        report = kquant.export_tflite(kquant.quantize_model(model, zoo.calibration(name), config))
        ours, seen = zoo.top1(report.content, name, SAMPLES.value)
        yield name, config, seen, expected, ours, ours - expected, report.bytes


def collapse(name: str) -> Iterator[Sequence[Any]]:
    """Per-tensor min-max weights: the simulation and the file, on the same samples."""
    config = {"preset": "w8a8-per_tensor", **MIN_MAX}
    qmodel = kquant.quantize_model(zoo.load_model(name), zoo.calibration(name), config)
    ours, seen = zoo.top1(kquant.export_tflite(qmodel).content, name, SAMPLES.value)
    yield (
        name,
        seen,
        zoo.float_top1(zoo.load_model(name), name, SAMPLES.value),
        zoo.float_top1(qmodel, name, SAMPLES.value),
        ours,
    )


def equalized(name: str) -> Iterator[Sequence[Any]]:
    """Per-tensor weights without and with cross-layer equalization, exported."""
    model, row = zoo.load_model(name), [zoo.float_top1(zoo.load_model(name), name, SAMPLES.value)]
    for switch in (False, True):
        qmodel = kquant.quantize_model(model, zoo.calibration(name), {"preset": "w8a8-per_tensor", "equalize": switch})
        ours, seen = zoo.top1(kquant.export_tflite(qmodel).content, name, SAMPLES.value)
        row.append(ours)
    yield (name, seen, *row)


def parity(name: str) -> Iterator[Sequence[Any]]:
    """The parity contract of every preset, on evaluation samples."""
    model = zoo.load_model(name)
    samples = SAMPLES.value or (50 if name.startswith("mobilenet") else 200)
    data = [x for x, _ in zoo.MODELS[name].evaluation(samples)]
    for config in CONFIGS.value:
        qmodel = kquant.quantize_model(model, zoo.calibration(name), config)
        content = kquant.export_tflite(qmodel).content
        r = kquant.verify_tflite(qmodel, content, data, samples=samples)
        e = r.end_to_end[0]
        softmax = sum(t.reference_unequal for t in r.tensors if t.op == "softmax")
        yield (
            *(name, config, "holds" if r.ok else "FAILS", len(r.tensors), f"{r.float_error:.0e}"),
            *(f"{r.reference_max_lsb:.0f} ({r.kernels})", softmax, f"{r.op_by_op_max_lsb:.0f}", e.samples),
            *(f"{100 * e.equal:.3f}", f"{100 * e.agreement:.2f}"),
            *(f"{100 * e.kernels_equal:.3f}", f"{100 * e.kernels_agreement:.2f}"),
        )


Rows = Callable[[str], Iterator[Sequence[Any]]]
MAKERS: dict[str, tuple[Rows, tuple[str, ...]]] = {
    "accuracy": (
        accuracy,
        ("model", "samples", "float", "w8a8 .tflite", "difference", "converter", "integer only")
        + ("bytes", "converter bytes", "ratio"),
    ),
    "configs": (configs, ("model", "config", "samples", "float", ".tflite", "difference", "bytes")),
    "collapse": (collapse, ("model", "samples", "float", "simulation", ".tflite")),
    "equalize": (equalized, ("model", "samples", "float", "w8a8-per_tensor .tflite", "with equalize")),
    "parity": (
        parity,
        ("model", "config", "contract", "tensors", "wiring", "reference LSB (kernels)", "softmax unequal")
        + ("simulation LSB", "samples", "equal %", "same decision %", "kernels equal %", "kernels same %"),
    ),
}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(argv: list[str]) -> None:
    make, header = MAKERS[TABLE.value]
    start = time.perf_counter()
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header), flush=True)
    for name in MODELS.value:
        for row in make(name):
            print("| " + " | ".join(map(_cell, row)) + " |", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    app.run(main)
