"""One experiment after the other: quantize as `quantize_model` does, write the file, score it; and when a score counts.

A difference between two scores on the same n samples counts as a drop where it is larger than two standard errors and
larger than a floor. For metrics that decide sample by sample ("accuracy", "agreement") the standard error is that of
the paired difference, 100 std(right_a - right_b) / sqrt(n) points: with yes-or-no decisions that is the binomial error
of the samples on which the two disagree (McNemar). Other metrics have no such error, and the floor alone decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kquant.config.quant_config import QuantConfig
from kquant.diagnosis.metrics import Metric, right_classes
from kquant.diagnosis.samples import Samples, predict
from kquant.graph.ir import Graph
from kquant.graph.quantized import QuantizedGraph
from kquant.keras.model import insert
from kquant.keras.quantize_model import quantize_to_graph
from kquant.quantize.record import Quantization
from kquant.targets.litert.runtime import TFLiteModel
from kquant.targets.litert.writer import write_tflite
from kquant.targets.target import get_target
from kquant.verify.end_to_end import same_decisions

Array = np.ndarray[Any, Any]
ERRORS = 2.0  # standard errors
# metric -> (floor of a drop, score from which on more is of no use)
FLOORS: Mapping[str, tuple[float, float]] = {
    "accuracy": (0.5, math.inf),  # points
    "agreement": (3.0, math.inf),  # points; samples near a decision boundary flip without a loss of accuracy
    "sqnr": (1.0, 30.0),  # dB; noise 30 dB below the output changes few decisions
    "kl": (0.01, math.inf),  # nats
}
RELATIVE_FLOOR = 0.01  # of the float model's score, for every other metric


@dataclass(frozen=True, eq=False)
class Measured:
    """A score, and what its error is told from.

    Attributes:
        score: higher is better.
        right: per sample how right it is, 0 to 1; None where the metric does not decide sample by sample.
    """

    score: float
    right: Array | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """What a config came to.

    Attributes:
        config: of the real pipeline.
        qgraph, quantization: what it made (see `quantize.quantize_to_graph`).
        content: the file; None for a target that has none.
        measured: score of the file on the interpreter, of the simulation where there is none.
    """

    config: QuantConfig
    qgraph: QuantizedGraph
    quantization: Quantization
    content: bytes | None
    measured: Measured


class FileModel(keras.Model):
    """A .tflite file as a Keras model, for metrics that are functions of one.

    Args:
        content: the file.
        graph: names and types of its inputs, shapes of its outputs.
        kernels: of `TFLiteModel`.
    """

    def __init__(self, content: bytes, graph: Graph, kernels: str = "default", **kwargs: Any) -> None:
        super().__init__(name=kwargs.pop("name", f"{graph.name}_file"), trainable=False, **kwargs)
        self.supports_jit = False  # the interpreter is no TensorFlow operation
        self._file, self._graph = TFLiteModel(content, kernels), graph
        self.built = True

    def call(self, inputs: Any) -> Any:
        """The outputs, real-valued: one tensor, or a list."""
        graph = self._graph
        if isinstance(inputs, Mapping):
            inputs = [inputs[name] for name in graph.input_names]
        feeds = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        feeds = [tf.cast(x, graph[i].dtype) for i, x in zip(graph.inputs, feeds, strict=True)]

        types = [graph[name].dtype for name in graph.outputs]

        def run(*arrays: Array) -> list[Array]:
            return [y.astype(t) for y, t in zip(self._file.predict_batches([list(arrays)]), types, strict=True)]

        outputs = tf.nest.flatten(tf.numpy_function(run, feeds, [tf.as_dtype(t) for t in types]))
        for y, name in zip(outputs, graph.outputs, strict=True):
            y.set_shape(graph[name].shape)
        return outputs[0] if len(outputs) == 1 else outputs


def file_for(metric: Metric, content: bytes, graph: Graph) -> FileModel | TFLiteModel:
    """A file as a metric takes it: users' functions are of Keras models.

    Args:
        metric: what the file is to be scored by.
        content: the file.
        graph: what it was written from.
    """
    return FileModel(content, graph) if metric.kind == "function" else TFLiteModel(content)


class Laboratory:
    """Where configs are tried on one model.

    Args:
        model: the float model.
        metric: from `make_metric`.
        calibration: calibration samples.
        seed: of every pipeline.
        progress: show its progress bars.

    Attributes:
        float_model: the float model, measured.
    """

    def __init__(
        self, model: keras.Model, metric: Metric, calibration: Samples, *, seed: int = 0, progress: bool = True
    ) -> None:
        self.model, self.metric, self.calibration = model, metric, calibration
        self.seed, self.progress = seed, progress
        if metric.kind == "function":
            self.float_model = Measured(metric(model))
        else:
            self.float_model = self._of_outputs(metric.reference)

    def measure(self, model: Any) -> Measured:
        """Score a Keras model or a `TFLiteModel`; one pass over the samples."""
        if self.metric.kind == "function":
            return Measured(self.metric(model))
        return self._of_outputs(predict(model, self.metric.samples))

    def measure_file(self, content: bytes, graph: Graph) -> Measured:
        """Score a file on the interpreter's default kernels."""
        return self.measure(file_for(self.metric, content, graph))

    def _of_outputs(self, outputs: Sequence[Array]) -> Measured:
        return Measured(self.metric.of_outputs(outputs), right_per_sample(self.metric, outputs[0]))

    def threshold(self, a: Measured, b: Measured) -> float:
        """By how much the scores of two networks must differ to count (see the module's docstring)."""
        floor = FLOORS.get(self.metric.kind, (RELATIVE_FLOOR * abs(self.float_model.score), 0.0))[0]
        return max(floor, ERRORS * standard_error(a, b))

    def drop(self, a: Measured, b: Measured) -> float:
        """How much worse b is than a, in the unit of the metric."""
        useful = FLOORS.get(self.metric.kind, (0.0, math.inf))[1]
        return min(a.score, useful) - min(b.score, useful)

    def worse(self, a: Measured, b: Measured) -> bool:
        """Whether b is worse than a by more than noise."""
        return self.drop(a, b) > self.threshold(a, b)

    def quantize(self, config: QuantConfig, calibration: Samples | None = None) -> tuple[QuantizedGraph, Quantization]:
        """The quantized graph of a config and how it was quantized, by the whole pipeline.

        Args:
            config: what to do.
            calibration: other samples than the usual ones.
        """
        data = as_data(calibration or self.calibration)
        return quantize_to_graph(self.model, data, config, self.seed, self.progress, batch_size=32)

    def run(self, config: QuantConfig, calibration: Samples | None = None) -> Outcome:
        """Quantize, write, score.

        Raises:
            ConfigError: the config is impossible for its target.
            ExportError: the target refuses the program.
        """
        qgraph, quantization = self.quantize(config, calibration)
        target = get_target(config.target)
        content = None if target.float_weights else write_tflite(qgraph, target=target)[0]
        if content is not None:
            measured = self.measure_file(content, qgraph.graph)
        else:
            measured = self.measure(insert(qgraph, quantization))
        return Outcome(config=config, qgraph=qgraph, quantization=quantization, content=content, measured=measured)


def right_per_sample(metric: Metric, output: Array) -> Array | None:
    """How right each sample's decisions are, 0 to 1 [n]; None for a metric that does not decide sample by sample."""
    if metric.kind == "accuracy":
        right = right_classes(metric.samples.labels, output)
    elif metric.kind == "agreement":
        right = same_decisions(output, metric.reference[0])
    else:
        return None
    return np.asarray(right.reshape(len(output), -1).mean(-1))


def standard_error(a: Measured, b: Measured) -> float:
    """Of the difference of two scores on the same samples, in points; 0 where it is not known."""
    if a.right is None or b.right is None:
        return 0.0
    return 100 * float(np.std(a.right - b.right)) / math.sqrt(len(a.right))


def as_data(samples: Samples) -> list[list[Array]]:
    """Samples as calibration data."""
    return [list(batch) for batch in samples.batches]
