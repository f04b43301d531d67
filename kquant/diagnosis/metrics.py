"""What is measured: any metric as a function (model) -> float, higher is better, on samples held in memory.

| metric | score |
| --- | --- |
| "accuracy", or None where there are labels | top-1 accuracy in percent; of an output of integers, equal ones |
| "agreement", or None where there are no labels | how often the float network names the same class, in percent |
| "sqnr", also for None where the output is one number | of the output against the float network's, in dB |
| "kl" | minus the mean Kullback-Leibler divergence of the classes from the float network's, in nats |
| "mean_iou:C", "pixel_accuracy:C" | of masks of C classes, see `kquant.diagnosis.tasks` |
| a Keras metric or its name | its result; negated where smaller is better |
| an `OutputMetric` | what it makes of labels and outputs |
| a function (model) -> float | what it returns |
| a dict of these by the outputs' names (but for functions) | the mean over the outputs, each with its own labels |

All but an `OutputMetric`, a function and a dict look at the model's first output. None is a dict where the labels are
one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kquant.diagnosis.samples import Samples, predict
from kquant.diagnosis.tasks import OutputMetric, mean_iou, pixel_accuracy
from kquant.errors import CalibrationError, ConfigError, ModelError
from kquant.verify.end_to_end import same_decision

Array = np.ndarray[Any, Any]
MOST_DB = 200.0  # the noise of equal tensors is taken for 1e-20 of the signal, beyond what float32 can tell


@dataclass(frozen=True, eq=False, kw_only=True)
class Metric:
    """A metric on fixed samples: call it on a model. It can be pickled where a user's function can.

    Attributes:
        name: what it is called, with its unit.
        samples: what it is measured on.
        reference: outputs of the float network on them.
        kind: key of `_SCORES`, or "function".
        argument: class and settings of the Keras metric, the user's function or `OutputMetric`, or (number of the
            output, its metric) for each of several.
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
        for k, output in enumerate(outputs if self.kind == "outputs" else outputs[:1]):
            if not np.isfinite(output).all():
                raise ModelError(
                    f"Output {k} of the model holds NaN or infinite values: check its weights and the data."
                )
        return _finite(_SCORES[self.kind](self, outputs), self.name)

    def by_output(self, outputs: Sequence[Array]) -> dict[str, float]:
        """The scores of outputs by name, of a metric for each of several; else the one score by its own name."""
        if self.kind != "several":
            return {self.name: self.of_outputs(outputs)}
        return {f"{part.samples.outputs[k]}: {part.name}": part.of_outputs([outputs[k]]) for k, part in self.argument}

    def sqnr(self, outputs: Sequence[Array]) -> float:
        """SQNR of all outputs against the float network's, in dB; of integers 10 log10 of one in how many differs.

        The smaller one, where a network returns both.
        """
        pairs = list(zip(self.reference, outputs, strict=True))
        numbers = [(p.ravel(), q.ravel()) for p, q in pairs if p.dtype.kind not in "iub"]
        integers = [np.ravel(p == q) for p, q in pairs if p.dtype.kind in "iub"]
        found = [sqnr_db(*map(np.concatenate, zip(*numbers, strict=True)))] if numbers else []
        if integers:
            equal = np.concatenate(integers)
            found.append(ratio_db(equal.size, float(np.count_nonzero(~equal))))
        return min(found)


def make_metric(metric: Any, samples: Samples, float_model: Any) -> Metric:
    """A metric of any kind (see the module's docstring) on given samples.

    Args:
        metric: of any kind.
        samples: from `read_samples`.
        float_model: the float network, which runs once: a Keras model, or one with all its quantizers switched off.

    Raises:
        ConfigError: the metric is unknown, or needs labels and there are none.
        CalibrationError: the labels are no classes of the model's output.
        ModelError: an output of the float model is not finite.
    """
    return _make(metric, samples, tuple(predict(float_model, samples)))


def _make(metric: Any, samples: Samples, reference: tuple[Array, ...]) -> Metric:
    if metric is None and isinstance(samples.labels, Mapping):
        metric = dict.fromkeys(samples.labels)
    if isinstance(metric, Mapping):
        return _several(metric, samples, reference)
    kind, name, argument = _resolve(metric, samples, reference)
    if kind in ("accuracy", "keras", "outputs") and samples.labels is None:
        raise ConfigError(
            f"The metric {name!r} needs labels: pass data as (x, y), or leave the metric out to compare with the "
            "float model."
        )
    if isinstance(samples.labels, Mapping) and kind in ("accuracy", "keras"):
        raise ConfigError(
            f"The labels are a dict of {', '.join(map(repr, samples.labels))}: pass a dict of metrics by these names."
        )
    if kind == "accuracy":
        _check_labels(samples, reference[0])
    if kind == "kl" and reference[0].dtype.kind in "iub":
        raise ConfigError("KL is of probabilities or logits, and the output is integers: use 'agreement'.")
    if not np.isfinite(reference[0]).all():
        raise ModelError("The float model's output holds NaN or infinite values: check its weights and the data.")
    return Metric(name=name, samples=samples, reference=reference, kind=kind, argument=argument)


