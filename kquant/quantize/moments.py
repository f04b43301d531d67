"""Mean, standard deviation and reach of every tensor, channel by channel and without data.

A folded batch normalization leaves the mean and the standard deviation of its pre-activation behind (`Node.stats`).
From there the moments travel: through a clip by the closed form of the clipped normal distribution (white paper
section 3.3; Nagel et al. 2019, arXiv 1906.04721, appendix C), through linear operations by linearity, through other
functions by numerical integration. Channels are the entries of the last axis; the moments are those over the batch
and all places.

What is approximate: pre-activations and sums count as normal; the operands of a linear or binary operation count as
independent, unless one is computed from the other (x * sigmoid(x)); the places of a mean or maximum have a correlation
that is typical of images, and average pooling keeps the standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Graph, Node, Shape
from kquant.graph.ops import BIAS, LINEAR, QUANTIZED_WEIGHT, TWO_INPUTS, UNARY, compute
from kquant.graph.transforms.regions import clip_of

Array = np.ndarray[Any, Any]

SIGMAS = 6.0  # a normal variable reaches this many standard deviations (alpha of eq. 18-19, Nagel et al. 2019)
POINTS = np.linspace(-SIGMAS, SIGMAS, 241)[:, None]  # the trapezoidal rule on them is off by 1e-4 at a kink
WINDOW = 0.5  # correlation of the places of a maximum,
PLACES = 0.25  # and of a mean, which are farther apart
_DENSITY = np.exp(-np.square(POINTS) / 2)
_FAR = 40.0  # standard deviations beyond which nothing lies


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of a tensor without data; all float64 [channels].

    Attributes:
        mean: expectation.
        std: standard deviation.
        low: about the smallest value: `SIGMAS` standard deviations below the mean of what is normal, and never
            outside the bounds of an activation.
        high: about the largest value, likewise.
    """

    mean: Array
    std: Array
    low: Array
    high: Array

    @classmethod
    def normal(cls, mean: Any, std: Any, sigmas: float = SIGMAS) -> Moments:
        """Of normal variables that reach `sigmas` standard deviations."""
        mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
        return cls(mean, std, mean - sigmas * std, mean + sigmas * std)

    @classmethod
    def sample(cls, x: Array) -> Moments:
        """Of an array whose last axis holds the channels."""
        rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1] if x.ndim else 1)
        return cls(rows.mean(0), rows.std(0), rows.min(0), rows.max(0))

    @classmethod
    def mixture(cls, parts: Sequence[Moments], shares: Any) -> Moments:
        """Of a tensor of which part i makes up shares[i]; the shares add up to 1."""
        share = np.asarray(shares, np.float64)[:, None]
        means, stds = np.stack([p.mean for p in parts]), np.stack([p.std for p in parts])
        mean = (share * means).sum(0)
        var = (share * (np.square(stds) + np.square(means - mean))).sum(0)
        return cls(mean, np.sqrt(var), np.min([p.low for p in parts], 0), np.max([p.high for p in parts], 0))

    def map(self, f: Callable[[Array], Array]) -> Moments:
        """The same function of all four, e.g. a selection of channels."""
        return Moments(f(self.mean), f(self.std), f(self.low), f(self.high))

    def clip(self, lo: Any, hi: Any) -> Moments:
        """Behind min(max(x, lo), hi) with None for no bound; closed form for a normal x."""
        lo, hi = -np.inf if lo is None else np.asarray(lo, np.float64), np.inf if hi is None else np.asarray(hi)
        mean, std = clipped_normal(self.mean, self.std, lo, hi)
        cut = (self.low < lo) | (self.high > hi)
        low, high = np.clip(self.low, lo, hi), np.clip(self.high, lo, hi)
        return Moments(np.where(cut, mean, self.mean), np.where(cut, std, self.std), low, high)


