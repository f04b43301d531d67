"""Functions of one tensor: tables of 256 entries for 8 bits, elementary operators in float.

The file looks q + 128 up in a constant: CAST, ADD, GATHER, exact on all of LiteRT's kernels and on TensorFlow Lite
Micro's. GATHER copies element by element, which takes several times as long as operators with a kernel of their own
(LOGISTIC, say): these stay what they are.
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
from kquant.targets.litert.reference import layout
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
    """The entries of the table at the integers of the input."""
    x, out = call.inputs[0], call.out
    table = tf.cast(_table(call.node, x, out), tf.float32)
    index = tf.clip_by_value(tf.cast(x.centered + x.zero_point, tf.int32) - _FIRST, 0, _ENTRIES - 1)
    return exact(compute(call.node, [x.value]) / out.scale, tf.gather(table, index))


def _operand(q: Grid) -> Operand:
    return Operand(None, tf.constant(q.scale, tf.float32), tf.constant(q.zero_point, tf.float32))


def _write_function(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    if out.q is None:
        _write_steps(e, node, x, out)
        return
    source = e.grid(node.inputs[0])
    assert source is not None, "checked before"
    entries = _table(node.with_attrs(clip=(None, None)), _operand(source), _operand(out.q)).numpy()
    stored = np.clip(entries + int(out.q.zero_point), out.q.qmin, out.q.qmax)
    table = e.constant(f"{node.name}/table", stored, "INT8", FileGrid(out.q.scale, out.q.zero_point))
    wide, index = (e.builder.tensor(f"{node.name}/{s}", e.shape(node), "INT32") for s in ("wide", "index"))
    e.op("CAST", x, [wide])
    e.op("ADD", [wide, e.indices(node, "first", -_FIRST)], [index])
    e.op("GATHER", [table, index], [out.tensor], axis=0)


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
        values.append(out.tensor if last else e.builder.tensor(f"{node.name}/{k}", e.shape(node), kind))
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

# operation -> what the reference kernels compute on int8 tensors, where that is something else
REFERENCE: Mapping[str, Arithmetic] = {}

KERNELS = (
    Kernel(
        op="function",
        arithmetic={8: look_up},
        write=_write_function,
        operators={
            "CAST": Builtin(options="CastOptions", reference=Reference(compute=layout.cast, any_type=True)),
            "DIV": Builtin(options="DivOptions"),
            **{name: Builtin() for name in _PLAIN},
        },
        saturates=True,
    ),
)
