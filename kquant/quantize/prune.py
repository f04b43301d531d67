"""Pruning: weights that become zero, and others that make up for them.

For a layer with the second moments A of its inputs and the weights t that are best for it (`gram`), the error of its
output is (w - t)^T A (w - t). Optimal brain surgeon (Hassibi and Stork 1993; OBC: arXiv 2208.11580; SparseGPT: arXiv
2301.00774): the weight whose removal costs least has the smallest w_i^2 / [A^-1]_ii, and those that stay solve the
least squares again. Here a share of the weights is removed at a time, with the diagonal of the full inverse, and the
least squares of all columns are solved by conjugate gradients: k^2 m operations a step, where k inputs with a mask of
their own in each of m columns would take k^3 m.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.config.pruning import Prune
from kquant.config.specs import AdaRound
from kquant.errors import ConfigError
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import bias_of, linear_of, op_of, weight_of, weight_view
from kquant.quantize.gram import from_matrices, moments, to_matrices
from kquant.quantize.sensitivity import allowed_errors
from kquant.quantize.tied import tied_weights
from kquant.quantize.walk import Batches, Data, layer_by_layer

Array = np.ndarray[Any, Any]
_ROUNDS = 8
_STEPS = 20  # of conjugate gradients after each round, which start from the last solution
_LAST_STEPS = 60
_PATTERN = {"2:4": (4, 2)}  # of so many consecutive inputs, so many stay


@dataclass(frozen=True, kw_only=True)
class PrunedLayer:
    """What became of one layer.

    Attributes:
        node: its name.
        zeros: the share of its weights that are zero.
        error: expected square of the change of its output, relative to the output's variance; nan without data.
    """

    node: str
    zeros: float
    error: float


def prune(
    graph: Graph, names: Sequence[str], data: Data | None, settings: Prune, *, seed: int = 0, progress: bool = True
) -> tuple[Graph, list[PrunedLayer]]:
    """Set weights of matrix products to zero.

    Layers whose outputs read one channel each have few weights and are left alone; so are weights that several
    operations have.

    Args:
        graph: a float graph, batch normalization folded and activations fused.
        names: the nodes whose weights may be pruned.
        data: representative inputs, re-iterable; None with method="magnitude" and by="uniform" only.
        settings: see `Prune`.
        seed: of the positions, and of what "sensitivity" draws.
        progress: show bars.

    Raises:
        ConfigError: the settings need data, or the pattern does not fit a layer; no layer is left to prune.
    """
    if data is None and (settings.method == "obs" or settings.by == "sensitivity"):
        raise ConfigError(
            f'prune: method="{settings.method}" with by="{settings.by}" looks at what the layers read: pass '
            'calibration_data, or take method="magnitude", by="uniform".'
        )
    names = _prunable(graph, names, settings)
    shares = dict.fromkeys(names, settings.sparsity)
    if settings.by == "sensitivity" and data is not None:
        shares = _by_sensitivity(graph, names, data, settings, seed, progress)
    report: list[PrunedLayer] = []

    def solve(node: Node, batches: Batches) -> Node:
        pruned, error = _by_moments(node, batches, shares[node.name], settings, seed)
        report.append(_row(pruned, error))
        return pruned

    if settings.method == "obs" and data is not None:
        return layer_by_layer(graph, names, data, solve, progress=progress, title="pruning"), report
    pruned = {name: _by_magnitude(graph[name], shares[name], settings) for name in names}
    return graph.rebuild(pruned.get(n.name, n) for n in graph), [_row(n, float("nan")) for n in pruned.values()]


def _prunable(graph: Graph, names: Sequence[str], settings: Prune) -> list[str]:
    tied = tied_weights(graph, names)

    def wanted(node: Node) -> bool:
        kept = settings.keep and re.search(settings.keep, node.origin or node.name)
        fits = settings.pattern is None or weight_view(node).size // (node.shape[-1] or 1) % 4 == 0
        return not (linear_of(node).channelwise or node.name in tied or kept or not fits)

    found = [name for name in names if op_of(graph[name]).matrix and wanted(graph[name])]
    if not found:
        raise ConfigError("prune finds no layer to prune: depthwise, shared and kept layers are left alone.")
    return found


def _row(node: Node, error: float) -> PrunedLayer:
    return PrunedLayer(node=node.name, zeros=float(np.mean(weight_view(node) == 0)), error=error)


def _by_magnitude(node: Node, share: float, settings: Prune) -> Node:
    key = weight_of(node).name
    w = to_matrices(node, node.weights[key])
    alive = np.ones(w.shape, bool)
    for left in _schedule(1, share, settings.pattern):
        alive = removed(np.abs(w), alive, left, settings.pattern)
    return _with_zeros(node.with_weights(**{key: from_matrices(node, w * alive)}))


def _by_moments(node: Node, batches: Batches, share: float, settings: Prune, seed: int) -> tuple[Node, float]:
    """The node with zeros, its other weights, and its bias; and the relative error."""
    defaults = AdaRound()
    key = weight_of(node).name
    w = to_matrices(node, node.weights[key])
    m = moments(node, batches(), positions=defaults.positions, seed=seed)
    target, metric = m.target(w, defaults.damping)
    curvature = 1 / np.diagonal(np.linalg.inv(metric), axis1=1, axis2=2)[:, :, None]
    found, alive = target, w != 0
    for left in _schedule(_ROUNDS, share, settings.pattern):
        alive = removed(np.square(found) * curvature, alive, left, settings.pattern)
        found = least_squares(metric, target, alive, found, _STEPS)
    found = least_squares(metric, target, alive, found, _LAST_STEPS).astype(np.float32)
    error = float(m.loss(found).sum() / max(m.power.sum(), np.finfo(np.float32).tiny))
    changed = {key: from_matrices(node, found), bias_of(node): m.bias(found).astype(np.float32)}
    return _with_zeros(node.with_weights(**changed)), error


def _with_zeros(node: Node) -> Node:
    """The node, which remembers for its training which weights are zero."""
    key = weight_of(node).name
    if key not in node.user:
        return node
    return node.with_(user={**node.user, key: replace(node.user[key], zeros=node.weights[key] == 0)})


def _schedule(rounds: int, share: float, pattern: str | None) -> list[float]:
    """The share of weights that is alive after each round."""
    if pattern is not None:
        size, stay = _PATTERN[pattern]
        return [k / size for k in range(size - 1, stay - 1, -1)]
    return [1 - share * k / rounds for k in range(1, rounds + 1)]


def removed(score: Array, alive: Array, left: float, pattern: str | None = None) -> Array:
    """Which weights are alive when those of the smallest scores are gone.

    Args:
        score: of every weight [groups, k, m].
        alive: which are, of that shape.
        left: the share that is alive afterwards, of all, or of every four consecutive inputs with a pattern.
        pattern: see `Prune`.
    """
    score = np.where(alive, score, -1.0)
    if pattern is None:
        gone = score.size - round(left * score.size)
        order = np.argsort(score, axis=None, kind="stable")
        found = np.ones(score.size, bool)
        found[order[:gone]] = False
        return found.reshape(score.shape) & alive
    size = _PATTERN[pattern][0]
    g, k, m = score.shape
    quads = score.reshape(g, k // size, size, m)
    rank = np.argsort(np.argsort(quads, axis=2, kind="stable"), axis=2, kind="stable")
    return (rank >= size - round(left * size)).reshape(score.shape) & alive


def least_squares(metric: Array, target: Array, alive: Array, start: Array, steps: int) -> Array:
    """min (w - t)^T A (w - t) over weights that are 0 where they are not alive, for every column.

    Conjugate gradients, preconditioned with the diagonal.

    Args:
        metric: A [groups, k, k].
        target: t [groups, k, m].
        alive: of that shape.
        start: weights to begin with.
        steps: at most so many.
    """
    free = alive.astype(np.float64)
    scaling = 1 / np.diagonal(metric, axis1=1, axis2=2)[:, :, None]
    w = start * free
    residual = tf.matmul(metric, target - w).numpy() * free
    z = scaling * residual
    p, rho = z, (residual * z).sum(axis=1, keepdims=True)
    enough = 1e-10 * rho
    for _ in range(steps):
        ap = tf.matmul(metric, p).numpy() * free
        curvature = (p * ap).sum(axis=1, keepdims=True)
        length = np.where(curvature > 0, rho / np.where(curvature > 0, curvature, 1.0), 0.0)
        w, residual = w + length * p, residual - length * ap
        z = scaling * residual
        before, rho = rho, (residual * z).sum(axis=1, keepdims=True)
        if (rho <= enough).all():
            break
        p = z + np.where(before > 0, rho / np.where(before > 0, before, 1.0), 0.0) * p
    return w


def _by_sensitivity(
    graph: Graph, names: Sequence[str], data: Data, settings: Prune, seed: int, progress: bool
) -> dict[str, float]:
    """The share of zeros in each layer, by one threshold of s_c A_kk w^2: what a zero costs the network's outputs."""
    allowed = allowed_errors(graph, names, data, 1.0, seed=seed, progress=progress)
    scores: dict[str, Array] = {}

    def look(node: Node, batches: Batches) -> Node:
        m = moments(node, batches(), positions=AdaRound().positions, seed=seed)
        power = np.diagonal(m.gram, axis1=1, axis2=2)[:, :, None]
        w = to_matrices(node, node.weights[weight_of(node).name])
        scores[node.name] = power * np.square(w) / allowed[node.name].reshape(len(w), 1, -1)
        return node

    layer_by_layer(graph, names, data, look, progress=progress, title="weighing")
    threshold = np.quantile(np.concatenate([s.ravel() for s in scores.values()]), settings.sparsity)
    return {name: float(np.mean(s <= threshold)) for name, s in scores.items()}


def note_of(report: Sequence[PrunedLayer], graph: Graph) -> str:
    """A note for the report."""
    sizes: Mapping[str, int] = {r.node: weight_view(graph[r.node]).size for r in report}
    zeros = sum(r.zeros * sizes[r.node] for r in report) / sum(sizes.values())
    worst = max(report, key=lambda r: r.zeros)
    return f"{100 * zeros:.1f} % zeros in {len(report)} layers, at most {100 * worst.zeros:.1f} % (in {worst.node!r})"