def clipped_normal(mean: Array, std: Array, lo: Any, hi: Any) -> tuple[Array, Array]:
    """Mean and standard deviation of min(max(x, lo), hi) for x ~ N(mean, std^2).

    With a = (lo - mean) / std, b = (hi - mean) / std, phi the density and Phi the distribution of N(0, 1),
    z = min(max((x - mean) / std, a), b) has

        E[z]   = a Phi(a) + b Phi(-b) + phi(a) - phi(b)
        E[z^2] = a^2 Phi(a) + b^2 Phi(-b) + 1 - Phi(a) - Phi(-b) + a phi(a) - b phi(b)

    (white paper section 3.3 for lo = 0 without hi; Nagel et al. 2019, appendix C, with both).

    Args:
        mean: [channels].
        std: [channels]; 0 is a constant.
        lo: () or [channels], -inf for none.
        hi: () or [channels], inf for none.
    """
    scale = np.where(std > 0, std, 1.0)
    a, b = (np.clip((edge - mean) / scale, -_FAR, _FAR) for edge in (lo, hi))
    below, above, at_a, at_b = _phi(a), _phi(-b), _density(a), _density(b)
    z = a * below + b * above + at_a - at_b
    square = a * a * below + b * b * above + 1 - below - above + a * at_a - b * at_b
    spread = np.sqrt(np.maximum(square - z * z, 0.0))
    return np.clip(np.where(std > 0, mean + scale * z, mean), lo, hi), np.where(std > 0, scale * spread, 0.0)


def _phi(x: Array) -> Array:
    return np.asarray(0.5 * tf.math.erfc(-x / np.sqrt(2.0)).numpy())


def _density(x: Array) -> Array:
    return np.asarray(np.exp(-x * x / 2) / np.sqrt(2 * np.pi))


def propagate(graph: Graph, inputs: Mapping[str, Moments] | None = None) -> tuple[dict[str, Moments], dict[str, str]]:
    """The moments of every tensor of a graph, behind its fused activation.

    Statistics of a batch normalization win over what is propagated, so that errors do not add up.

    Args:
        graph: a float graph, batch normalization folded.
        inputs: moments of graph inputs, e.g. from `estimate_inputs`.

    Returns:
        The moments by node, and for every other node why they are unknown.
    """
    known: dict[str, Moments] = {}
    unknown: dict[str, str] = {}
    given = inputs or {}
    for node in graph:
        missing = next((i for i in node.inputs if i in unknown), None)
        if {"mean", "std"} <= node.stats.keys():
            found = Moments.normal(node.stats["mean"], node.stats["std"])
        elif node.name in given:
            found = given[node.name]
        elif node.op == "input":
            unknown[node.name] = f"nothing is known of the input {node.name!r}"
            continue
        elif node.op not in RULES:
            unknown[node.name] = f"{node.name!r} ({node.origin_type or node.op}) has no rule for moments"
            continue
        elif missing is not None and node.op != "embedding":
            unknown[node.name] = unknown[missing]
            continue
        else:
            found = RULES[node.op](graph, node, [known[i] for i in node.inputs if i in known])
        known[node.name] = found.clip(*clip_of(node))
    return known, unknown


def linear_mean(node: Node, weight: Array, mean: Array, source: Shape) -> Array:
    """E[W x] of a linear operation without its bias, [channels]; exact whatever the distribution of x.

    With "same" padding a tap counts at the places where it reads an element, not a zero.

    Args:
        node: of `ops.LINEAR`.
        weight: in place of the node's kernel (or scale), e.g. its quantization error.
        mean: of the input [input channels].
        source: shape of the input.
    """
    return _contract(node, weight, mean, _shares(node, source))


def _contract(node: Node, weight: Array, x: Array, shares: Array | None = None) -> Array:
    """Sum over taps and input channels of weight * x [output channels]; shares [h, w] weigh the taps."""
    w = weight.astype(np.float64)
    if node.op == "affine":
        return w * x
    if node.op == "dense":
        return np.asarray(x @ w)
    w = w.sum((0, 1)) if shares is None else np.tensordot(shares, w, 2)
    if node.op == "conv2d_transpose":  # [cout, cin]
        return np.asarray(w @ x)
    if node.op == "depthwise_conv2d":  # [c, m]
        return np.asarray((w * x[:, None]).reshape(-1))
    groups = node.attrs["groups"]  # [cin / groups, cout]
    return np.einsum("igo,gi->go", w.reshape(len(w), groups, -1), x.reshape(groups, -1)).reshape(-1)


