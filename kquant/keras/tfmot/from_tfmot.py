"""`from_tfmot`: a model trained with TFMOT, as a kquant model of the same integers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kquant.config.quant_config import QuantConfig
from kquant.config.specs import WEIGHTS, Rule
from kquant.errors import MissingPackageError, ModelError
from kquant.graph.backend import check_backend
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import bias_of, op_of, weight_of, weight_view
from kquant.graph.quantized import QuantizedGraph
from kquant.graph.tracing.trace import trace_model
from kquant.graph.transforms.expand_normalization import expand_normalization
from kquant.graph.transforms.fold_batch_norm import fold_batch_norm
from kquant.graph.transforms.fuse_activations import fuse_activations
from kquant.graph.transforms.simplify import absorb_padding, simplify
from kquant.grids.grid import Array, Grid, dequantize, fit_bias, quantize
from kquant.keras.model import Learning, QuantizedModel, insert
from kquant.keras.tfmot.ranges import Grids, activation_grids, float_layers, place_ranges
from kquant.keras.tfmot.saved_model import Range, read_model
from kquant.quantize.calibrate import weight_grids
from kquant.quantize.pipeline import Step, record_of
from kquant.quantize.plan import Plan, make_plan
from kquant.targets.target import get_target

_SCHEME = QuantConfig(
    weights=replace(WEIGHTS, method="min_max"),
    equalize=False,
    absorb_bias=False,
    adaround=False,
    correct_bias=False,
    logits=None,
)
_INSTALL = (
    "Reading a saved TFMOT model needs tensorflow-model-optimization and tf_keras: pip install 'kquant[tfmot]', or "
    "load the model yourself and pass it"
)


@dataclass(frozen=True, eq=False)
class _Kernel:
    """The integers of a kernel and their grid, batch normalization folded, channels as in `weight_view`."""

    integers: Array
    grid: Grid


def from_tfmot(model: Any) -> QuantizedModel:
    """The kquant model that is equivalent to a model quantized by TFMOT: the same ranges, the same integers.

    TFMOT keeps batch normalization behind the quantized kernel. It is folded: with m = gamma / sigma the integers of
    a channel become sign(m) q and its scale |m| scale, as in TensorFlow's converter. Kernels keep their float values,
    from which `kquant.prepare_qat(result)` goes on training. Where TFMOT has no range for a tensor (layers that were
    not annotated), the layer stays float. Where it has none for a kernel alone (that of a convolution or Dense layer
    in front of a ReLU layer), the kernel gets its extremes per channel, as the converter gives it.

    Args:
        model: the tf_keras model that `tfmot.quantization.keras.quantize_model` or `quantize_apply` returned, in the
            default 8-bit scheme, after training; or the path of one that was saved (.h5 or SavedModel). It is not
            modified.

    Returns:
        A Keras 3 model as `kquant.quantize_model` makes it, with the names of the layers that TFMOT wrapped.

    Raises:
        MissingPackageError: a path is given and TFMOT is not installed.
        BackendError: Keras does not run on TensorFlow.
        ModelError: the model is not quantized by TFMOT, has seen no data, or has what cannot be translated.
    """
    check_backend()
    twin = read_model(_load(model) if isinstance(model, str | os.PathLike) else model)
    traced = trace_model(twin.model)
    graph, grids = place_ranges(_prepare(traced), get_target(_SCHEME.target))
    rules = (Rule(name=f"^{re.escape(name)}$", float=True) for name in float_layers(graph, grids))
    config = replace(_SCHEME, rules=tuple(rules))
    plan = make_plan(graph, config)
    qgraph = _with_kernels(plan, activation_grids(plan, grids), _kernels(traced, twin.weights))
    return insert(qgraph, record_of(plan, config, 0, [_step(plan, twin.weights)]), Learning())


def _load(path: str | os.PathLike[str]) -> Any:
    """The saved model, read by legacy Keras."""
    try:
        import tensorflow_model_optimization as tfmot
        import tf_keras
    except ImportError as error:
        raise MissingPackageError(f"{_INSTALL} ({error}).") from error
    with tfmot.quantization.keras.quantize_scope():
        try:
            return tf_keras.models.load_model(os.fspath(path), compile=False)
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(
                f"Cannot read the TFMOT model {os.fspath(path)!r}: {error}. Save it as .h5 or as a SavedModel folder "
                "(TFMOT cannot read back its own .keras files), or load it yourself and pass the model."
            ) from error


def _with_kernels(plan: Plan, activations: Grids, kernels: Mapping[str, _Kernel]) -> QuantizedGraph:
    """The quantized graph: TFMOT's kernels, and min-max grids for those that TFMOT leaves in float."""
    grids = weight_grids(plan) | {name: kernel.grid for name, kernel in kernels.items() if name in plan.weights}
    nodes = {n: _on_integers(plan.graph[n], kernel, keep=n in plan.weights) for n, kernel in kernels.items()}
    weights: dict[str, Grid | None] = {}
    for name, grid in grids.items():
        node = plan.graph[name]
        x = activations[node.inputs[0]] if op_of(node).linear else None
        weights[name] = grid if x is None else fit_bias(grid, node.weights[bias_of(node)], x.scale)
    return QuantizedGraph(plan.graph.rebuild(nodes.get(n.name, n) for n in plan.graph), activations, weights)


