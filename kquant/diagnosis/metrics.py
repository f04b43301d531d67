"""What is measured: any metric as a function (model) -> float, higher is better, on samples held in memory.

| metric | score |
| --- | --- |
| "accuracy", or None where there are labels | top-1 accuracy in percent |
| "agreement", or None where there are no labels | how often the float network names the same class, in percent |
| "sqnr", also for None where the output is one number | of the output against the float network's, in dB |
| "kl" | minus the mean Kullback-Leibler divergence of the classes from the float network's, in nats |
| a Keras metric or its name | its result; negated where smaller is better |
| a function (model) -> float | what it returns |

All but the last look at the model's first output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kquant.errors import CalibrationError, ConfigError, ModelError
from kquant.graph.ir import Graph
from kquant.graph.structure import pack
from kquant.quantize.data import CalibrationData, InputSpec
from kquant.targets.litert.runtime import TFLiteModel
from kquant.verify.end_to_end import same_decision

Array = np.ndarray[Any, Any]
MOST_DB = 200.0  # the noise of equal tensors is taken for 1e-20 of the signal, beyond what float32 can tell


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled or unlabelled samples.

    Attributes:
        batches: per batch one array per input of the model, float32 or int32.
        labels: of all samples in order, [n, ...]; None where there are none.
        names: the inputs' names.
    """

    batches: tuple[tuple[Array, ...], ...]
    labels: Array | None
    names: tuple[str, ...]

    def __len__(self) -> int:
        return sum(len(batch[0]) for batch in self.batches)

    def __iter__(self) -> Iterator[list[Array]]:
        return (list(batch) for batch in self.batches)


def read_samples(data: Any, graph: Graph, *, limit: int | None = None, batch_size: int = 32) -> Samples:
    """Samples with their labels, read once and held in memory: bound them with `limit`.

    Args:
        data: of any kind that `quantize_model` takes (see `kquant.data`); the y of (x, y) are labels.
        graph: names, shapes and types of the inputs.
        limit: at most so many samples.
        batch_size: into how many samples arrays are cut.

    Raises:
        CalibrationError: the data is missing, empty or does not fit, or has another number of labels than samples.
    """
    specs = [(name, graph[i].shape, graph[i].dtype) for i, name in zip(graph.inputs, graph.input_names, strict=True)]
    source = _Labelled(data, specs, batch_size, limit)
    batches = tuple(tuple(batch) for batch in source)
    return Samples(batches, source.labels(sum(len(b[0]) for b in batches)), tuple(graph.input_names))


class _Labelled(CalibrationData):
    """Calibration data that remembers the labels of one pass."""

    def __init__(self, source: Any, specs: Sequence[InputSpec], batch_size: int, limit: int | None) -> None:
        super().__init__(source, specs, batch_size, limit)
        self._seen: list[Any] = []
        whole = isinstance(source, tuple | Mapping) or hasattr(source, "__array__")
        if whole:
            self._seen = [_labels_of(source, len(specs))]
            return
        batches = self._open

        def recorded() -> Iterator[Any]:
            for batch in batches():
                self._seen.append(_labels_of(batch, len(specs)))
                yield batch

        self._open = recorded

    def labels(self, count: int) -> Array | None:
        """The labels of the first `count` samples, which are all that were read."""
        known = [np.asarray(y) for y in self._seen if y is not None]
        if not known:
            return None
        total = sum(len(y) if y.ndim else 0 for y in known)
        if len(known) != len(self._seen) or total < count or (self._limit is None and total != count):
            raise CalibrationError(
                f"The data has {count} samples and {total} labels, {len(known)} of {len(self._seen)} batches having "
                "any: pass one label per sample, as (x, y)."
            )
        return np.concatenate(known)[:count]


def _labels_of(batch: Any, inputs: int) -> Any:
    """The y of (x, y) or (x, y, sample_weight), as `kquant.data` reads a batch."""
    pair = isinstance(batch, list | tuple) and 2 <= len(batch) <= 3
    return batch[1] if pair and (inputs == 1 or not hasattr(batch[0], "__array__")) else None


