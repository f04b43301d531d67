"""The tables about exported files: accuracy, size and parity.

A table is a generator of rows for one model, and a header; `experiments.reproduce` prints it.
"""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kquant
from kquant.targets.litert.flatbuffer import only_integer_ops

from . import zoo
from .results import Results

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
        files: folder of exported files MODEL_PRESET.tflite: what is there is scored, what is not is put there.
    """

    samples: int | None = None
    configs: tuple[str, ...] = ()
    calibration: int | None = None
    seeds: int = 3
    epochs: int = 2
    variants: str = ""
    files: Path | None = None

    def wants(self, variant: str) -> bool:
        """Whether a variant is to be measured."""
        return re.search(self.variants, variant) is not None


Rows = Callable[[str, Options], Iterator[Sequence[Any]]]


@dataclass(frozen=True)
class Table:
    """How a table is made.

    Attributes:
        rows: (key of `zoo.MODELS`, options) -> rows.
        header: names of the cells.
        key: columns that name a row.
    """

    rows: Rows
    header: tuple[str, ...]
    key: tuple[str, ...] = ("model",)

    def all_rows(self, names: Sequence[str], options: Options) -> Iterator[Sequence[Any]]:
        """The rows of some models, each as soon as it is measured."""
        for name in names:
            yield from self.rows(name, options)

    def results(self, name: str) -> Results:
        """The file that keeps the rows of the table, which `--table` knows as `name`."""
        return Results(f"table_{name}" if name.isdecimal() else name, self.header, self.key)


class OneTable(Table):
    """A table that does not go by the models of `zoo`."""

    def all_rows(self, names: Sequence[str], options: Options) -> Iterator[Sequence[Any]]:
        return self.rows("", options)


def converted(model: keras.Model, name: str) -> bytes:
    """TensorFlow's full-integer post-training quantization, per channel, on the same data."""
    data = zoo.calibration(name)
    return converted_with(model, [data] if isinstance(data, np.ndarray) else data)


def converted_with(model: keras.Model, batches: Iterable[np.ndarray], per_channel: bool = True) -> bytes:
    """TensorFlow's full-integer post-training quantization.

    Args:
        model: the float model.
        batches: of its input, to calibrate with; read as often as the converter likes.
        per_channel: whether weights have a scale for each channel.
    """
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([x[None]] for batch in batches for x in batch)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = tf.int8
    if all(output.dtype == "float32" for output in model.outputs):  # those of decisions are integers anyway
        converter.inference_output_type = tf.int8
    converter._experimental_disable_per_channel = not per_channel
    with contextlib.redirect_stdout(io.StringIO()):
        return converter.convert()


def exported(name: str, config: str, options: Options) -> tuple[bytes, str]:
    """The file of a preset, and the seconds that quantizing took ("" where it was there)."""
    kept = options.files / f"{name}_{config}.tflite" if options.files else None
    if kept is not None and kept.exists():
        return kept.read_bytes(), ""
    model, data, start = zoo.load_model(name), zoo.calibration(name, options.calibration), time.perf_counter()
    qmodel = kquant.quantize_model(model, data, config, progress=False)
    seconds = f"{time.perf_counter() - start:.0f}"
    content = kquant.export_tflite(qmodel).content
    if kept is not None:
        kept.write_bytes(content)
    return content, seconds


def accuracy(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """w8a8 per channel against float and the converter."""
    model = zoo.load_model(name)
    batches = zoo.MODELS[name].evaluation(options.samples)
    content, _ = exported(name, "w8a8", options)
    ours, seen = zoo.top1(content, batches)
    expected = zoo.float_top1(model, batches)
    theirs = converted(model, name)
    their_top1, _ = zoo.top1(theirs, batches)
    integer = "yes" if only_integer_ops(content) else "NO"
    ratio = f"{len(content) / len(theirs):.3f}"
    yield name, seen, expected, ours, ours - expected, their_top1, integer, len(content), len(theirs), ratio


def configs(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """Every preset, exported, against float."""
    batches = zoo.MODELS[name].evaluation(options.samples)
    expected = zoo.float_top1(zoo.load_model(name), batches)
    calibrated = options.calibration or zoo.MODELS[name].calibration_size
    for config in options.configs:
        content, seconds = exported(name, config, options)
        ours, seen = zoo.top1(content, batches)
        yield name, config, calibrated, seen, expected, ours, ours - expected, len(content), seconds


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
    "configs": Table(
        configs,
        ("model", "config", "calibration", "samples", "float", ".tflite", "difference", "bytes", "seconds"),
        ("model", "config", "calibration"),
    ),
    "collapse": Table(collapse, ("model", "samples", "float", "simulation", ".tflite")),
    "parity": Table(
        parity,
        ("model", "config", "contract", "tensors", "wiring", "reference LSB (kernels)", "softmax unequal")
        + ("simulation LSB", "samples", "equal %", "same decision %", "kernels equal %", "kernels same %"),
        ("model", "config"),
    ),
}