def _prepare(graph: Graph) -> Graph:
    """As `prepare_graph`: batch normalization folded, activations fused; other normalizations written out."""
    return expand_normalization(fuse_activations(absorb_padding(simplify(fold_batch_norm(simplify(graph))))))


def _kernels(traced: Graph, ranges: Mapping[str, Range]) -> dict[str, _Kernel]:
    """The quantized kernels by node.

    Args:
        traced: the graph with batch normalizations.
        ranges: layer -> range of its kernel in front of them.
    """
    nodes = [n for n in traced if n.origin in ranges and op_of(n).weight]
    before = {n.name: _grid(n, ranges[n.origin]) for n in nodes}
    steps = {n.name: n.with_weights(kernel=_one_step(n, before[n.name])) for n in nodes}
    folded = _prepare(traced.rebuild(steps.get(n.name, n) for n in traced))
    kernels = {}
    for node in nodes:
        q, axis = before[node.name], weight_of(node).channels
        step = weight_view(folded[node.name])
        signed = np.moveaxis(step, -1 if axis is None else axis, -1)
        signed = signed.reshape(-1, signed.shape[-1])
        if (signed != signed[0]).any():
            raise ModelError(
                f"Layer {node.origin!r}: the batch normalization in front of it cannot be folded without new integers. "
                "Fold it into the layer before, or leave the layer out of the quantization."
            )
        ints = _integers(weight_view(node), q) * _along(np.sign(signed[0]), axis, step.ndim)
        kernels[node.name] = _Kernel(ints.astype(np.int32), _rescaled(q, np.abs(signed[0]), axis))
    return kernels


def _grid(node: Node, found: Range) -> Grid:
    """The grid of a kernel; TFMOT gives a depthwise kernel one scale per multiplier."""
    if found.low.ndim == 0 or found.low.size == 1:
        return Range(found.low.reshape(()), found.high.reshape(()), found.narrow).grid()
    axis = weight_of(node).channels
    repeats = weight_view(node).shape[axis] // found.low.size
    return Range(np.tile(found.low, repeats), np.tile(found.high, repeats), found.narrow).grid(axis)


def _one_step(node: Node, q: Grid) -> Array:
    """A kernel of the node's shape whose every value is one step of its grid."""
    view = weight_view(node)
    return np.broadcast_to(_along(q.scale, q.axis, view.ndim), view.shape).reshape(node.weights["kernel"].shape)


def _along(values: Array, axis: int | None, ndim: int) -> Array:
    return values if axis is None else np.reshape(values, [-1 if k == axis else 1 for k in range(ndim)])


def _integers(kernel: Array, q: Grid) -> Array:
    """floor((clip(w) - low) / scale + 1/2) + qmin, in the float32 steps of TensorFlow's fake_quant kernel."""
    scale = _along(q.scale, q.axis, kernel.ndim)
    low, high = scale * np.float32(q.qmin), scale * np.float32(q.qmax)
    steps = (np.clip(kernel, low, high) - low) * (np.float32(1) / scale)
    return np.asarray(np.floor(steps + np.float32(0.5)).astype(np.int32) + q.qmin)


def _rescaled(q: Grid, scale: Array, axis: int | None) -> Grid:
    """`q` with the scales behind a batch normalization; a channel that this makes zero keeps its scale."""
    scale = np.where(scale > 0, scale, np.broadcast_to(q.scale, scale.shape)).astype(np.float32)
    if q.axis is None and (scale == scale[0]).all():
        return replace(q, scale=scale[0])
    return Grid(scale, np.zeros(scale.shape, np.int32), q.qmin, q.qmax, axis)


def _on_integers(node: Node, kernel: _Kernel, keep: bool) -> Node:
    """The node with a kernel that quantizes to the given integers.

    Args:
        node: the float kernel, batch normalization folded.
        kernel: its integers.
        keep: keep values that give their integer anyway; else every value is that of its integer.
    """
    values = weight_view(node)
    exact = dequantize(kernel.integers, kernel.grid)
    if keep:
        exact = np.where(quantize(values, kernel.grid) == kernel.integers, values, exact)
    return node.with_weights(kernel=exact.astype(np.float32).reshape(node.weights["kernel"].shape))


def _step(plan: Plan, ranges: Mapping[str, Range]) -> Step:
    """What was done, for the report."""
    others = dict.fromkeys(plan.graph[name].origin for name in plan.weights if plan.graph[name].origin not in ranges)
    note = "ranges and integers of a TFMOT model"
    if others:
        note += f"; the weights of {', '.join(others)}, which TFMOT leaves in float, from their extremes"
    return Step(name="from_tfmot", taken=True, note=note)
