"""Empirical bias correction (white paper section 3.3; Nagel et al. 2019, arXiv 1906.04721).

Rounded weights shift the mean of a layer's output. For each output channel the shift is taken out of the bias,

    b := b + E[W x] - E[W_q x_hat],

with x the input in the float network and x_hat the input in the network whose earlier layers are quantized and
corrected, and E over samples and positions, before the activation.

A linear operation commutes with the mean over samples, so only the mean of x (an "image") is collected, in float64,
and the operation itself, with its padding, runs once on it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Graph, Node
from kquant.graph.ops import bias_of, compute, op_of, weight_of, weight_view, without_clip
from kquant.grids.grid import Grid, fake_quantize
from kquant.quantize.walk import Batches, Data, layer_by_layer

_SPREAD_SAMPLES = 8  # the report's unit needs no precision


def correct_biases(
    graph: Graph,
    weights: Mapping[str, Grid],
    data: Data,
    *,
    progress: bool = True,
    memory: int = 1 << 30,
) -> tuple[Graph, dict[str, float]]:
    """Round the kernels of linear operations to their grids and correct the biases.

    Args:
        graph: a float graph, batch normalization folded and activations fused.
        weights: node -> grid of its kernel (see `graph.ops.weight_view`); other nodes than convolutions and dense
            layers are ignored, layers without an entry stay as they are.
        data: a `CalibrationData`, or any re-iterable of tuples of arrays [n, ...], one per graph input.
        progress: show a bar.
        memory: bytes for the tensors held between the layers, about.

    Returns:
        The graph with kernels on their grids and corrected biases, and for each corrected node the largest
        |correction| over the channels, in standard deviations of the node's float output (all channels together,
        before its activation, over the first samples).

    Raises:
        CalibrationError: the data is empty, or a tensor is not finite.
    """
    names = [n.name for n in graph if op_of(n).matrix and n.name in weights]
    shifts: dict[str, float] = {}

    def solve(node: Node, batches: Batches) -> Node:
        fixed, shifts[node.name] = _correct(node, weights[node.name], batches)
        return fixed

    result = layer_by_layer(graph, names, data, solve, memory=memory, progress=progress, title="correcting biases")
    return result, shifts


def _correct(node: Node, grid: Grid, batches: Batches) -> tuple[Node, float]:
    """The node with a rounded kernel and a corrected bias, and the size of the correction."""
    mean, mean_hat, first = _means(batches)
    rounded = round_kernel(node, grid)
    axes = tuple(range(mean.ndim - 1))
    correction = (accumulator(node, mean) - accumulator(rounded, mean_hat)).mean(axes)
    bias = (node.weights[bias_of(node)] + correction).astype(np.float32)
    spread = float(accumulator(node, first).std())
    return rounded.with_weights(**{bias_of(node): bias}), float(np.abs(correction).max()) / max(spread, 1e-12)


def round_kernel(node: Node, grid: Grid) -> Node:
    """The node with its kernel on `grid`, rounded to nearest."""
    name = weight_of(node).name
    kernel = node.weights[name]
    return node.with_weights(**{name: fake_quantize(weight_view(node), grid).reshape(kernel.shape)})


def accumulator(node: Node, x: np.ndarray) -> np.ndarray:
    """Output [n, ...] of a linear operation before its activation, in the precision of the input x [n, ...]."""
    weights = {k: tf.constant(w, x.dtype) for k, w in node.weights.items()}
    return np.asarray(compute(without_clip(node), [tf.constant(x)], weights))


def _means(batches: Batches) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of x and of x_hat over the samples [1, ...] in float64, and the first few samples of x."""
    firsts: list[np.ndarray] = []
    total, total_hat, count = np.zeros(1), np.zeros(1), 0
    for x, x_hat in batches():
        firsts = firsts or [x.numpy()[:_SPREAD_SAMPLES]]
        part = _sum(x)
        total = total + part
        total_hat = total_hat + (part if x_hat is x else _sum(x_hat))
        count += len(x)
    return total / count, total_hat / count, firsts[0]


def _sum(x: tf.Tensor) -> np.ndarray:
    return np.asarray(tf.reduce_sum(x, 0, keepdims=True), np.float64)
