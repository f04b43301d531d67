"""Functions of one tensor: tables of 256 entries for 8 bits, bounds for truth values, elementary operators in float.

The file looks q + 128 up in a constant: CAST, ADD, GATHER, exact on all of LiteRT's kernels and on TensorFlow Lite
Micro's. GATHER copies element by element, which takes several times as long as operators with a kernel of their own
(LOGISTIC, say): these stay what they are. A truth value of an integer changes at some of its values, with which CAST
and GREATER_EQUAL compare it, for 8 and 16 bits alike; a number of a truth value is one of two, by SELECT_V2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.ops import compute
from kquant.grids.gradients import exact
from kquant.grids.grid import Grid
from kquant.targets.builtin import Builtin, Reference
from kquant.targets.kernel import Arithmetic, Kernel
from kquant.targets.litert.emitter import Emitter, Sink
from kquant.targets.litert.fixed_point import Tensor
from kquant.targets.litert.flatbuffer import FileGrid
from kquant.targets.litert.reference import elementwise, layout
from kquant.targets.operand import Call, Operand

_FIRST, _ENTRIES = -128, 256


def _table(node: Node, x: Operand, out: Operand) -> Tensor:
    """q - z of the output for every int8 input, in float64: rounded half to even; NaN is 0, infinity the largest."""
    stored = tf.range(_FIRST, _FIRST + _ENTRIES, dtype=tf.float64)
    scale, zero_point, step = (tf.cast(v, tf.float64) for v in (x.scale, x.zero_point, out.scale))
    entries = compute(node, [(stored - zero_point) * scale]) / step
    entries = tf.where(tf.math.is_nan(entries), tf.zeros_like(entries), entries)
    return tf.round(tf.clip_by_value(entries, -65536.0, 65536.0))


def look_up(call: Call) -> Tensor:
    """The entries of the table at the integers of the input; of truth values, the rounded function itself."""
    x, out = call.inputs[0], call.out
    if x.centered.dtype == tf.bool:
        return tf.round(compute(call.node, [x.centered]) / out.scale)
    table = tf.cast(_table(call.node, x, out), tf.float32)
    index = tf.clip_by_value(tf.cast(x.centered + x.zero_point, tf.int32) - _FIRST, 0, _ENTRIES - 1)
    return exact(compute(call.node, [x.value]) / out.scale, tf.gather(table, index))


def _operand(q: Grid) -> Operand:
    return Operand(None, tf.constant(q.scale, tf.float32), tf.constant(q.zero_point, tf.float32))


def _write_function(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    source = e.grid(node.inputs[0])
    if out.q is None:
        if e.builder.dtype(x[0]) in ("INT8", "INT16"):
            _write_bounds(e, node, x[0], out)
        else:
            _write_steps(e, node, x, out)
        return
    if source is None:
        _write_choice(e, node, x[0], out)
        return
    entries = _table(node.with_attrs(clip=(None, None)), _operand(source), _operand(out.q)).numpy()
    stored = np.clip(entries + int(out.q.zero_point), out.q.qmin, out.q.qmax)
    table = e.constant(f"{node.name}/table", stored, "INT8", FileGrid(out.q.scale, out.q.zero_point))
    wide, index = (e.new_tensor(node, f"{node.name}/{s}", e.shape(node), None, "INT32") for s in ("wide", "index"))
    e.op("CAST", x, [wide])
    e.op("ADD", [wide, e.indices(node, "first", -_FIRST)], [index])
    e.op("GATHER", [table, index], [out.tensor], axis=0)


def _write_bounds(e: Emitter, node: Node, x: int, out: Sink) -> None:
    """Truth values of integers: a comparison with each integer where they change, joined by "exclusive or"."""
    q = e.grid(node.inputs[0])
    assert q is not None, "it is of integers"
    stored = np.arange(-(2 ** (q.container - 1)), 2 ** (q.container - 1))
    values = (stored.astype(np.float32) - np.float32(q.zero_point)) * np.float32(q.scale)  # as the simulation has them
    truths = compute(node, [tf.constant(values)]).numpy()
    changes = stored[1:][truths[1:] != truths[:-1]]
    bounds = changes if len(changes) else stored[:1]  # all alike
    first = "GREATER_EQUAL" if bool(truths[0]) != bool(len(changes)) else "LESS"
    wide = e.new_tensor(node, f"{node.name}/wide", e.shape(node), None, "INT32")
    e.op("CAST", [x], [wide])

    def append(k: int, what: str, operator: str, inputs: Sequence[int]) -> int:
        last = k == len(bounds) - 1 and (k == 0 or what == "joined")
        found = out.tensor if last else e.new_tensor(node, f"{node.name}/{k}/{what}", e.shape(node), None, "BOOL")
        e.op(operator, inputs, [found])
        return found

    joined = 0
    for k, bound in enumerate(bounds):
        constant = e.indices(node, f"bound{k}", bound)
        above = append(k, "above", "GREATER_EQUAL" if k else first, [wide, constant])
        joined = append(k, "joined", "NOT_EQUAL", [joined, above]) if k else above


def _write_choice(e: Emitter, node: Node, x: int, out: Sink) -> None:
    """A number of a truth value: one of two constants."""
    assert out.q is not None, "it is on a grid"
    numbers = compute(node.with_attrs(clip=(None, None)), [tf.constant([True, False])]).numpy()
    stored = np.clip(np.round(numbers / np.float32(out.q.scale)) + int(out.q.zero_point), out.q.qmin, out.q.qmax)
    grid = FileGrid(out.q.scale, out.q.zero_point)
    names = (f"{node.name}/{truth}" for truth in ("true", "false"))
    yes, no = (e.constant(n, np.asarray([v]), "INT8", grid) for n, v in zip(names, stored, strict=True))
    e.op("SELECT_V2", [x, yes, no], [out.tensor])


def _write_steps(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """The program, an operator for each step."""
    values, steps = list(x), node.attrs["steps"]
    for k, (name, *operands) in enumerate(steps):
        inputs = [
            values[o] if isinstance(o, int) else e.constant(f"{node.name}/{k}/constant", np.asarray(o), "FLOAT32")
            for o in operands
        ]
        kind = "BOOL" if name in _TRUTHS else "FLOAT32"
        last = k == len(steps) - 1
        values.append(out.tensor if last else e.new_tensor(node, f"{node.name}/{k}", e.shape(node), None, kind))
        e.op(OPERATORS.get(name, name.upper()), inputs, values[-1:])


_TRUTHS = frozenset(
    {"greater", "greater_equal", "less", "less_equal", "equal", "not_equal"}
    | {"logical_and", "logical_or", "logical_not"}
)
OPERATORS: Mapping[str, str] = MappingProxyType({"select": "SELECT_V2"})  # others are called as the elementary function
_PLAIN = (
    *("ABS", "NEG", "EXP", "LOG", "SQRT", "RSQRT", "FLOOR", "CEIL", "ROUND", "SIGN", "SIN", "COS", "POW", "ATAN2"),
    *("FLOOR_MOD", *(name.upper() for name in sorted(_TRUTHS))),
)
_REFERENCES = {
    name.upper(): Reference(compute=elementwise.pointwise(getattr(np, name)), any_type=True) for name in sorted(_TRUTHS)
}

# operation -> what the reference kernels compute on int8 tensors, where that is something else
REFERENCE: Mapping[str, Arithmetic] = {}

KERNELS = (
    Kernel(
        op="function",
        arithmetic={8: look_up},
        discrete=(8, 16),
        write=_write_function,
        operators={
            "CAST": Builtin(options="CastOptions", reference=Reference(compute=layout.cast, any_type=True)),
            "DIV": Builtin(options="DivOptions"),
            **{name: Builtin(reference=_REFERENCES.get(name)) for name in _PLAIN},
        },
        saturates=True,
    ),
)
