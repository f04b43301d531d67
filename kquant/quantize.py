"""`quantize_model`: a float Keras model in, a Keras model that simulates the integer model out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras

from kquant.backend import check_backend
from kquant.calibrate import quantize_graph
from kquant.config import QuantConfig
from kquant.data import CalibrationData
from kquant.errors import CalibrationError, ModelError
from kquant.graph.ir import Graph
from kquant.insert import QuantizedModel, insert
from kquant.plan import Plan, make_plan
from kquant.qgraph import QuantizedGraph
from kquant.report import layer_rows
from kquant.transforms import prepare_graph
from kquant.transforms.equalize import equalize


def quantize_model(
    model: keras.Model,
    calibration_data: Any = None,
    config: QuantConfig | str | os.PathLike[str] | Mapping[str, Any] = "w8a8",
    *,
    seed: int = 0,
    progress: bool = True,
    batch_size: int = 32,
) -> QuantizedModel:
    """Quantize a trained float model after training (section 3 of the white paper).

    The steps: trace the model into a graph, fold batch normalization, fuse activations, equalize the
    channels across layers if the config says so, plan the
    grids that the target allows, set weight ranges, set activation ranges from the calibration
    data, and insert the quantizers. The model itself is not modified.

    Args:
        model: a built Keras model: Sequential, Functional (nested, shared layers, several inputs
            and outputs) or subclassed with a `call` that traces to a graph.
        calibration_data: representative inputs, preprocessed as for the model: arrays, a dict of
            arrays, a tf.data.Dataset, a keras PyDataset or an iterable of batches, with or without
            labels. A few hundred samples are enough. Not needed for weight-only configs.
        config: preset name ("w8a8", "w4a8-per_tensor", ...), QuantConfig, dict, or a YAML or JSON file.
        seed: recorded with the model. No step draws at random yet: the same model, data and config give
            the same result under every seed.
        progress: show progress bars.
        batch_size: batch size for calibration data given as arrays.

    Returns:
        A functional Keras model with the same inputs and outputs, whose values are on the grids of
        the target. It saves and loads as a `.keras` file; `kquant.export_tflite` writes it.

    Raises:
        BackendError: Keras does not run on TensorFlow.
        ConfigError: the config is wrong or impossible for its target.
        ModelError: the model cannot be traced or has weights that are not finite.
        CalibrationError: the data is missing, empty, of the wrong shape, or not finite.
    """
    check_backend()
    if isinstance(model, QuantizedModel):
        raise ModelError(f"{model.name!r} is already quantized: pass the float model that it was made from.")
    config = QuantConfig.load(config)
    graph = prepare_graph(model)
    if config.equalize:
        graph, _ = equalize(graph)
    plan = make_plan(graph, config)
    data = _calibration_data(plan, graph, calibration_data, batch_size)
    qgraph = quantize_graph(plan, data, progress)
    return insert(qgraph, _facts(plan, qgraph, config, seed))


def _calibration_data(plan: Plan, graph: Graph, source: Any, batch_size: int) -> CalibrationData | None:
    """The data, checked; None where no tensor needs any."""
    if not plan.observed:
        return None
    if source is None:
        raise CalibrationError(
            f"{len(plan.observed)} activation tensors need ranges (the first is {next(iter(plan.observed))!r}): pass "
            "calibration_data, a few hundred preprocessed samples, or a weight-only config such as 'w8'."
        )
    names = zip(graph.inputs, graph.input_names, strict=True)
    specs = [(name, graph[node].shape, graph[node].dtype) for node, name in names]
    return CalibrationData(source, specs, batch_size=batch_size)


def _facts(plan: Plan, qgraph: QuantizedGraph, config: QuantConfig, seed: int) -> dict[str, Any]:
    """What the quantized model remembers, JSON-able."""
    return {
        "target": plan.target.name,
        "config": config.to_dict(),
        "seed": seed,
        "layers": layer_rows(plan, qgraph),
        "float": [{"node": s.node, "layer": s.layer, "reason": s.reason} for s in plan.skipped],
    }