def _shares(node: Node, source: Shape) -> Array | None:
    """Share of the output's places where each tap reads an element [h, w]; None without taps."""
    if node.op in ("dense", "affine"):
        return None
    axes = []
    for axis, stride, taps in zip((1, 2), node.attrs["strides"], node.weights["kernel"].shape, strict=False):
        size, out = int(source[axis] or 1), int(node.shape[axis] or 1)
        if node.op == "conv2d_transpose":  # the convolution from `out` to `size`, read backwards
            axes.append(_reads(taps, out, size, stride, 1, node.attrs["padding"]) / out)
        else:
            dilation = node.attrs["dilation"][axis - 1]
            axes.append(_reads(taps, size, out, stride, dilation, node.attrs["padding"]) / out)
    return np.outer(*axes)


def _reads(taps: int, size: int, out: int, stride: int, dilation: int, padding: str) -> Array:
    """How many of the `out` outputs of a convolution read one of the `size` elements, by tap."""
    zeros = max((out - 1) * stride + (taps - 1) * dilation + 1 - size, 0) if padding == "same" else 0
    at = np.arange(out) * stride + np.arange(taps)[:, None] * dilation - zeros // 2
    return ((at >= 0) & (at < size)).sum(1)


def _linear(graph: Graph, node: Node, xs: list[Moments]) -> Moments:
    """mean W E[x] + b, variance W^2 Var[x]; it reaches as far as the largest of three guesses.

    Distances of the inputs from their means to low and high, added in squares; `SIGMAS` standard deviations; and all
    inputs one standard deviation off, to the same effect: so far the logits of a clear image lie apart. The plain sum
    of the distances is the limit.
    """
    (x,), w = xs, node.weights[QUANTIZED_WEIGHT[node.op][0]].astype(np.float64)
    shares = _shares(node, graph[node.inputs[0]].shape)
    mean = _contract(node, w, x.mean, shares) + node.weights[BIAS[node.op]]
    std = np.sqrt(_contract(node, np.square(w), np.square(x.std), shares))
    together = np.maximum(_contract(node, np.abs(w), x.std), SIGMAS * std)
    up, down, plus, minus = x.high - x.mean, x.mean - x.low, np.maximum(w, 0), np.maximum(-w, 0)

    def reach(along: Array, against: Array) -> Array:
        squares = [_contract(node, np.square(v), np.square(d)) for v, d in ((plus, along), (minus, against))]
        possible = _contract(node, plus, along) + _contract(node, minus, against)
        return np.minimum(np.maximum(np.sqrt(squares[0] + squares[1]), together), possible)

    return Moments(mean, std, mean - reach(down, up), mean + reach(up, down))


def _through(f: Callable[[Array], Any], x: Moments) -> Moments:
    """Behind a function of one variable, elementwise in the channels of an array [points, channels]."""
    weight = _DENSITY / _DENSITY.sum()
    at = np.clip(x.mean + x.std * POINTS, x.low, x.high)
    y = np.asarray(f(at), np.float64)
    mean = (weight * y).sum(0)
    std = np.sqrt((weight * np.square(y - mean)).sum(0))
    reach = np.asarray(f(np.linspace(x.low, x.high, len(POINTS))), np.float64)
    return Moments(mean, std, reach.min(0), reach.max(0))


def _function(node: Node) -> Callable[[Array], Array]:
    """A unary operation on an array [points, channels]."""
    if node.op == "prelu":  # slopes that differ from place to place are averaged
        alpha = node.weights["alpha"]
        node = node.with_weights(alpha=alpha.reshape(-1, alpha.shape[-1]).mean(0))
    return lambda x: compute(node, [tf.constant(x, tf.float32)]).numpy()


