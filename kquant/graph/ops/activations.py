"""Activation functions.

| op | attrs | weights |
| --- | --- | --- |
| clip | lo, hi (float or None) | |
| leaky_relu | alpha | |
| prelu | | alpha (without batch, broadcasts) |
| logistic, tanh, elu, hard_swish | | |
| softmax | | |
| gelu | approximate | |
| function | steps (a program, see `functions`) | |

ReLU is the clip (0, None), ReLU6 is (0, 6); hi may be a list with a cap for every entry of the last axis. softmax works
on the last axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.moments import Array, Moments, through
from kquant.graph.ops.functions import Program, Term, erf, inline, program, run
from kquant.graph.ops.record import Compute, MomentRule, Op, Tensor, Weight, collect, same_moments
from kquant.graph.scaling import Channels

Bounds = tuple[float | None, float | list[float] | None]


def clip_of(node: Node) -> Bounds:
    """The bounds (lo, hi) of a node's fused activation, or of a clip; None for no bound."""
    lo, hi = (node.attrs["lo"], node.attrs["hi"]) if node.op == "clip" else node.attrs.get("clip", (None, None))
    return lo, hi


def with_clip(node: Node, lo: float | None, hi: float | list[float] | None) -> Node:
    """The node with other bounds of its fused activation, or of itself where it is a clip."""
    return node.with_attrs(lo=lo, hi=hi) if node.op == "clip" else node.with_attrs(clip=(lo, hi))


def without_clip(node: Node) -> Node:
    """The node without a fused activation."""
    return node.with_(attrs={k: v for k, v in node.attrs.items() if k != "clip"})


def clip_tensor(x: Tensor, lo: float | None, hi: float | list[float] | None) -> Tensor:
    """min(max(x, lo), hi) of a tensor."""
    x = x if lo is None else tf.maximum(x, tf.cast(lo, x.dtype))
    return x if hi is None else tf.minimum(x, tf.cast(hi, x.dtype))


def clip_array(node: Node, x: Array) -> Array:
    """x behind the fused activation of a node, or behind a clip [channels]."""
    lo, hi = clip_of(node)
    x = x if lo is None else np.maximum(x, lo)
    return x if hi is None else np.minimum(x, hi)


def _merge_clips(first: Node, node: Node) -> Node:
    lo, hi = node.attrs["lo"], node.attrs["hi"]

    def outer(v: float | None) -> float | None:
        if v is not None and lo is not None:
            v = max(v, lo)
        return v if v is None or hi is None else min(v, hi)

    low, high = outer(first.attrs["lo"]), outer(first.attrs["hi"])
    merged = node.with_(inputs=first.inputs)
    return merged.with_attrs(lo=lo if low is None else low, hi=hi if high is None else high)


def function_of(node: Node) -> Callable[[Array], Array] | None:
    """A function of one variable as a function of arrays [points, channels]; None for any other operation."""
    record = RECORDS.get(node.op)
    if record is None or not (record.elementwise or record.weight):
        return None
    if record.weight is not None:  # slopes that differ from place to place are averaged
        slopes = node.weights[record.weight.name]
        node = node.with_weights(**{record.weight.name: slopes.reshape(-1, slopes.shape[-1]).mean(0)})
    return lambda x: record.compute(node, [tf.constant(x, tf.float32)], node.weights).numpy()