def predict(model: Any, samples: Samples) -> list[Array]:
    """All outputs of a model, float32 [n, ...] each.

    Args:
        model: a Keras model (the user's, or a `QuantizedModel`) or a `TFLiteModel`.
        samples: what to run it on.
    """
    if isinstance(model, TFLiteModel):
        return model.predict_batches(samples)
    results = [model.predict_on_batch(_as_fed(model, batch)) for batch in samples]
    columns = zip(*(keras.tree.flatten(y) for y in results), strict=True)
    return [np.concatenate([np.asarray(part, np.float32) for part in column]) for column in columns]


def _as_fed(model: Any, batch: list[Array]) -> Any:
    """A batch in the structure that the model was made with."""
    structure = getattr(model, "_inputs_struct", None)
    return pack(None, batch) if structure is None else keras.tree.pack_sequence_as(structure, batch)


@dataclass(frozen=True, eq=False, kw_only=True)
class Metric:
    """A metric on fixed samples: call it on a model. It can be pickled where a user's function can.

    Attributes:
        name: what it is called, with its unit.
        samples: what it is measured on.
        reference: outputs of the float network on them.
        kind: key of `_SCORES`, or "function".
        argument: class and settings of the Keras metric, or the user's function.
    """

    name: str
    samples: Samples
    reference: tuple[Array, ...]
    kind: str
    argument: Any = None

    def __call__(self, model: Any) -> float:
        """The score of a model, higher is better.

        Raises:
            ConfigError: the user's function returns no number.
            ModelError: the score, or an output of the model, is not finite.
        """
        if self.kind != "function":
            return self.of_outputs(predict(model, self.samples))
        value = self.argument(model)
        try:
            score = float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"The metric {self.name!r} returned {value!r}: a metric is a function (model) -> float."
            ) from error
        return _finite(score, self.name)

    def of_run(self, model: Any, outputs: Sequence[Array]) -> float:
        """The score of a model whose outputs for the samples are known; only a user's function runs it again."""
        return self(model) if self.kind == "function" else self.of_outputs(outputs)

    def of_outputs(self, outputs: Sequence[Array]) -> float:
        """The score of outputs that a model gave to the samples; not for a user's function."""
        if not np.isfinite(outputs[0]).all():
            raise ModelError(
                "The first output of the model holds NaN or infinite values: check its weights and the data."
            )
        return _finite(_SCORES[self.kind](self, outputs[0]), self.name)

    def sqnr(self, outputs: Sequence[Array]) -> float:
        """SQNR of all outputs against the float network's, in dB."""
        flat = [np.concatenate([np.ravel(y) for y in side]) for side in (self.reference, outputs)]
        return sqnr_db(*flat)


def make_metric(metric: Any, samples: Samples, float_model: Any) -> Metric:
    """A metric of any kind (see the module's docstring) on given samples.

    Args:
        metric: None, a name, a Keras metric, or a function (model) -> float.
        samples: from `read_samples`.
        float_model: the float network, which runs once: a Keras model, or one with all its quantizers switched off.

    Raises:
        ConfigError: the metric is unknown, or needs labels and there are none.
        CalibrationError: the labels are no classes of the model's output.
        ModelError: an output of the float model is not finite.
    """
    reference = tuple(predict(float_model, samples))
    kind, name, argument = _resolve(metric, samples, reference)
    if kind in ("accuracy", "keras") and samples.labels is None:
        raise ConfigError(
            f"The metric {name!r} needs labels: pass data as (x, y), or leave the metric out to compare with the "
            "float model."
        )
    if kind == "accuracy":
        _check_labels(samples, reference[0])
    if not np.isfinite(reference[0]).all():
        raise ModelError("The float model's output holds NaN or infinite values: check its weights and the data.")
    return Metric(name=name, samples=samples, reference=reference, kind=kind, argument=argument)


def _resolve(metric: Any, samples: Samples, reference: Sequence[Array]) -> tuple[str, str, Any]:
    """(kind, name, argument)."""
    if metric is None:
        metric = "accuracy" if samples.labels is not None else "agreement" if reference[0].shape[-1] > 1 else "sqnr"
    if isinstance(metric, str):
        if metric in _NAMES:
            return metric, _NAMES[metric], None
        try:
            metric = keras.metrics.get(metric)
        except ValueError as error:
            raise ConfigError(
                f"Unknown metric {metric!r}: use {', '.join(map(repr, _NAMES))}, a Keras metric, or a function "
                "(model) -> float."
            ) from error
        metric = metric if isinstance(metric, keras.metrics.Metric) else keras.metrics.MeanMetricWrapper(metric)
    if isinstance(metric, keras.metrics.Metric):
        down = getattr(metric, "_direction", "up") == "down"
        return "keras", f"-{metric.name}" if down else metric.name, (type(metric), metric.get_config())
    if not callable(metric):
        raise ConfigError(f"A metric is None, a name, a Keras metric or a function (model) -> float, found {metric!r}.")
    return "function", getattr(metric, "__name__", type(metric).__name__), metric