def _softmax(graph: Graph, node: Node, xs: list[Moments]) -> Moments:
    """First-order mean; no variable within 0..1 has a larger variance than mean (1 - mean)."""
    mean = np.exp(xs[0].mean - xs[0].mean.max())
    mean = mean / mean.sum()
    return Moments(mean, np.sqrt(mean * (1 - mean)), np.zeros_like(mean), np.ones_like(mean))


def _binary(graph: Graph, node: Node, xs: list[Moments]) -> Moments:
    """Operands that are one tensor x, or unary functions of it, are a function of x; others are independent."""
    parts = [graph[i] for i in node.inputs]
    for name, x in zip(node.inputs, xs, strict=True):
        if all(p.name == name or (p.op in UNARY - {"softmax"} and p.inputs == (name,)) for p in parts):
            functions = [(lambda v: v) if p.name == name else _function(p) for p in parts]
            return _through(partial(_composed, node, functions), x)
    shape = tuple(node.shape[-1:])
    a, b = (x.map(lambda v: np.broadcast_to(v, shape)) for x in xs)  # type: ignore[arg-type]
    return JOIN[node.op](a, b)


def _composed(node: Node, functions: list[Callable[[Array], Array]], x: Array) -> Array:
    """A binary operation, without its fused activation, of functions of x."""
    return np.asarray(TWO_INPUTS[node.op](*(tf.constant(f(x), tf.float32) for f in functions)).numpy())


def _add(a: Moments, b: Moments) -> Moments:
    mean = a.mean + b.mean
    below, above = np.hypot(a.mean - a.low, b.mean - b.low), np.hypot(a.high - a.mean, b.high - b.mean)
    return Moments(mean, np.hypot(a.std, b.std), mean - below, mean + above)


def _negative(x: Moments) -> Moments:
    return Moments(-x.mean, x.std, -x.high, -x.low)


def _mul(a: Moments, b: Moments) -> Moments:
    corners = [a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high]
    var = np.square(a.std * b.std) + np.square(a.std * b.mean) + np.square(a.mean * b.std)
    return Moments(a.mean * b.mean, np.sqrt(var), np.min(corners, 0), np.max(corners, 0))


def _maximum(a: Moments, b: Moments) -> Moments:
    """The first two moments of the maximum of two normal variables (Clark 1961)."""
    theta = np.hypot(a.std, b.std)
    alpha = np.clip((a.mean - b.mean) / np.where(theta > 0, theta, 1e-300), -_FAR, _FAR)
    p, at = _phi(alpha), theta * _density(alpha)
    mean = a.mean * p + b.mean * (1 - p) + at
    da, db = a.mean - mean, b.mean - mean
    var = (da**2 + a.std**2) * p + (db**2 + b.std**2) * (1 - p) + (da + db) * at
    return Moments(mean, np.sqrt(np.maximum(var, 0)), np.maximum(a.low, b.low), np.maximum(a.high, b.high))


JOIN: Mapping[str, Callable[[Moments, Moments], Moments]] = {
    "add": _add,
    "sub": lambda a, b: _add(a, _negative(b)),
    "mul": _mul,
    "maximum": _maximum,
    "minimum": lambda a, b: _negative(_maximum(_negative(a), _negative(b))),
}


def _pooled(x: Moments, count: int) -> Moments:
    """The maximum of `count` normal variables of correlation rho: mean + sqrt(1 - rho) std E[max of N(0, 1)]."""
    cdf = _phi(POINTS[:, 0])
    most = float((POINTS[1:, 0] + POINTS[:-1, 0]) @ np.diff(cdf**count)) / 2
    mean = np.clip(x.mean + np.sqrt(1 - WINDOW) * most * x.std, x.low, x.high)
    return Moments(mean, x.std, x.low, x.high)


def _reduce_max(graph: Graph, node: Node, xs: list[Moments]) -> Moments:
    return _pooled(_merged(graph, node, xs), _count(graph, node))


def _average(graph: Graph, node: Node, xs: list[Moments]) -> Moments:
    """The mean of n places of correlation rho has variance (1 / n + (1 - 1 / n) rho) Var[x]."""
    count, x = _count(graph, node), _merged(graph, node, xs)
    return Moments(x.mean, x.std * np.sqrt(PLACES + (1 - PLACES) / count), x.low, x.high)