def _through_function(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    f = function_of(node)
    assert f is not None
    return through(f, xs[0])


def _function(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    """Truth values are as often true as false, and independent."""
    if all(source.dtype == "float32" for source in sources):
        return _through_function(node, sources, xs)
    truths = np.asarray(np.meshgrid(*[[False, True]] * len(sources))).reshape(len(sources), -1)
    made = Moments.sample(np.asarray(run(node.attrs["steps"], list(truths)), np.float64)[:, None])
    return made.map(lambda v: np.resize(v, int(node.shape[-1] or 1)))


def _softmax(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    """First-order mean; no variable within 0..1 has a larger variance than mean (1 - mean)."""
    mean = np.exp(xs[0].mean - xs[0].mean.max())
    mean = mean / mean.sum()
    return Moments(mean, np.sqrt(mean * (1 - mean)), np.zeros_like(mean), np.ones_like(mean))


def _clip_program(node: Node) -> Program | None:
    lo, hi = clip_of(node)
    if isinstance(hi, list | tuple):
        return None
    bounds = [(name, float(v)) for name, v in (("maximum", lo), ("minimum", hi)) if v is not None]
    return tuple((name, k, v) for k, (name, v) in enumerate(bounds))


def _leaky(node: Node, x: Term) -> Term:
    return x.call("select", x.greater_equal(0.0), x, x * node.attrs["alpha"])


def _gelu(node: Node, x: Term) -> Term:
    if node.attrs["approximate"]:
        return 0.5 * x * (1.0 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh())
    return 0.5 * x * (1.0 + erf(x * math.sqrt(0.5)))


def _merge_functions(first: Node, node: Node) -> Node:
    steps = inline(node.attrs["steps"], [first.attrs["steps"]], len(first.inputs))
    return node.with_(inputs=first.inputs).with_attrs(steps=steps)


def _written(write: Callable[[Node, Term], Term]) -> Callable[[Node], Program | None]:
    return lambda node: program(lambda x: write(node, x))


def _elementwise(name: str, compute: Compute, moments: MomentRule = _through_function, **facts: Any) -> Op:
    return Op(name=name, compute=compute, moments=moments, elementwise=True, **facts)


RECORDS = collect(
    _elementwise(
        "clip",
        lambda n, xs, w: clip_tensor(xs[0], n.attrs["lo"], n.attrs["hi"]),
        channels=Channels(equivariant=True, constant=clip_array),
        moments=same_moments,  # who propagates moments applies the bounds of any node, see `clip_of`
        merge=_merge_clips,
        program=_clip_program,
    ),
    _elementwise(
        "leaky_relu",
        lambda n, xs, w: tf.nn.leaky_relu(xs[0], n.attrs["alpha"]),
        channels=Channels(equivariant=True, constant=lambda n, x: np.where(x < 0, x * n.attrs["alpha"], x)),
        program=_written(_leaky),
    ),
    Op(
        name="prelu",
        compute=lambda n, xs, w: tf.where(xs[0] >= 0, xs[0], xs[0] * w["alpha"]),
        weight=Weight(name="alpha"),
        # slopes may differ from place to place
        channels=Channels(equivariant=True, constant=lambda n, x: np.where(x < 0, np.nan, x)),
        moments=_through_function,
    ),
    _elementwise("logistic", lambda n, xs, w: tf.sigmoid(xs[0]), program=lambda node: (("logistic", 0),)),
    _elementwise("tanh", lambda n, xs, w: tf.tanh(xs[0]), program=lambda node: (("tanh", 0),)),
    _elementwise("gelu", lambda n, xs, w: tf.nn.gelu(xs[0], n.attrs["approximate"]), program=_written(_gelu)),
    _elementwise("elu", lambda n, xs, w: tf.nn.elu(xs[0]), program=lambda node: (("elu", 0),)),
    _elementwise(
        "hard_swish",
        lambda n, xs, w: xs[0] * tf.nn.relu6(xs[0] + 3.0) / 6.0,
        program=_written(lambda node, x: x * (x + 3.0).maximum(0.0).minimum(6.0) / 6.0),
    ),
    _elementwise(
        "function",
        lambda n, xs, w: run(n.attrs["steps"], xs),
        _function,
        selects=True,
        merge=_merge_functions,
        program=lambda node: tuple(map(tuple, node.attrs["steps"])),
    ),
    Op(name="softmax", compute=lambda n, xs, w: tf.nn.softmax(xs[0], axis=-1), moments=_softmax),
)