def _several(metrics: Mapping[str, Any], samples: Samples, reference: tuple[Array, ...]) -> Metric:
    """A metric for each of some outputs."""
    known = samples.outputs
    if not metrics or any(name not in known for name in metrics):
        raise ConfigError(
            f"Metrics for {', '.join(map(repr, metrics)) or 'no output'}: the outputs are "
            f"{', '.join(map(repr, known))}."
        )
    parts = []
    for name, metric in metrics.items():
        at = known.index(name)
        part = _make(metric, samples.for_output(name), (reference[at],))
        if part.kind == "function":
            raise ConfigError(f"The metric of {name!r} is a function of a model: pass one of all outputs, or none.")
        parts.append((at, part))
    title = "mean of " + ", ".join(f"{known[k]}: {part.name}" for k, part in parts)
    return Metric(name=title, samples=samples, reference=reference, kind="several", argument=tuple(parts))


def _resolve(metric: Any, samples: Samples, reference: Sequence[Array]) -> tuple[str, str, Any]:
    """(kind, name, argument)."""
    if metric is None:
        decides = reference[0].dtype.kind in "iub" or reference[0].shape[-1] > 1
        metric = "accuracy" if samples.labels is not None else "agreement" if decides else "sqnr"
    if isinstance(metric, str):
        if metric in _NAMES:
            return metric, _NAMES[metric], None
        if (masks := re.fullmatch(r"(mean_iou|pixel_accuracy):(\d+)", metric)) is not None:
            return _resolve(_OF_MASKS[masks[1]](int(masks[2])), samples, reference)
        try:
            metric = keras.metrics.get(metric)
        except ValueError as error:
            raise ConfigError(
                f"Unknown metric {metric!r}: use {', '.join(map(repr, _NAMES))}, mean_iou:CLASSES, "
                "pixel_accuracy:CLASSES, a Keras metric, or a function (model) -> float."
            ) from error
        metric = metric if isinstance(metric, keras.metrics.Metric) else keras.metrics.MeanMetricWrapper(metric)
    if isinstance(metric, keras.metrics.Metric):
        down = getattr(metric, "_direction", "up") == "down"
        return "keras", f"-{metric.name}" if down else metric.name, (type(metric), metric.get_config())
    if isinstance(metric, OutputMetric):
        return "outputs", metric.name, metric
    if not callable(metric):
        raise ConfigError(f"A metric is None, a name, a Keras metric or a function (model) -> float, found {metric!r}.")
    return "function", getattr(metric, "__name__", type(metric).__name__), metric


def _check_labels(samples: Samples, output: Array) -> None:
    """Labels [n, ...] are classes of an output [n, ..., classes], or one-hot; or as an output of integers."""
    labels, classes = samples.labels, output.shape[-1]
    if output.dtype.kind in "iub":
        if np.shape(labels) != output.shape:
            raise CalibrationError(f"Labels {np.shape(labels)} do not fit the output {output.shape} of integers.")
        return
    found = class_indices(labels, output)
    if classes < 2:
        raise ConfigError(
            "Accuracy needs an output with one score per class, and the model gives one number: pass a Keras metric, "
            "e.g. keras.metrics.BinaryAccuracy()."
        )
    if found.shape != output.shape[:-1] or found.min() < 0 or found.max() >= classes:
        raise CalibrationError(
            f"Labels {found.shape} with classes {found.min()}..{found.max()} do not fit the output "
            f"{output.shape}: pass class indices below {classes}, or one-hot labels; for masks with pixels that do "
            f"not count the metric 'pixel_accuracy:{classes}' or 'mean_iou:{classes}'."
        )


def right_classes(labels: Any, output: Array) -> Array:
    """Where an output [n, ..., classes] scores the label's class highest, or is the label where it is integers."""
    if output.dtype.kind in "iub":
        return np.asarray(output == labels)
    return np.asarray(np.argmax(output, -1) == class_indices(labels, output))


def class_indices(labels: Any, output: Array) -> Array:
    """Labels as class indices in the shape of `output` without its last axis, from indices or one-hot."""
    y = np.asarray(labels)
    if output.dtype.kind in "iub":
        return y
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


def _keras(metric: Metric, outputs: Sequence[Array]) -> float:
    output, (kind, settings) = outputs[0], metric.argument
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
_SCORES: dict[str, Callable[[Metric, Sequence[Array]], float]] = {
    "accuracy": lambda m, y: 100 * float(np.mean(right_classes(m.samples.labels, y[0]))),
    "agreement": lambda m, y: 100 * same_decision(y[0], m.reference[0]),
    "sqnr": lambda m, y: sqnr_db(m.reference[0], y[0]),
    "kl": lambda m, y: -kl_divergence(m.reference[0], y[0]),
    "keras": _keras,
    "outputs": lambda m, y: m.argument(m.samples.labels, y),
    "several": lambda m, y: float(np.mean(list(m.by_output(y).values()))),
}
_OF_MASKS = {"mean_iou": mean_iou, "pixel_accuracy": pixel_accuracy}
