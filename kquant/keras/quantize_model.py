"""`quantize_model`: a float Keras model in, a Keras model that simulates the integer model out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras

from kquant.config.quant_config import QuantConfig
from kquant.errors import ModelError
from kquant.graph.backend import check_backend
from kquant.graph.ir import Graph
from kquant.graph.quantized import QuantizedGraph
from kquant.graph.tracing.trace import open_inputs
from kquant.graph.transforms import prepare_graph
from kquant.keras.damage import find_damage, warn_of
from kquant.keras.model import QuantizedModel, insert
from kquant.keras.widen import ROUNDS, step, to_widen
from kquant.quantize.data import CalibrationData
from kquant.quantize.pipeline import quantize_after_training
from kquant.quantize.record import Damage, Quantization
from kquant.targets.target import get_target

InputShape = Sequence[int] | Mapping[str, Sequence[int]] | None


def quantize_model(
    model: keras.Model,
    calibration_data: Any = None,
    config: QuantConfig | str | os.PathLike[str] | Mapping[str, Any] = "w8a8",
    *,
    seed: int = 0,
    progress: bool = True,
    batch_size: int = 32,
    input_shape: InputShape = None,
) -> QuantizedModel:
    """Quantize a trained float model after training (section 3 of the white paper).

    The model is traced into a graph, batch normalization folded and activations fused; then come the steps of
    figure 8 (`ptq.pipeline`), each where the config wants it, or where it helps: equalize channels across layers,
    absorb high biases, weight ranges, AdaRound or bias correction, activation ranges. At last the quantizers
    are inserted. The model itself is not modified; what was done and why is in the `report` of the result, and what
    quantization destroys: a tensor whose simulated values are lost in noise gives a `QuantizationWarning`.

    Args:
        model: a built Keras model: Sequential, Functional (nested, shared layers, several inputs
            and outputs) or subclassed with a `call` that traces to a graph.
        calibration_data: representative inputs, preprocessed as for the model: arrays, a dict of
            arrays, a tf.data.Dataset, a keras PyDataset or an iterable of batches, with or without
            labels. A few hundred samples are enough. None quantizes without data: activation ranges then come
            from the statistics of batch normalizations; where there are none, an error names the tensors.
        config: preset name ("w8a8", "w4a8-per_tensor", ...), QuantConfig, dict, or a YAML or JSON file.
        seed: of what draws at random (the positions that AdaRound looks at); the same model, data, config and seed
            give the same result.
        progress: show progress bars.
        batch_size: batch size for calibration data given as arrays.
        input_shape: shape of a sample where the model leaves sizes open, such as (None, None, 3), or a dict by input
            name; by default that of the calibration data. A file has fixed sizes.

    Returns:
        A functional Keras model with the same inputs and outputs, whose values are on the grids of
        the target. It saves and loads as a `.keras` file; `kquant.export_tflite` writes it.

    Raises:
        BackendError: Keras does not run on TensorFlow.
        ConfigError: the config is wrong or impossible for its target.
        ModelError: the model cannot be traced or has weights that are not finite.
        CalibrationError: the data is missing, empty, of the wrong shape, or not finite.
    """
    if isinstance(model, QuantizedModel):
        raise ModelError(f"{model.name!r} is already quantized: pass the float model that it was made from.")
    check_backend()
    graph, data = _prepared(model, calibration_data, batch_size, input_shape)
    settings = QuantConfig.load(config)

    def quantized(wide: frozenset[str]) -> tuple[QuantizedModel, Graph]:
        qgraph, quantization, reference = quantize_after_training(
            graph, settings, data, seed=seed, progress=progress, wide=wide
        )
        qmodel = insert(qgraph, quantization)
        if data is not None and data.sample is not None:
            damage = find_damage(qmodel, qgraph, reference, data.sample)
            qmodel.record = replace(qmodel.record, quantization=replace(quantization, damage=damage))
        return qmodel, qgraph.graph

    qmodel, widened = _widened(quantized, settings, data is not None and data.repeatable)
    warn_of(qmodel.quantization.damage, widened, model.name)
    return qmodel


def _widened(
    quantized: Callable[[frozenset[str]], tuple[QuantizedModel, Graph]], config: QuantConfig, again: bool
) -> tuple[QuantizedModel, str]:
    """The model in which tensors that 8 bits destroy have 16, as far as that helps, and which these are.

    Args:
        quantized: quantizes with given tensors in 16 bits.
        config: whether to widen, and for which target.
        again: the data can be read again.
    """
    wide: frozenset[str] = frozenset()
    mended: tuple[Damage, ...] = ()
    qmodel, graph = quantized(wide)
    for _ in range(ROUNDS if config.widen and again else 0):
        damage = qmodel.quantization.damage
        more = to_widen(graph, damage, get_target(config.target)) - wide
        if not more:
            break
        trial, trial_graph = quantized(wide | more)
        if len(trial.quantization.damage) >= len(damage):
            break
        wide, mended, qmodel, graph = wide | more, (*mended, *damage), trial, trial_graph
    if not wide:
        return qmodel, ""
    said, record = step(graph, mended, wide), qmodel.quantization
    qmodel.record = replace(qmodel.record, quantization=replace(record, steps=(*record.steps, said)))
    return qmodel, said.note


def quantize_to_graph(
    model: keras.Model,
    calibration_data: Any,
    config: QuantConfig,
    seed: int,
    progress: bool,
    batch_size: int,
    for_training: bool = False,
    input_shape: InputShape = None,
) -> tuple[QuantizedGraph, Quantization]:
    """The quantized graph of a float model, and how it was quantized; see `quantize_model` and `trace_model`."""
    check_backend()
    graph, data = _prepared(model, calibration_data, batch_size, input_shape, for_training)
    return quantize_after_training(graph, config, data, seed=seed, progress=progress)[:2]


def _prepared(
    model: keras.Model, source: Any, batch_size: int, input_shape: InputShape, for_training: bool = False
) -> tuple[Graph, CalibrationData | None]:
    """The graph of a model and the data for it, from which come the sizes that the model leaves open."""
    still_open = open_inputs(model)
    shapes = _by_name(input_shape, [name for name, _, _ in still_open])
    data = None
    if still_open and not shapes and source is not None:
        data = CalibrationData(source, still_open, batch_size=batch_size)
        shapes = data.sizes()
    graph = prepare_graph(model, for_training, shapes)
    if source is None:
        return graph, None
    names = zip(graph.inputs, graph.input_names, strict=True)
    specs = [(name, graph[node].shape, graph[node].dtype) for node, name in names]
    return graph, CalibrationData(source, specs, batch_size=batch_size) if data is None else data.of(specs)


def _by_name(shape: InputShape, names: Sequence[str]) -> Mapping[str, Sequence[int]]:
    """Input -> shape; one shape is that of the only input.

    Raises:
        ModelError: it is one shape, and there are several inputs, or it names another input.
    """
    if shape is None:
        return {}
    if not isinstance(shape, Mapping):
        if len(names) != 1:
            raise ModelError(f"input_shape={tuple(shape)} is that of one input with open sizes; found {list(names)}.")
        return {names[0]: tuple(shape)}
    if unknown := sorted(shape.keys() - set(names)):
        raise ModelError(f"input_shape names {unknown}; the inputs are {list(names)}.")
    return dict(shape)
