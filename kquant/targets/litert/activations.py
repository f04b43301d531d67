"""Activation functions.

Functions of 8 bits without a formula here are lookup tables of the real function. The formulas for int16 are those of
LiteRT's own kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.ops import compute
from kquant.targets.builtin import Builtin, Reference
from kquant.targets.kernel import Arithmetic, Kernel, Layout
from kquant.targets.litert import curves
from kquant.targets.litert.elementwise import real, rescale, scale_8_bits
from kquant.targets.litert.emitter import Emitter, Sink
from kquant.targets.litert.fixed_point import (
    Tensor,
    bit_length,
    doubles,
    integers,
    scaled,
    shift_right,
    with_gradient_of,
)
from kquant.targets.litert.reference import activations, optimized, softmax
from kquant.targets.litert.tables import EXP, RECIPROCAL, SIGMOID
from kquant.targets.litert.weights import weights
from kquant.targets.operand import Call, Operand


def _ideal(call: Call) -> Tensor:
    """The real function in steps of the output."""
    return compute(call.node, [call.inputs[0].value]) / call.out.scale


def relu(call: Call) -> Tensor:
    """A change of grid with the scales divided in float32; the clamps follow."""
    x, out = call.inputs[0], call.out
    (ratio,) = doubles(x.scale / out.scale)
    return with_gradient_of(x.value / out.scale, scaled(integers(x), ratio))


def _clip(call: Call) -> Tensor:
    """RELU is LiteRT's own kernel; other bounds are a change of grid in front of MAXIMUM and MINIMUM (XNNPACK)."""
    x = call.inputs[0]
    return relu(call) if call.node.attrs["lo"] == 0 else scale_8_bits(x, x.scale / call.out.scale)


def fixed_point_clip(call: Call) -> Tensor:
    """The same by LiteRT's own kernels."""
    return relu(call) if call.node.attrs["lo"] == 0 else rescale(call)


def _leaky_relu(call: Call) -> Tensor:
    """One multiplier for either sign, of 8 bits (XNNPACK)."""
    x, alpha = call.inputs[0], np.float32(call.node.attrs["alpha"])
    ratio = x.scale / call.out.scale
    return tf.where(x.centered >= 0, scale_8_bits(x, ratio), scale_8_bits(x, ratio * alpha))


def fixed_point_leaky_relu(call: Call) -> Tensor:
    """One 31-bit multiplier for either sign (LiteRT's own kernel)."""
    x, out = call.inputs[0], call.out
    above, below = doubles(x.scale / out.scale, x.scale * np.float32(call.node.attrs["alpha"]) / out.scale)
    q = integers(x)
    return with_gradient_of(_ideal(call), tf.where(q >= 0, scaled(q, above), scaled(q, below)))


def _prelu(call: Call) -> Tensor:
    """Products of input and slope brought to the output's grid (LiteRT's own kernel)."""
    if call.weight is None:
        return real(call)
    x, alpha, out = call.inputs[0], call.weight, call.out
    by_one, by_slope = doubles(x.scale / out.scale, x.scale * alpha.scale / out.scale)
    q, slope = integers(x), integers(alpha)
    ideal = tf.where(x.centered >= 0, x.value, x.value * alpha.value) / out.scale
    return with_gradient_of(ideal, tf.where(q >= 0, scaled(q, by_one), scaled(q * slope, by_slope)))


def softmax_16(reciprocals: np.ndarray) -> Arithmetic:
    """Interpolated tables of exp and 1 / (1 + v), up to 9 LSB from the real function."""

    def arithmetic(call: Call) -> Tensor:
        q, (s_x,) = integers(call.inputs[0]), doubles(call.inputs[0].scale)
        below = scaled(q - tf.reduce_max(q, -1, keepdims=True), s_x / (10.0 / 65535.0))
        exps = _lookup(EXP, tf.clip_by_value(below + 32767, -32768, 32767))
        total = tf.reduce_sum(exps, -1, keepdims=True)
        headroom = 32 - bit_length(total)
        shifted = shift_right(tf.bitwise.left_shift(total, headroom - 1), tf.constant(14, tf.int64))
        reciprocal = _lookup(reciprocals, tf.clip_by_value(shifted - (1 << 15) - (1 << 16), -32768, 32767))
        y = shift_right(exps * reciprocal, 31 - headroom)
        return with_gradient_of(_ideal(call), tf.clip_by_value(y, 0, 32767))

    return arithmetic


def _lookup(table: np.ndarray, q: Tensor) -> Tensor:
    """Linear interpolation in a 513-entry table at int16 positions."""
    values, index = tf.constant(table), 256 + q // 128
    low, high = tf.gather(values, index), tf.gather(values, index + 1)
    return low + ((high - low) * (q % 128) + 64) // 128


