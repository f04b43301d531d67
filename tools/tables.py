"""The tables of docs/results.md about exported files: accuracy, size and parity.

A table is a generator of rows for one model, and a header; `tools.reproduce` prints it.
"""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

import kquant
from kquant.targets.litert.flatbuffer import only_integer_ops

from . import zoo

MIN_MAX = {"weights": {"method": "min_max"}}
OFF = {"equalize": False, "absorb_bias": False, "adaround": False, "correct_bias": False}  # steps of `QuantConfig`


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for.

    Attributes:
        samples: evaluate on at most so many, spread evenly; None takes all.
        configs: presets, for the tables that compare presets.
        calibration: samples to calibrate "configs" with; None takes as many as the record has.
        seeds: how often a step that depends on chance is repeated.
        epochs: passes over the training data, for the tables about training.
        variants: regular expression for the variants to measure; empty for all.
    """

    samples: int | None = None
    configs: tuple[str, ...] = ()
    calibration: int | None = None
    seeds: int = 3
    epochs: int = 2
    variants: str = ""

    def wants(self, variant: str) -> bool:
        """Whether a variant is to be measured."""
        return re.search(self.variants, variant) is not None


Rows = Callable[[str, Options], Iterator[Sequence[Any]]]


@dataclass(frozen=True)
class Table:
    """How a table is made: (key of `zoo.MODELS`, options) -> rows, and the names of their cells."""

    rows: Rows
    header: tuple[str, ...]

    def markdown(self, names: Sequence[str], options: Options) -> Iterator[str]:
        """The lines of the table for some models, each as soon as it is measured."""
        yield _line(self.header)
        yield "|" + " --- |" * len(self.header)
        for name in names:
            yield from (_line(row) for row in self.rows(name, options))


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


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


def accuracy(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """w8a8 per channel against float and the converter."""
    model = zoo.load_model(name)
    batches = zoo.MODELS[name].evaluation(options.samples)
    report = kquant.export_tflite(kquant.quantize_model(model, zoo.calibration(name), "w8a8"))
    ours, seen = zoo.top1(report.content, batches)
    expected = zoo.float_top1(model, batches)
    theirs = converted(model, name)
    their_top1, _ = zoo.top1(theirs, batches)
    integer = "yes" if only_integer_ops(report.content) else "NO"
    ratio = f"{len(report.content) / len(theirs):.3f}"
    yield name, seen, expected, ours, ours - expected, their_top1, integer, len(report.content), len(theirs), ratio


def configs(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """Every preset, exported, against float."""
    model, batches = zoo.load_model(name), zoo.MODELS[name].evaluation(options.samples)
    expected = zoo.float_top1(model, batches)
    for config in options.configs:
        start = time.perf_counter()
        qmodel = kquant.quantize_model(model, zoo.calibration(name, options.calibration), config, progress=False)
        seconds = f"{time.perf_counter() - start:.0f}"
        report = kquant.export_tflite(qmodel)
        ours, seen = zoo.top1(report.content, batches)
        yield name, config, seen, expected, ours, ours - expected, report.bytes, seconds


def collapse(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """Per-tensor min-max weights without a remedy: the simulation and the file, on the same samples."""
    model, config = zoo.load_model(name), {"preset": "w8a8-per_tensor", **MIN_MAX, **OFF}
    batches = zoo.MODELS[name].evaluation(options.samples)
    qmodel = kquant.quantize_model(model, zoo.calibration(name), config)
    ours, seen = zoo.top1(kquant.export_tflite(qmodel).content, batches)
    expected, simulated = (zoo.float_top1(m, batches) for m in (model, qmodel))
    yield name, seen, expected, simulated, ours


def parity(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """The parity contract of every preset, on evaluation samples; steps choose integers and change no arithmetic."""
    model = zoo.load_model(name)
    samples = options.samples or (50 if name.startswith("mobilenet") else 200)
    data = [x for x, _ in zoo.MODELS[name].evaluation(samples)]
    for config in options.configs:
        qmodel = kquant.quantize_model(model, zoo.calibration(name), {"preset": config, **OFF, "logits": None})
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


TABLES = {
    "accuracy": Table(
        accuracy,
        ("model", "samples", "float", "w8a8 .tflite", "difference", "converter", "integer only")
        + ("bytes", "converter bytes", "ratio"),
    ),
    "configs": Table(configs, ("model", "config", "samples", "float", ".tflite", "difference", "bytes", "seconds")),
    "collapse": Table(collapse, ("model", "samples", "float", "simulation", ".tflite")),
    "parity": Table(
        parity,
        ("model", "config", "contract", "tensors", "wiring", "reference LSB (kernels)", "softmax unequal")
        + ("simulation LSB", "samples", "equal %", "same decision %", "kernels equal %", "kernels same %"),
    ),
}
