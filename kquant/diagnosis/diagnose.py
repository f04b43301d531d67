"""`diagnose`: why the accuracy dropped, and what to do."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from kquant.config.quant_config import QuantConfig
from kquant.diagnosis.analysis import channel_ranges
from kquant.diagnosis.case import Case, Results
from kquant.diagnosis.experiments import Laboratory
from kquant.diagnosis.metrics import make_metric
from kquant.diagnosis.pictures import pictures
from kquant.diagnosis.records import Diagnosis
from kquant.diagnosis.samples import read_samples
from kquant.diagnosis.workflow import Workflow
from kquant.errors import ModelError
from kquant.graph.ir import Graph
from kquant.graph.quantized import QuantizedGraph
from kquant.graph.transforms import prepare_graph
from kquant.keras.model import QuantizedModel, extract, insert
from kquant.keras.report import format_report
from kquant.quantize.record import Quantization
from kquant.targets.litert.reader import file_content
from kquant.targets.litert.runtime import TFLiteModel
from kquant.targets.litert.writer import write_tflite

FROM_DATA = 512  # samples of the evaluation data to calibrate with, where there is no calibration data
HELD = 1024  # calibration samples at most, since every experiment reads them again


def diagnose(
    model: keras.Model,
    data: Any,
    metric: Any = None,
    config: QuantConfig | str | os.PathLike[str] | Mapping[str, Any] = "w8a8",
    *,
    calibration_data: Any = None,
    quantized: QuantizedModel | None = None,
    tflite: bytes | str | os.PathLike[str] | None = None,
    samples: int | None = None,
    sensitivity: bool = True,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
) -> Diagnosis:
    """Find out why quantization costs accuracy, and a config that costs less (white paper, figure 9).

    The workflow runs as far as it has to: is the float model sound, does the simulation without quantizers equal it,
    does the file compute what the simulation does, are weights or activations to blame, are grids and calibration
    data as they should be, what do equalization, bias correction, AdaRound, other ranges, more bits bring. Each
    answer is a measurement on all samples: of switched quantizers, or of files that the real pipeline wrote, run by
    the interpreter. So is the score of the recommended config. A difference counts only where it is beyond noise;
    `debug.experiments` has the rule.

    Args:
        model: the float model; it is not modified.
        data: evaluation samples, labelled as (x, y) if possible, of any kind that `quantize_model` takes. They are
            held in memory.
        metric: None, a name, a Keras metric or a function (model) -> float, higher is better (see `debug.metrics`).
            A function is called with Keras models, files included.
        config: what to diagnose, as for `quantize_model`.
        calibration_data: as for `quantize_model`; at most 1,024 samples are used. None takes up to 512
            samples of `data`, and the result says so.
        quantized: an existing result of `quantize_model` to diagnose, with its own config, instead of a new one.
        tflite: an existing file of the quantized model to check, its path or bytes, instead of a new one.
        samples: at most so many of `data`.
        sensitivity: also measure each quantizer alone, of what is to blame: one pass over the samples for each.
        seed: as for `quantize_model`.
        progress: show progress bars.
        checkpoint: a file that holds what was measured of the sensitivity, to resume an interrupted call.
        executor: runs the measurements of the sensitivity.

    Returns:
        The diagnosis: print it, `save_html`, `to_json`.

    Raises:
        ModelError: the model cannot be quantized, its outputs are not finite, or it is quantized already.
        ConfigError: the config or the metric is wrong.
        CalibrationError: the data is missing or does not fit.
        ExportError: `tflite` is no file of this model.
    """
    if isinstance(model, QuantizedModel):
        raise ModelError(f"{model.name!r} is quantized: pass the float model, and this one as quantized=...")
    started = time.monotonic()
    graph = prepare_graph(model)
    evaluation = read_samples(data, graph, limit=samples)
    if calibration_data is None:
        calibration = evaluation.first(FROM_DATA)
    else:
        calibration = read_samples(calibration_data, graph, limit=HELD)
    lab = Laboratory(model, make_metric(metric, evaluation, model), calibration, seed=seed, progress=progress)
    case = _case(lab, QuantConfig.load(config), quantized, tflite)
    case = replace(
        case,
        is_own_calibration=calibration_data is not None,
        sensitivity=sensitivity,
        executor=executor,
        checkpoint=checkpoint,
    )
    found = Workflow(case, progress).run()
    if calibration_data is None:
        found.advice.append(f"Calibrated on {len(calibration)} of the evaluation samples: pass calibration_data.")
    return _diagnosis(case, graph, found, time.monotonic() - started)


def _case(
    lab: Laboratory,
    config: QuantConfig,
    quantized: QuantizedModel | None,
    tflite: bytes | str | os.PathLike[str] | None,
) -> Case:
    """What is diagnosed: quantized here, or as the user has it."""
    expected = None
    if quantized is None:
        qgraph, quantization = lab.quantize(config)
        model = insert(qgraph, quantization)
    else:
        qgraph, quantization, model = extract(quantized), quantized.quantization, quantized
        config = quantization.config
        expected = None if quantization.training is not None else lab.quantize(config)[0]
    if tflite is not None:
        content: bytes | None = file_content(tflite)
    else:
        content = None if model.target.float_weights else write_tflite(qgraph, target=model.target)[0]
    return Case(
        lab=lab,
        config=config,
        model=model,
        qgraph=qgraph,
        quantization=quantization,
        plain=_plain(lab, qgraph, quantization),
        expected=expected,
        content=content,
        is_own_calibration=False,
    )


def _plain(lab: Laboratory, qgraph: QuantizedGraph, quantization: Quantization) -> QuantizedGraph:
    """The graph with the weights as they were before rounding was optimized or biases corrected."""
    taken = quantization.taken
    decided = taken.get("adaround") or taken.get("correct_bias")
    if quantization.training is not None or not decided:
        return qgraph
    before, _ = lab.quantize(replace(quantization.config, adaround=False, correct_bias=False))
    if list(before.graph.nodes) != list(qgraph.graph.nodes):
        return qgraph
    pairs = [(grid, qgraph.weights[name]) for name, grid in before.weights.items()]
    if not taken.get("adaround") and any(a and b and not np.allclose(a.scale, b.scale, rtol=1e-4) for a, b in pairs):
        return qgraph  # of another float model
    return QuantizedGraph(before.graph, qgraph.activations, qgraph.weights)


def _diagnosis(case: Case, graph: Graph, found: Results, seconds: float) -> Diagnosis:
    best, metric = found.best, case.metric
    after = case.qgraph if best is None else best.qgraph
    return Diagnosis(
        model=case.lab.model.name,
        samples=len(metric.samples),
        seconds=seconds,
        metric=metric.name,
        config=case.config.to_dict(),
        float_score=case.lab.float_model.score,
        quantized_score=found.simulation.score,
        target_score=None if found.file is None else found.file.score,
        culprit=found.culprit,
        verdict=found.verdict,
        stages=tuple(found.stages),
        findings=tuple(found.findings),
        sensitivity=tuple(found.sensitivity),
        tensors=found.tensors,
        channels=channel_ranges(graph, after.graph),
        target=found.target,
        recommendation=None if best is None else best.config.to_dict(),
        recommended_score=None if best is None else best.measured.score,
        advice=tuple(found.advice),
        model_report=format_report(case.quantization, case.qgraph),
        pictures=pictures(case.metric, case.model if case.content is None else TFLiteModel(case.content)),
    )