def _sigmoid_16(x: Operand, bits: int, top: int) -> tuple[Tensor, Tensor]:
    """(position, sigmoid of its magnitude) from a table of sigmoid(i / 24), `bits` fractional bits between entries."""
    log2 = tf.math.log(x.scale) * float(1 / np.log(2))
    nearest = tf.round(
        log2
    )  # the kernel takes a scale of about 2^-12 for that, and with 8 bits one of about 2^-11, too
    whole = (tf.abs(log2 - nearest) < 1e-3) & (nearest >= -12.0) & (nearest <= -3.0 - bits)
    scale, power_of_two = doubles(x.scale, 2.0**nearest)
    factor = tf.where(whole, power_of_two, scale) * (4096.0 * 3.0)
    exponent = tf.bitwise.right_shift(tf.bitcast(factor, tf.int64), tf.constant(52, tf.int64)) - 1023
    shift = tf.clip_by_value(14 - exponent, 0, 31)
    unit = tf.bitwise.left_shift(tf.ones_like(shift), shift)
    by = tf.cast(factor * tf.cast(unit, tf.float64), tf.int64)
    q = shift_right(integers(x) * by, shift)
    magnitude = tf.abs(q)
    index = tf.minimum(magnitude // (1 << bits), 254)
    low, high = tf.gather(tf.constant(SIGMOID), index), tf.gather(tf.constant(SIGMOID), index + 1)
    inside = low * (1 << bits) + (magnitude % (1 << bits)) * (high - low)
    return q, tf.where(magnitude // (1 << bits) >= 255, tf.constant(top, tf.int64), inside)


def _logistic_16(call: Call) -> Tensor:
    q, y = _sigmoid_16(call.inputs[0], 9, 0x7FFF << 10)
    found = tf.where(q >= 0, y + (1 << 9), (1 << 25) - y + (1 << 9) - 1) // (1 << 10)
    return with_gradient_of(_ideal(call), found)


def _tanh_16(call: Call) -> Tensor:
    """tanh(x) = 2 sigmoid(2 x) - 1."""
    q, y = _sigmoid_16(call.inputs[0], 8, 0xFFFF << 8)
    found = tf.where(q >= 0, y - (1 << 23) + (1 << 7), -y + (1 << 23) + (1 << 7) - 1) // (1 << 8)
    return with_gradient_of(_ideal(call), found)


def _write_clip(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """RELU and RELU6 requantize on their way; without them it is a change of grid."""
    e.op(out.fused if out.fused != "NONE" else "QUANTIZE", x, [out.tensor])


def _write_leaky_relu(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("LEAKY_RELU", x, [out.tensor], alpha=float(node.attrs["alpha"]))


def _write_prelu(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("PRELU", [x[0], weights(e, node, x[0], out).kernel], [out.tensor])


def _write_gelu(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("GELU", x, [out.tensor], approximate=bool(node.attrs["approximate"]))


def _write_softmax(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("SOFTMAX", x, [out.tensor], beta=1.0)


def _write_plain(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """The operator is called as the operation is."""
    e.op(node.op.upper(), x, [out.tensor])


_UNIT = {8: (1 / 256, -128), 16: (1 / 32768, 0)}  # grids of values from 0 to 1

# operation -> what the reference kernels compute on int8 tensors, where that is something else
REFERENCE: Mapping[str, Arithmetic] = {
    "clip": fixed_point_clip,
    "leaky_relu": fixed_point_leaky_relu,
    "logistic": curves.logistic,
    "tanh": curves.tanh,
    "softmax": curves.softmax,
    "gelu": curves.gelu,
    "elu": curves.elu,
}

KERNELS = (
    Kernel(
        op="clip",
        arithmetic={8: _clip, 16: fixed_point_clip},
        write=_write_clip,
        operators={
            "RELU": Builtin(versions=(1, 2, 3), reference=Reference(compute=activations.relu(0.0, None))),
            "RELU6": Builtin(versions=(1, 2, 3), reference=Reference(compute=activations.relu(0.0, 6.0))),
            "RELU_N1_TO_1": Builtin(reference=Reference(compute=activations.relu(-1.0, 1.0))),
            "RELU_0_TO_1": Builtin(reference=Reference(compute=activations.relu(0.0, 1.0))),
        },
        fuses=("NONE", "RELU", "RELU6"),
    ),
    Kernel(
        op="leaky_relu",
        arithmetic={8: _leaky_relu, 16: fixed_point_leaky_relu},
        write=_write_leaky_relu,
        operators={
            "LEAKY_RELU": Builtin(
                options="LeakyReluOptions", versions=(1, 1, 2), reference=Reference(compute=activations.leaky_relu)
            )
        },
    ),
    Kernel(
        op="prelu",
        arithmetic={8: _prelu},
        write=_write_prelu,
        operators={"PRELU": Builtin(reference=Reference(compute=activations.prelu))},
        layout=Layout(),
    ),
    Kernel(
        op="logistic",
        arithmetic={8: real, 16: _logistic_16},
        write=_write_plain,
        operators={"LOGISTIC": Builtin(versions=(1, 2, 3), reference=Reference(compute=activations.logistic))},
        output=_UNIT,
        beside_powers={16: 1e-3},
    ),
    Kernel(
        op="tanh",
        arithmetic={8: real, 16: _tanh_16},
        write=_write_plain,
        operators={"TANH": Builtin(versions=(1, 2, 3), reference=Reference(compute=activations.tanh))},
        output={8: (1 / 128, 0), 16: (1 / 32768, 0)},
        beside_powers={16: 1e-3},
    ),
    Kernel(
        op="softmax",
        arithmetic={8: real, 16: softmax_16(RECIPROCAL)},
        least_scale={8: 2.0**-25},  # differences of scores are counted in 2^-26, each of more than one
        write=_write_softmax,
        operators={
            "SOFTMAX": Builtin(
                options="SoftmaxOptions",
                versions=(1, 2, 3),
                reference=Reference(compute=softmax.softmax),
                optimized=Reference(compute=optimized.softmax),
            )
        },
        output=_UNIT,
    ),
    Kernel(
        op="gelu",
        arithmetic={8: real},
        write=_write_gelu,
        operators={
            "GELU": Builtin(options="GeluOptions", versions=(1, 2, 2), reference=Reference(compute=activations.gelu))
        },
    ),
    Kernel(
        op="elu",
        arithmetic={8: real},
        write=_write_plain,
        operators={"ELU": Builtin(reference=Reference(compute=activations.elu))},
    ),
    Kernel(
        op="hard_swish",
        arithmetic={8: curves.hard_swish},
        write=_write_plain,
        operators={"HARD_SWISH": Builtin(reference=Reference(compute=activations.hard_swish))},
    ),
)
