"""Lowering of functions of one tensor, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kquant.graph.ir import Node
from kquant.graph.ops.functions import Term, erf, program
from kquant.graph.tracing.builder import Builder, NotLowered, as_array, lowers_op


def function(b: Builder, x: Node, write: Callable[[Term], Term], suffix: str = "", dtype: str = "float32") -> Node:
    """An elementwise function of a tensor, e.g. function(b, x, lambda x: x * (1.0 + x.exp()).log().tanh())."""
    return b.emit("function", x, steps=program(write), suffix=suffix, dtype=dtype)


def softplus(x: Term) -> Term:
    """log(1 + exp(x)) without overflow."""
    return x.maximum(0.0) + (1.0 + (-x.abs()).exp()).log()


def _celu(x: Term, alpha: float) -> Term:
    return x.maximum(0.0) + alpha * (x.minimum(0.0) / alpha).elu()


def selu(x: Term) -> Term:
    alpha, scale = 1.6732632423543772, 1.0507009873554805
    return scale * (x.maximum(0.0) + alpha * x.minimum(0.0).elu())


def _shrink(x: Term, threshold: float) -> Term:
    """Towards zero, as far as the threshold."""
    return x.sign() * (x.abs() - threshold).maximum(0.0)


def _outside(x: Term, threshold: float) -> Term:
    """x, and 0 within the threshold."""
    return x.call("select", x.abs().greater(threshold), x, 0.0)


def _above(x: Term, threshold: float, value: float) -> Term:
    return x.call("select", x.greater(threshold), x, value)


def _squareplus(x: Term, b: float) -> Term:
    return 0.5 * (x + (x * x + b).sqrt())


def _sparse_plus(x: Term) -> Term:
    middle = 0.25 * (x + 1.0) * (x + 1.0)
    return x.call("select", x.greater_equal(1.0), x, x.call("select", x.less_equal(-1.0), 0.0, middle))


def _power(x: Term, exponent: float) -> Term:
    return x.pow(exponent) if exponent != int(exponent) or abs(exponent) > 2 else _whole_power(x, int(exponent))


def _whole_power(x: Term, exponent: int) -> Term:
    if exponent < 0:
        return 1.0 / _whole_power(x, -exponent)
    return (x * 0.0 + 1.0, x * 1.0, x * x)[exponent]


# of x and the operation's own settings
_OF_ONE: dict[str, Callable[[Term, Any], Term]] = {
    **{name: lambda x, op: x.abs() for name in ("Absolute", "Abs", "Fabs")},
    "Exp": lambda x, op: x.exp(),
    "Exp2": lambda x, op: (x * math.log(2.0)).exp(),
    "Expm1": lambda x, op: x.exp() - 1.0,
    "Log": lambda x, op: x.log(),
    "Log1p": lambda x, op: (x + 1.0).log(),
    "Log2": lambda x, op: x.log() * (1.0 / math.log(2.0)),
    "Log10": lambda x, op: x.log() * (1.0 / math.log(10.0)),
    "Sqrt": lambda x, op: x.sqrt(),
    "Rsqrt": lambda x, op: x.rsqrt(),
    "Cbrt": lambda x, op: x.sign() * x.abs().pow(1.0 / 3.0),
    "Reciprocal": lambda x, op: 1.0 / x,
    "Sign": lambda x, op: x.sign(),
    "Floor": lambda x, op: x.floor(),
    "Ceil": lambda x, op: x.ceil(),
    "Trunc": lambda x, op: x.sign() * x.abs().floor(),
    "Sin": lambda x, op: x.sin(),
    "Cos": lambda x, op: x.cos(),
    "Tan": lambda x, op: x.sin() / x.cos(),
    "Sinh": lambda x, op: 0.5 * (x.exp() - (-x).exp()),
    "Cosh": lambda x, op: 0.5 * (x.exp() + (-x).exp()),
    "Arctan": lambda x, op: x.atan2(1.0),
    "Arcsin": lambda x, op: x.atan2((1.0 - x * x).maximum(0.0).sqrt()),
    "Arccos": lambda x, op: (1.0 - x * x).maximum(0.0).sqrt().atan2(x),
    "Arcsinh": lambda x, op: x.sign() * (x.abs() + (x * x + 1.0).sqrt()).log(),
    "Arccosh": lambda x, op: (x + (x * x - 1.0).sqrt()).log(),
    "Arctanh": lambda x, op: 0.5 * ((1.0 + x) / (1.0 - x)).log(),
    "Erf": lambda x, op: erf(x),
    "Erfc": lambda x, op: 1.0 - erf(x),
    "Softplus": lambda x, op: softplus(x),
    "Mish": lambda x, op: x * softplus(x).tanh(),
    "Softsign": lambda x, op: x / (1.0 + x.abs()),
    "Selu": lambda x, op: selu(x),
    "Celu": lambda x, op: _celu(x, float(op.alpha)),
    "LogSigmoid": lambda x, op: -softplus(-x),
    "TanhShrink": lambda x, op: x - x.tanh(),
    "SoftShrink": lambda x, op: _shrink(x, float(op.threshold)),
    "HardShrink": lambda x, op: _outside(x, float(op.threshold)),
    "Threshold": lambda x, op: _above(x, float(op.threshold), float(getattr(op, "value", op.default_value))),
    "Squareplus": lambda x, op: _squareplus(x, float(op.b)),
    "SparsePlus": lambda x, op: _sparse_plus(x),
    "SparseSigmoid": lambda x, op: (0.5 * (x + 1.0)).maximum(0.0).minimum(1.0),
}


def _lower(write: Callable[[Term, Any], Term]) -> Callable[[Builder, Any, Node], Node]:
    return lambda b, op, x: function(b, x, lambda t: write(t, op))


for _name, _write in _OF_ONE.items():
    lowers_op(_name)(_lower(_write))


@lowers_op("Round")
def round_op(b: Builder, op: Any, x: Node) -> Node:
    unit = 10.0 ** float(op.decimals)
    return function(b, x, lambda t: t.round() if unit == 1.0 else (t * unit).round() / unit)


@lowers_op("Power")
def power(b: Builder, op: Any, x1: Any, x2: Any) -> Node:
    if not isinstance(x1, Node):
        base = math.log(number_of(x1, "a base"))
        return function(b, x2, lambda t: (t * base).exp())
    exponent = number_of(x2, "an exponent")
    if exponent == 2.0:
        return b.emit("mul", x1, x1)
    return function(b, x1, lambda t: _power(t, exponent))


def number_of(value: Any, what: str) -> float:
    """A constant that is one number."""
    if isinstance(value, Node) or np.size(as_array(value)) != 1:
        raise NotLowered(f"{what} that is not one number")
    return float(as_array(value).reshape(()))


@lowers_op("Mod")
def mod(b: Builder, op: Any, x1: Any, x2: Any) -> Node:
    if not isinstance(x1, Node):
        raise NotLowered("the remainder of a constant")
    divisor = number_of(x2, "a divisor")
    return function(b, x1, lambda t: t.floor_mod(divisor))


@lowers_op("FloorDivide")
def floor_divide(b: Builder, op: Any, x1: Any, x2: Any) -> Node:
    if not isinstance(x1, Node):
        raise NotLowered("it divides by a computed tensor")
    divisor = number_of(x2, "a divisor")
    return function(b, x1, lambda t: (t / divisor).floor())