def _merged(graph: Graph, node: Node, xs: list[Moments]) -> Moments:
    """In front of a reduction, with the channels of its output."""
    last = len(graph[node.inputs[0]].shape) - 1
    return _regroup(xs[0], 1, node.shape[-1]) if last in node.attrs["axes"] else xs[0]


def _count(graph: Graph, node: Node) -> int:
    return int(np.prod([graph[node.inputs[0]].shape[a] or 1 for a in node.attrs["axes"]]))


def _transpose(graph: Graph, node: Node, xs: list[Moments]) -> Moments:
    moved = node.attrs["perm"][-1] != len(node.shape) - 1
    return _regroup(xs[0], 1, node.shape[-1]) if moved else xs[0]


def _reshape(graph: Graph, node: Node, xs: list[Moments]) -> Moments:
    old, new = len(xs[0].mean), int(node.shape[-1] or 1)
    return _regroup(xs[0], int(np.gcd(old, new)), new)


def _regroup(x: Moments, period: int, channels: int | None) -> Moments:
    """What channels i, i + period, i + 2 period ... have together, repeated to `channels`."""
    parts = [x.map(lambda v, k=k: v[k : k + period]) for k in range(0, len(x.mean), period)]  # type: ignore[misc]
    mixed = Moments.mixture(parts, np.full(len(parts), 1 / len(parts)))
    return mixed.map(lambda v: np.resize(v, int(channels or 1)))


def _slice(graph: Graph, node: Node, xs: list[Moments]) -> Moments:
    last = slice(*(node.attrs[k][-1] for k in ("begin", "end", "strides")))
    return xs[0].map(lambda v: v[last])


def _joined(parts: Sequence[Moments]) -> Moments:
    """The channels of all parts, one after the other."""
    return Moments(*(np.concatenate([getattr(p, k) for p in parts]) for k in ("mean", "std", "low", "high")))


def _concat(graph: Graph, node: Node, xs: list[Moments]) -> Moments:
    if node.attrs["axis"] != len(node.shape) - 1:
        sizes = np.asarray([graph[i].shape[node.attrs["axis"]] for i in node.inputs], np.float64)
        return Moments.mixture(xs, sizes / sizes.sum())
    return _joined(xs)


def _pad(graph: Graph, node: Node, xs: list[Moments]) -> Moments:
    x, paddings, source = xs[0], node.attrs["paddings"], graph[node.inputs[0]].shape
    if node.attrs["mode"] != "constant":
        return x.map(lambda v: np.pad(v, paddings[-1], mode=node.attrs["mode"]))
    value = float(node.attrs.get("value") or 0.0)
    within = np.prod([(s or 1) / (t or 1) for s, t in zip(source[1:-1], node.shape[1:-1], strict=True)])
    if within < 1:
        x = Moments.mixture([x, Moments.normal(np.full_like(x.mean, value), 0 * x.std)], [within, 1 - within])
    front, back = (Moments.normal(np.full(n, value), np.zeros(n)) for n in paddings[-1])
    return _joined([front, x, back])


RULES: Mapping[str, Callable[[Graph, Node, list[Moments]], Moments]] = {
    **dict.fromkeys(LINEAR, _linear),
    **dict.fromkeys(UNARY, lambda graph, node, xs: _through(_function(node), xs[0])),
    **dict.fromkeys(JOIN, _binary),
    **dict.fromkeys(("avg_pool2d", "resize", "requantize", "clip"), lambda graph, node, xs: xs[0]),  # `propagate` clips
    "const": lambda graph, node, xs: Moments.sample(node.weights["value"]),
    "embedding": lambda graph, node, xs: Moments.sample(node.weights["table"]),
    "softmax": _softmax,
    "max_pool2d": lambda graph, node, xs: _pooled(xs[0], int(np.prod(node.attrs["pool_size"]))),
    "reduce_max": _reduce_max,
    "mean": _average,
    "transpose": _transpose,
    "reshape": _reshape,
    "slice": _slice,
    "concat": _concat,
    "pad": _pad,
}
