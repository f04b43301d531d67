"""Steps of weights from the sensitivity of the network's outputs: one number, the divergence, decides all of them.

A weight on a grid of step d has an error of variance d^2 / 12. In the output of its channel c that is A_kk d^2 / 12,
with A the second moments of the layer's inputs, and in the outputs of the network a Kullback-Leibler divergence of s_c
times that, with s_c half the Fisher information of the channel, summed over its positions. Rate theory wants every
weight to cost the same, `divergence` / N for N weights ("water filling": the rate of a coder falls by one bit where a
step doubles, whatever the step):

    step_c = sqrt(12 divergence / (N s_c mean_k A_kk))

Fisher information: E (d log p / d y)^2 with labels drawn from the network's own p; for outputs that are no
probabilities p is a normal distribution around them, with the deviation that they have over the data. Sampled so it is
noisy: channels are shrunk halfway to their layer's mean, and the last layer's, of which a class is drawn once or never,
have the mean. And it is local: a layer's is corrected by the divergence that 4-bit weights in it alone cause.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from kquant.graph.ir import Graph, Node, sample_size
from kquant.graph.ops import bias_of, clip_of, compute, evaluate, op_of, weight_of, weight_view, without_clip
from kquant.grids.grid import Grid, valid_scale
from kquant.quantize.gram import Moments

Array = np.ndarray[Any, Any]
Tensor = Any
FISHER_SAMPLES = 256
TRIAL_SAMPLES = 128
_MEMORY = 256 << 20  # bytes of activations at once
_TRIAL_LEVELS = 7  # the largest integer of the trial's weights
_CORRECTION = 16.0  # of a layer's Fisher information, at most, either way
_TINY = 1e-30


def allowed_errors(
    graph: Graph,
    weights: Sequence[str],
    data: Iterable[Sequence[Array]],
    divergence: float,
    *,
    seed: int = 0,
    **bar: Any,
) -> dict[str, Array]:
    """What the steps of weights follow from, see `with_steps`.

    Args:
        graph: a float graph.
        weights: matrix products whose weights are to be quantized.
        data: representative inputs, re-iterable: tuples of arrays [n, ...], one per graph input.
        divergence: that rounding to nearest may cost, in nats a sample.
        seed: of the labels that are drawn.
        bar: progress=False shows no bar.

    Returns:
        Node -> 12 divergence / (N s_c) [channels].
    """
    heads, outputs = _heads(graph, weights), _Outputs.of(graph)
    found = _fisher(graph, weights, data, outputs, seed)
    count = sum(weight_view(graph[name]).size for name in weights)
    allowed = {}
    for name in tqdm(weights, desc="sensitivity", unit="layer", disable=not bar.get("progress", True), leave=False):
        s = found[name]
        s = np.full_like(s, s.mean()) if name in heads else (s + s.mean()) / 2
        s = s * _correction(graph, name, s, data, outputs)
        allowed[name] = 12 * divergence / (count * np.maximum(s, _TINY))
    return allowed


def with_steps(grid: Grid, allowed: Array, m: Moments, largest: Array) -> Grid:
    """The grid with the steps that allowed errors and the second moments of the inputs give.

    A step is no larger than the largest weight, so that no channel becomes zero, and no smaller than the grid needs to
    reach it.

    Args:
        grid: uniform and symmetric.
        allowed: of the layer, from `allowed_errors`.
        m: the moments of its inputs.
        largest: max |w| of every channel [groups, outputs of the group].
    """
    groups = len(m.gram)
    power = np.diagonal(m.gram, axis1=1, axis2=2).mean(axis=1)
    squares = allowed.reshape(groups, -1) / np.maximum(power, _TINY)[:, None]
    squares, most = squares.reshape(-1), largest.reshape(-1)
    if grid.axis is None:
        squares, most = 1 / np.mean(1 / squares), most.max()
    scale = np.minimum(np.maximum(np.sqrt(squares), most / grid.qmax), most)
    return replace(grid, scale=valid_scale(np.asarray(scale)))


@dataclass(frozen=True, eq=False)
class _Outputs:
    """The outputs of a network, and how they are compared.

    Attributes:
        names: the nodes; of outputs that are integers (a mask of classes) the numbers that decide them.
        softmax: which of them are probabilities over their last axis.
    """

    names: tuple[str, ...]
    softmax: tuple[bool, ...]

    @classmethod
    def of(cls, graph: Graph) -> _Outputs:
        names = tuple(dict.fromkeys(n for output in graph.outputs for n in _numbers(graph, output)))
        return cls(names, tuple(_is_softmax(graph, graph[n]) for n in names))

    def likelihood(self, values: Sequence[Tensor], rng: np.random.Generator) -> Tensor:
        """A function whose gradients, squared, are the Fisher information in expectation."""
        total = 0.0
        for y, softmax in zip(values, self.softmax, strict=True):
            if softmax:
                p = y.numpy().reshape(-1, y.shape[-1]).astype(np.float64)
                drawn = (np.cumsum(p, axis=1) > rng.random((len(p), 1)) * p.sum(axis=1, keepdims=True)).argmax(axis=1)
                rows = tf.reshape(y, (-1, y.shape[-1]))
                total += tf.reduce_sum(tf.math.log(tf.gather(rows, drawn, batch_dims=1) + _TINY))
            else:
                noise = rng.normal(size=y.shape) / max(float(tf.math.reduce_std(y)), _TINY)
                total += tf.reduce_sum(y * noise.astype(np.float32))
        return total

    def divergence(self, wanted: Sequence[Array], found: Sequence[Array]) -> float:
        """Summed over the samples."""
        total = 0.0
        for p, q, softmax in zip(wanted, found, self.softmax, strict=True):
            p, q = p.astype(np.float64), q.astype(np.float64)
            if softmax:
                total += float((p * np.log((p + _TINY) / (q + _TINY))).sum())
            else:
                total += float(np.square((p - q) / max(p.std(), _TINY)).sum() / 2)
        return max(total, 0.0)


def _numbers(graph: Graph, name: str) -> Iterator[str]:
    """A node of numbers itself, or those that a node of integers was made of."""
    if graph[name].dtype == "float32":
        if graph[name].op != "const":
            yield name
        return
    for source in graph[name].inputs:
        yield from _numbers(graph, source)


def _is_softmax(graph: Graph, node: Node) -> bool:
    while node.op == "reshape" and graph[node.inputs[0]].shape[-1] == node.shape[-1]:
        node = graph[node.inputs[0]]
    return node.op == "softmax"


def _heads(graph: Graph, names: Sequence[str]) -> set[str]:
    """Those behind which no other comes."""
    behind: dict[str, bool] = {}
    for node in reversed(list(graph)):
        behind[node.name] = any(behind[r.name] or op_of(r).matrix for r in graph.consumers(node.name))
    return {name for name in names if not behind[name]}


def _slices(graph: Graph, data: Iterable[Sequence[Array]], limit: int) -> Iterator[list[Array]]:
    """The first samples, a few at once."""
    step = max(1, _MEMORY // (8 * sum(sample_size(node) for node in graph)))
    seen = 0
    for batch in data:
        for k in range(0, len(batch[0]), step):
            part = [np.asarray(x[k : k + min(step, limit - seen)]) for x in batch]
            yield part
            seen += len(part[0])
            if seen >= limit:
                return


def _fisher(
    graph: Graph, names: Sequence[str], data: Iterable[Sequence[Array]], outputs: _Outputs, seed: int
) -> dict[str, Array]:
    """Node -> half the Fisher information of its channels, before its activation, summed over its positions."""
    rng = np.random.default_rng(seed)
    total, seen = {n: np.zeros(graph[n].shape[-1] or 1) for n in names}, 0
    starts = {n.name: {k: tf.constant(w) for k, w in n.weights.items()} for n in graph}
    graph = graph.rebuild(n.with_(weights=starts[n.name]) for n in graph)
    for batch in _slices(graph, data, FISHER_SAMPLES):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([starts[n][bias_of(graph[n])] for n in names])
            values = evaluate(graph, [tf.constant(x) for x in batch], [*names, *outputs.names])
            likelihood = outputs.likelihood(values[len(names) :], rng)
        slopes = tape.gradient(likelihood, values[: len(names)], unconnected_gradients="zero")
        for name, y, slope in zip(names, values, slopes, strict=False):
            lo, hi = clip_of(graph[name])
            open_ = (y > (-np.inf if lo is None else lo)) & (y < (np.inf if hi is None else np.asarray(hi, np.float32)))
            squares = tf.where(open_, tf.square(slope), 0.0)
            total[name] += tf.reduce_sum(tf.reshape(squares, (-1, y.shape[-1])), 0).numpy()
        seen += len(batch[0])
    return {name: t / (2 * seen) for name, t in total.items()}


def _correction(graph: Graph, name: str, s: Array, data: Iterable[Sequence[Array]], outputs: _Outputs) -> float:
    """The divergence that 4-bit weights of one layer cause, over what its Fisher information says."""
    node, key, bias = graph[name], weight_of(graph[name]).name, bias_of(graph[name])
    rounded = node.with_weights(**{key: _trial(node)})
    measured = predicted = 0.0
    for batch in _slices(graph, data, TRIAL_SAMPLES):
        feeds = [tf.constant(x) for x in batch]
        x, *wanted = (np.asarray(v) for v in evaluate(graph, feeds, [node.inputs[0], *outputs.names]))
        error = np.asarray(compute(without_clip(rounded), [x])) - np.asarray(compute(without_clip(node), [x]))
        error = error.reshape(-1, error.shape[-1]).astype(np.float64)
        shift = error.mean(axis=0)
        changed = rounded.with_weights(**{bias: (node.weights[bias] - shift).astype(np.float32)})
        found = evaluate(graph.rebuild(changed if n is node else n for n in graph), feeds, outputs.names)
        measured += outputs.divergence(wanted, [np.asarray(v) for v in found])
        predicted += len(batch[0]) * float(s @ error.var(axis=0))
    if not predicted > 0 or not measured > 0:
        return 1.0
    return float(np.clip(measured / predicted, 1 / _CORRECTION, _CORRECTION))


def _trial(node: Node) -> Array:
    """The weights with 15 levels per channel, rounded to nearest."""
    view, axis = weight_view(node), weight_of(node).channels
    others = tuple(k for k in range(view.ndim) if k != axis)
    step = np.abs(view).max(axis=others, keepdims=True) / _TRIAL_LEVELS
    steps = np.rint(view / np.where(step > 0, step, 1.0))
    return (steps * step).astype(np.float32).reshape(node.weights[weight_of(node).name].shape)
