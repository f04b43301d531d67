"""Functions of one tensor that are written in TensorFlow itself: read off the graph that TensorFlow makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.ops.functions import Program, Term, erf, program
from kquant.graph.tracing.functions import selu, softplus

Value = Term | float

# TensorFlow's operation -> elementary function
_SAME: Mapping[str, str] = MappingProxyType(
    {
        **{"Abs": "abs", "Neg": "neg", "Exp": "exp", "Log": "log", "Sqrt": "sqrt", "Rsqrt": "rsqrt", "Sign": "sign"},
        **{"Floor": "floor", "Ceil": "ceil", "Round": "round", "Rint": "round", "Sin": "sin", "Cos": "cos"},
        **{"Tanh": "tanh", "Sigmoid": "logistic", "Elu": "elu", "Add": "add", "AddV2": "add", "Sub": "sub"},
        **{"Mul": "mul", "RealDiv": "div", "Maximum": "maximum", "Minimum": "minimum", "Pow": "pow", "Atan2": "atan2"},
        **{"FloorMod": "floor_mod", "Greater": "greater", "GreaterEqual": "greater_equal", "Less": "less"},
        **{"LessEqual": "less_equal", "Equal": "equal", "NotEqual": "not_equal", "LogicalAnd": "logical_and"},
        **{"LogicalOr": "logical_or", "LogicalNot": "logical_not", "Select": "select", "SelectV2": "select"},
    }
)
# or a composition
_COMPOSED: Mapping[str, Callable[..., Term]] = MappingProxyType(
    {
        "Square": lambda op, x: x * x,
        "SquaredDifference": lambda op, x, y: (x - y) * (x - y),
        "Reciprocal": lambda op, x: 1.0 / x,
        "Log1p": lambda op, x: (x + 1.0).log(),
        "Expm1": lambda op, x: x.exp() - 1.0,
        "Relu": lambda op, x: x.maximum(0.0),
        "Relu6": lambda op, x: x.maximum(0.0).minimum(6.0),
        "LeakyRelu": lambda op, x: x.call("select", x.greater(0.0), x, x * float(op.get_attr("alpha"))),
        "Selu": lambda op, x: selu(x),
        "Softplus": lambda op, x: softplus(x),
        "Softsign": lambda op, x: x / (1.0 + x.abs()),
        "Erf": lambda op, x: erf(x),
        "ClipByValue": lambda op, x, lo, hi: x.maximum(lo).minimum(hi),
    }
)
_PASSES = frozenset({"Identity", "IdentityN", "StopGradient", "PreventGradient", "CheckNumerics"})


class _Unreadable(Exception):
    """An operation is none of those above, or reads more than the tensor and numbers."""


def raw_program(function: Callable[[Any], Any], x: Node) -> Program | None:
    """The program of a Python function of a tensor, or None where it is no elementwise function that can be read."""
    try:
        traced = tf.function(function, autograph=False).get_concrete_function(tf.TensorSpec(x.shape, tf.float32))
        single = len(traced.outputs) == 1 and tuple(traced.outputs[0].shape) == x.shape
        if traced.captured_inputs or not single or traced.outputs[0].dtype != tf.float32:
            return None
        steps = program(lambda term: _read(traced, term))
    except Exception:  # a user's function raises what it likes; it stays what it is
        return None
    return steps or None


def _read(traced: Any, x: Term) -> Term:
    values: dict[Any, Value] = {traced.inputs[0].ref(): x}
    for op in traced.graph.get_operations():
        if op.type == "Placeholder":
            continue
        if op.type == "Const":
            constant = tf.get_static_value(op.outputs[0])
            if np.size(constant) == 1 and np.asarray(constant).dtype.kind == "f":
                values[op.outputs[0].ref()] = float(np.reshape(constant, ()))
            continue
        operands = [values.get(i.ref()) for i in op.inputs]
        if op.type in _PASSES:
            made = operands
        else:
            made = [_computed(op, x, operands)]
        values.update((o.ref(), v) for o, v in zip(op.outputs, made, strict=True) if v is not None)
    result = values.get(traced.outputs[0].ref())
    if not isinstance(result, Term) or result.index != x.inputs + len(x.steps) - 1:
        raise _Unreadable
    return result


def _computed(op: Any, x: Term, operands: list[Value | None]) -> Value:
    known = [o for o in operands if o is not None]
    if len(known) < len(operands) or not any(isinstance(o, Term) for o in known):
        raise _Unreadable
    if op.type in _SAME:
        return x.call(_SAME[op.type], *known)
    if op.type not in _COMPOSED or not isinstance(known[0], Term):
        raise _Unreadable
    return _COMPOSED[op.type](op, *known)
