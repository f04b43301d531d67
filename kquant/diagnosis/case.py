"""What is diagnosed (`Case`), what was found so far (`Results`), and small facts of both."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from os import PathLike

import numpy as np

from kquant.config.quant_config import QuantConfig
from kquant.diagnosis.experiments import Laboratory, Measured, Outcome
from kquant.diagnosis.metrics import Metric, class_indices
from kquant.diagnosis.records import Finding, Sensitivity, Stage, TargetRecord, TensorRecord
from kquant.diagnosis.samples import Samples
from kquant.diagnosis.switches import WEIGHTS, Quantizer
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.keras.model import QuantizedModel
from kquant.quantize.record import Quantization


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """What is diagnosed.

    Attributes:
        lab: where it is measured.
        config: the config in question.
        model, qgraph, quantization: the quantized model, what it computes, how it was quantized.
        plain: the float network with the same tensors and grids: weights as they were before AdaRound or bias
            correction, so that with all quantizers off it is the float model.
        expected: the graph that the config gives on the calibration data, for a model that the user passed.
        content: the file, None where there is none.
        is_own_calibration: the calibration data is not a part of the evaluation data.
        executor, checkpoint, sensitivity: as for `diagnose`.
    """

    lab: Laboratory
    config: QuantConfig
    model: QuantizedModel
    qgraph: QuantizedGraph
    quantization: Quantization
    plain: QuantizedGraph
    expected: QuantizedGraph | None
    content: bytes | None
    is_own_calibration: bool
    sensitivity: bool = True
    executor: Executor | None = None
    checkpoint: str | PathLike[str] | None = None

    @property
    def metric(self) -> Metric:
        """What is measured."""
        return self.lab.metric


@dataclass(eq=False, kw_only=True)
class Results:
    """What the workflow has found so far; see `Diagnosis`."""

    simulation: Measured
    culprit: str = "none"
    verdict: str = ""
    file: Measured | None = None
    best: Outcome | None = None
    stages: list[Stage] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    sensitivity: list[Sensitivity] = field(default_factory=list)
    tensors: tuple[TensorRecord, ...] = ()
    target: tuple[TargetRecord, ...] = ()
    advice: list[str] = field(default_factory=list)


def majority(metric: Metric) -> float:
    """The share of the commonest class: what a model that knows nothing can reach."""
    labels = class_indices(metric.samples.labels, metric.reference[0])
    return float(np.bincount(labels.astype(np.int64).ravel()).max() / labels.size)


def grids(qgraph: QuantizedGraph, quantizers: Sequence[Quantizer]) -> dict[str, Grid | None]:
    """Quantizer -> its grid in a graph, if it has one."""
    return {q.name: (qgraph.weights if q.kind == WEIGHTS else qgraph.activations).get(q.node) for q in quantizers}


def extremes(samples: Samples) -> list[tuple[float, float]]:
    """The smallest and largest value of each input."""
    return [
        (float(min(map(np.min, column))), float(max(map(np.max, column))))
        for column in zip(*samples.batches, strict=True)
    ]