def _check_labels(samples: Samples, output: Array) -> None:
    """Labels [n, ...] are classes of an output [n, ..., classes], or one-hot."""
    labels, classes = samples.labels, output.shape[-1]
    found = class_indices(labels, output)
    if classes < 2:
        raise ConfigError(
            "Accuracy needs an output with one score per class, and the model gives one number: pass a Keras metric, "
            "e.g. keras.metrics.BinaryAccuracy()."
        )
    if found.shape != output.shape[:-1] or found.min() < 0 or found.max() >= classes:
        raise CalibrationError(
            f"Labels {found.shape} with classes {found.min()}..{found.max()} do not fit the output "
            f"{output.shape}: pass class indices below {classes}, or one-hot labels."
        )


def class_indices(labels: Any, output: Array) -> Array:
    """Labels as class indices in the shape of `output` without its last axis, from indices or one-hot."""
    y = np.asarray(labels)
    if y.shape == output.shape and y.shape[-1] > 1:
        return np.argmax(y, -1)
    return y[..., 0] if y.ndim == output.ndim and y.shape[-1] == 1 else y


def sqnr_db(reference: Any, value: Any) -> float:
    """Signal to quantization noise: 10 log10(sum reference^2 / sum (reference - value)^2), in dB, within +-200.

    Args:
        reference, value: of the same shape.
    """
    reference, value = (np.asarray(v, np.float64) for v in (reference, value))
    return ratio_db(float(np.sum(reference**2)), float(np.sum((reference - value) ** 2)))


def ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise), within +-200, which stand for no noise and no signal."""
    if noise == 0:
        return MOST_DB
    return MOST_DB if math.isinf(signal) else max(-MOST_DB, min(MOST_DB, 10 * math.log10(max(signal / noise, 1e-20))))


def kl_divergence(reference: Any, value: Any) -> float:
    """Mean over the rows of sum p log(p / q), in nats, p and q the classes' probabilities.

    Args:
        reference, value: [..., classes]: probabilities where the rows of `reference` are (not negative, of sum 1),
            else logits, of which the softmax is taken.
    """
    reference, value = (np.asarray(v, np.float64).reshape(-1, np.shape(v)[-1]) for v in (reference, value))
    probable = (reference >= 0).all() and np.allclose(reference.sum(-1), 1, atol=1e-3)
    p, q = (_logs(np.log(np.maximum(v, 1e-12)) if probable else v) for v in (reference, value))
    return float(np.mean(np.sum(np.exp(p) * (p - q), -1)))


def _logs(logits: Array) -> Array:
    """Logarithms of the softmax."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted), -1, keepdims=True)))


def _accuracy(metric: Metric, output: Array) -> float:
    return 100 * float(np.mean(np.argmax(output, -1) == class_indices(metric.samples.labels, output)))


def _keras(metric: Metric, output: Array) -> float:
    kind, settings = metric.argument
    measured = kind.from_config(settings)  # a fresh one for every score
    try:
        measured.update_state(metric.samples.labels, output)
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        raise ConfigError(
            f"The metric {metric.name!r} does not take the labels with outputs of shape {output.shape}: {error}"
        ) from error
    sign = -1 if getattr(measured, "_direction", "up") == "down" else 1
    return sign * float(measured.result())


def _finite(score: float, name: str) -> float:
    if not math.isfinite(score):
        raise ModelError(f"The metric {name!r} is {score}: check the model's outputs, the labels and the metric.")
    return score


_NAMES = {"accuracy": "top-1 accuracy (%)", "agreement": "agreement with float (%)", "sqnr": "SQNR (dB)", "kl": "-KL"}
_SCORES: dict[str, Callable[[Metric, Array], float]] = {
    "accuracy": _accuracy,
    "agreement": lambda m, y: 100 * same_decision(y, m.reference[0]),
    "sqnr": lambda m, y: sqnr_db(m.reference[0], y),
    "kl": lambda m, y: -kl_divergence(m.reference[0], y),
    "keras": _keras,
}
