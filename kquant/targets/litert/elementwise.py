"""Arithmetic between tensors, and changes of grid.

int8 follows XNNPACK, LiteRT's default kernels on CPUs: products are scaled in float32 and rounded half to even, sums
use 20-bit fixed-point multipliers. int16 follows LiteRT's own kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.ops import compute
from kquant.grids.gradients import exact, round_ste
from kquant.targets.builtin import Builtin, Reference
from kquant.targets.kernel import Arithmetic, Kernel
from kquant.targets.litert.emitter import Emitter, Sink
from kquant.targets.litert.fixed_point import Tensor, doubles, integers, scaled, with_gradient_of
from kquant.targets.litert.linear import ALL
from kquant.targets.litert.reference import elementwise, optimized
from kquant.targets.operand import Call, Operand


def real(call: Call) -> Tensor:
    """The real function of the dequantized operands, rounded: what a lookup table holds."""
    return round_ste(compute(call.node, [x.value for x in call.inputs], call.weights) * (1.0 / call.out.scale))


def move(call: Call) -> Tensor:
    """The function of the integers themselves, on the grid of the inputs: what moves or selects them."""
    return compute(call.node, [x.centered for x in call.inputs])


def scale_8_bits(x: Operand, ratio: Tensor) -> Tensor:
    """(x * round(256 ratio) + 128) >> 8 (XNNPACK)."""
    return exact(x.centered * ratio, tf.floor((x.centered * tf.round(256.0 * ratio) + 128.0) / 256.0))


def rescale(call: Call) -> Tensor:
    """A change of grid with a 31-bit multiplier (LiteRT's own kernel)."""
    x, out = call.inputs[0], call.out
    s_x, s_o = doubles(x.scale, out.scale)
    return with_gradient_of(x.value / out.scale, scaled(integers(x), s_x / s_o))


def _requantize(call: Call) -> Tensor:
    """A change of grid: between int8 grids with a multiplier of 8 bits, rounded half up (XNNPACK)."""
    x = call.inputs[0]
    return rescale(call) if call.node.attrs["input_bits"] > 8 else scale_8_bits(x, x.scale / call.out.scale)


def _sign(node: Node) -> int:
    return 1 if node.op == "add" else -1


def _pow2(exponent: Tensor) -> Tensor:
    """2 ** exponent for an int32 tensor, exact."""
    return tf.bitcast(tf.bitwise.left_shift(exponent + 127, 23), tf.float32)


def _sum(call: Call) -> Tensor:
    """a * (s_a / s_o) +- b * (s_b / s_o) with multipliers of 20 bits, rounded half up (XNNPACK)."""
    (a, b), out, sign = call.inputs, call.out, _sign(call.node)
    ideal = (a.value + float(sign) * b.value) / out.scale
    ratio_a, ratio_b = a.scale / out.scale, b.scale / out.scale
    exponent = tf.bitwise.right_shift(tf.bitcast(tf.maximum(ratio_a, ratio_b), tf.int32), 23) - 127
    unit = _pow2(20 - exponent)
    m_a, m_b = (tf.cast(tf.round(r * unit), tf.float64) for r in (ratio_a, ratio_b))
    acc = tf.cast(a.centered, tf.float64) * m_a + float(sign) * tf.cast(b.centered, tf.float64) * m_b
    return exact(ideal, tf.cast(tf.floor(acc / tf.cast(unit, tf.float64) + 0.5), tf.float32))


def fixed_point_sum(bits: int) -> Arithmetic:
    """Both operands at twice the larger scale with `bits` more bits, and their sum at the output's (LiteRT's own)."""

    def arithmetic(call: Call) -> Tensor:
        (a, b), out, sign = call.inputs, call.out, _sign(call.node)
        s_a, s_b, s_o = doubles(a.scale, b.scale, out.scale)
        twice = 2.0 * tf.maximum(s_a, s_b)
        terms = [scaled(integers(x) * (1 << bits), s / twice) for x, s in ((a, s_a), (b, s_b))]
        total = scaled(terms[0] + sign * terms[1], twice / (float(1 << bits) * s_o))
        return with_gradient_of((a.value + float(sign) * b.value) / out.scale, total)

    return arithmetic


def _mul(call: Call) -> Tensor:
    (a, b), out = call.inputs, call.out
    return round_ste(a.centered * b.centered * (a.scale * b.scale / out.scale))


def fixed_point_mul(call: Call) -> Tensor:
    """The product times s_a s_b / s_y with a 31-bit multiplier (LiteRT's own kernel)."""
    (a, b), out = call.inputs, call.out
    (ratio,) = doubles(a.scale * b.scale / out.scale)
    return with_gradient_of(a.value * b.value / out.scale, scaled(integers(a) * integers(b), ratio))


def _write_sum(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    # False selects the int16 kernel for scales that are no powers of two.
    e.op(node.op.upper(), x, [out.tensor], fusedActivationFunction=out.activation, potScaleInt16=False)


def _write_mul(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("MUL", x, [out.tensor], fusedActivationFunction=out.activation)


def _write_extremum(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op(node.op.upper(), x, [out.tensor])


def _write_select(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("SELECT_V2", x, [out.tensor])


def _write_requantize(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("QUANTIZE", x, [out.tensor])


# operation -> what the reference kernels compute on int8 tensors, where that is something else
REFERENCE: Mapping[str, Arithmetic] = {
    "add": fixed_point_sum(20),
    "sub": fixed_point_sum(20),
    "mul": fixed_point_mul,
    "requantize": rescale,
}

KERNELS = (
    Kernel(
        op="add",
        arithmetic={8: _sum, 16: fixed_point_sum(15)},
        write=_write_sum,
        operators={
            "ADD": Builtin(
                options="AddOptions", versions=(1, 2, 3), reference=Reference(compute=elementwise.additive(1))
            )
        },
        fuses=ALL,
    ),
    Kernel(
        op="sub",
        arithmetic={8: _sum, 16: fixed_point_sum(15)},
        write=_write_sum,
        operators={
            "SUB": Builtin(
                options="SubOptions", versions=(1, 2, 5), reference=Reference(compute=elementwise.additive(-1))
            )
        },
        fuses=ALL,
    ),
    Kernel(
        op="mul",
        arithmetic={8: _mul, 16: fixed_point_mul},
        write=_write_mul,
        operators={
            "MUL": Builtin(options="MulOptions", versions=(1, 2, 4), reference=Reference(compute=elementwise.mul))
        },
        fuses=ALL,
    ),
    Kernel(
        op="maximum",
        arithmetic={8: move, 16: move},
        write=_write_extremum,
        operators={
            "MAXIMUM": Builtin(
                versions=(1, 2, 4), reference=Reference(compute=elementwise.pointwise(np.maximum), any_type=True)
            )
        },
    ),
    Kernel(
        op="minimum",
        arithmetic={8: move, 16: move},
        write=_write_extremum,
        operators={
            "MINIMUM": Builtin(
                versions=(1, 2, 4), reference=Reference(compute=elementwise.pointwise(np.minimum), any_type=True)
            )
        },
    ),
    Kernel(
        op="select",
        arithmetic={8: move, 16: move},
        write=_write_select,
        operators={"SELECT_V2": Builtin(reference=Reference(compute=elementwise.select, any_type=True))},
    ),
    Kernel(
        op="requantize",
        arithmetic={8: _requantize, 16: rescale},
        write=_write_requantize,
        operators={
            "QUANTIZE": Builtin(
                versions=(1, 1, 2),
                typed_by=-1,
                reference=Reference(compute=elementwise.quantize, any_type=True),
                optimized=Reference(compute=optimized.quantize, any_type=True),
            ),
            "DEQUANTIZE": Builtin(
                versions=(3, 2, 3),  # float data is float16
                weight_versions={("INT4", ""): 6},
                least=lambda use: 5 if use.per_channel else 1,
                reference=Reference(compute=elementwise.dequantize, any_type=True),
            ),
        },
    ),
)
