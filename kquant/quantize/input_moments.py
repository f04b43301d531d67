"""Mean, standard deviation and range of a model's image inputs, from its first batch normalization.

The statistics that the first layer's batch normalization learned say what its training images were: with kernel W_c
and bias b_c, mean_c = m sum(W_c) + b_c gives the mean m of a pixel, and var_c = W_c' C W_c gives the scale of the
covariance C of a patch. C is taken as a nonnegative combination of three covariances of unit variance,

    white noise,  0.9^distance in all colours alike,  0.9^distance in every colour on its own

of which images are made (Field 1987: neighbouring pixels are alike). Both are least squares over the channels.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from kquant.graph.ir import Graph, Node
from kquant.graph.moments import Moments
from kquant.graph.ops import bias_of, op_of, pads_zeros, weight_of
from kquant.quantize.moments import linear_mean

Array = np.ndarray[Any, Any]

COLOURS = 3  # other inputs, e.g. spectra, are not distributed as images are
REACH = 2.5  # standard deviations from the mean to the darkest and brightest pixel
NEIGHBOURS = 0.9  # correlation of pixels beside each other


def estimate_inputs(graph: Graph) -> dict[str, Moments]:
    """Moments of those inputs that are colour images and that a batch-normalized convolution reads.

    Args:
        graph: a float graph, batch normalization folded.

    Returns:
        Input -> moments, `low` and `high` being mean -+ `REACH` std, alike in all colours. Inputs that are no
        images [None, h, w, 3], or whose first layer carries no statistics, are not in it.
    """
    found = {}
    for name in graph.inputs:
        if len(graph[name].shape) == 4 and graph[name].shape[-1] == COLOURS and graph[name].dtype == "float32":
            layer = _first_layer(graph, name)
            moments = None if layer is None else _fit(graph, layer)
            if moments is not None:
                found[name] = moments
    return found


def _first_layer(graph: Graph, name: str) -> Node | None:
    """The convolution with statistics that reads a tensor, directly or behind zero padding."""
    for reader in graph.consumers(name):
        if _is_convolution(reader) and {"mean", "std"} <= reader.stats.keys():
            return reader
        if pads_zeros(reader):
            layer = _first_layer(graph, reader.name)
            if layer is not None:
                return layer
    return None


def _is_convolution(node: Node) -> bool:
    """Whether each output reads windows of all channels."""
    linear = op_of(node).linear
    return linear is not None and linear.window and not linear.transposed and linear.groups(node) == 1


def _fit(graph: Graph, layer: Node) -> Moments | None:
    """The least squares; None where too few channels do anything."""
    kernel = layer.weights[weight_of(layer).name].astype(np.float64)
    mean, std = (layer.stats[k].astype(np.float64) for k in ("mean", "std"))
    live = (std > 1e-6 * std.max()) & (np.abs(kernel).max((0, 1, 2)) > 0)
    if live.sum() < COLOURS:
        return None
    kernel, std = kernel[..., live] / std[live], std[live]  # each channel counts alike
    a = linear_mean(layer, kernel, np.ones(COLOURS), graph[layer.inputs[0]].shape)
    b = (mean - layer.weights[bias_of(layer)])[live] / std
    quadratic = np.stack([_variance(kernel, c) for c in _covariances(*kernel.shape[:2])], 1)
    parts = nonnegative_least_squares(quadratic, np.ones(len(std)))
    if not (parts.sum() > 0 and a @ a > 0):
        return None
    ones = np.ones(COLOURS)
    return Moments.normal(ones * (a @ b) / (a @ a), ones * np.sqrt(parts.sum()), REACH)


def _covariances(height: int, width: int) -> list[Array]:
    """Covariances of a patch [h * w * 3, h * w * 3]."""
    y, x, colour = (v.reshape(-1, 1) for v in np.indices((height, width, COLOURS)))
    near = NEIGHBOURS ** np.hypot(y - y.T, x - x.T)
    return [np.eye(len(near)), near, near * (colour == colour.T)]


def _variance(kernel: Array, covariance: Array) -> Array:
    """Variance of the outputs of a convolution [channels]."""
    w = kernel.reshape(-1, kernel.shape[-1])
    return np.asarray((w * (covariance @ w)).sum(0))


def nonnegative_least_squares(a: Array, b: Array) -> Array:
    """The x >= 0 that minimizes |a x - b|^2, among the solutions of all subsets of columns.

    Args:
        a: [equations, unknowns], a handful of unknowns.
        b: [equations].
    """
    unknowns = a.shape[1]
    best, least = np.zeros(unknowns), float(b @ b)
    for size in range(1, unknowns + 1):
        for columns in itertools.combinations(range(unknowns), size):
            x = np.zeros(unknowns)
            x[list(columns)] = np.linalg.lstsq(a[:, columns], b, rcond=None)[0]
            error = float(np.square(a @ x - b).sum())
            if (x >= 0).all() and error < least:
                best, least = x, error
    return best
