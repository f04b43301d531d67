"""Operations of several tensors, element by element with numpy broadcasting.

| op | attrs | weights |
| --- | --- | --- |
| add, sub, mul, maximum, minimum | | |
| select | | three inputs: the second where the first, of type bool, is true, else the third |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node, Shape
from kquant.graph.moments import FAR, Array, Moments, density, phi, through
from kquant.graph.ops.activations import function_of
from kquant.graph.ops.record import MomentRule, Op, Tensor, Tie, collect
from kquant.graph.scaling import Channels, Scaling

Join = Callable[[Moments, Moments], Moments]


def _rule(function: Callable[[Tensor, Tensor], Tensor], join: Join) -> MomentRule:
    """Operands that are one tensor x, or unary functions of it, are a function of x; others are independent."""

    def moments(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
        for name, x in zip(node.inputs, xs, strict=True):
            found = [_of(p, name) for p in sources]
            known = [f for f in found if f is not None]
            if len(known) == len(found):
                return through(lambda v: function(*(tf.constant(f(v), tf.float32) for f in known)).numpy(), x)  # noqa: B023
        shape = tuple(node.shape[-1:])
        a, b = (x.map(lambda v: np.broadcast_to(v, shape)) for x in xs)  # type: ignore[arg-type]
        return join(a, b)

    return moments


def _of(node: Node, name: str) -> Callable[[Array], Array] | None:
    """A node as a function of the tensor `name` alone, if it is one."""
    if node.name == name:
        return lambda v: v
    return function_of(node) if node.inputs == (name,) else None


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
    alpha = np.clip((a.mean - b.mean) / np.where(theta > 0, theta, 1e-300), -FAR, FAR)
    p, at = phi(alpha), theta * density(alpha)
    mean = a.mean * p + b.mean * (1 - p) + at
    da, db = a.mean - mean, b.mean - mean
    var = (da**2 + a.std**2) * p + (db**2 + b.std**2) * (1 - p) + (da + db) * at
    return Moments(mean, np.sqrt(np.maximum(var, 0)), np.maximum(a.low, b.low), np.maximum(a.high, b.high))


def _select(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    """Half of the values of either."""
    return Moments.mixture([x.map(lambda v: np.resize(v, int(node.shape[-1] or 1))) for x in xs[1:]], [0.5, 0.5])


def _addends(node: Node, sources: Sequence[Shape], s: Scaling) -> Sequence[Scaling]:
    """The offset goes to the first."""
    return s.without_stats(), Scaling.factors(s.scale)


_ADDITIVE = Channels(
    in_front=_addends,
    equivariant=True,
    constant=lambda node, x: np.full_like(x, np.nan),  # of two tensors
)


def _op(name: str, function: Callable[[Tensor, Tensor], Tensor], join: Join, **facts: Any) -> Op:
    return Op(
        name=name,
        compute=lambda n, xs, w: function(*xs),
        moments=_rule(function, join),
        program=lambda node: ((name, 0, 1),),
        **facts,
    )


RECORDS = collect(
    _op("add", tf.add, _add, fuses_clip=True, channels=_ADDITIVE),
    _op("sub", tf.subtract, lambda a, b: _add(a, _negative(b)), fuses_clip=True, channels=_ADDITIVE),
    _op("mul", tf.multiply, _mul, fuses_clip=True),
    _op("maximum", tf.maximum, _maximum, grid=Tie.SHARED),
    _op("minimum", tf.minimum, lambda a, b: _negative(_maximum(_negative(a), _negative(b))), grid=Tie.SHARED),
    Op(
        name="select",
        compute=lambda n, xs, w: tf.where(*xs),
        selects=True,
        grid=Tie.SHARED,
        moments=_select,
        program=lambda node: (("select", 0, 1, 2),),
    ),
)
