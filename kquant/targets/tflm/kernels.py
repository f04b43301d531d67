"""TensorFlow Lite Micro's kernels: LiteRT's reference kernels, but for what they refuse or round differently.

`reference` has the same differences in numpy. Containers and numbers of axes were tried with the interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.graph.ops import compute
from kquant.targets.builtin import Reference
from kquant.targets.kernel import Arithmetic, Kernel
from kquant.targets.litert import kernels as litert
from kquant.targets.litert.activations import softmax_16
from kquant.targets.litert.elementwise import rescale
from kquant.targets.litert.fixed_point import Tensor, doubles, integers, scaled
from kquant.targets.litert.fixed_point import with_gradient_of as with_gradient
from kquant.targets.litert.normalization import rsqrt_by_table
from kquant.targets.operand import Call
from kquant.targets.tflm.reference import DIFFERENT, RECIPROCAL, RECIPROCAL_ROOTS


def _mul(call: Call) -> Tensor:
    """The product times s_a s_b / s_y, that factor in float64."""
    (a, b), out = call.inputs, call.out
    s_a, s_b, s_y = doubles(a.scale, b.scale, out.scale)
    return with_gradient(a.value * b.value / out.scale, scaled(integers(a) * integers(b), s_a * s_b / s_y))


def _leaky_relu(call: Call) -> Tensor:
    """One 31-bit multiplier for either sign, from factors in float64."""
    x, out = call.inputs[0], call.out
    s_x, s_y = doubles(x.scale, out.scale)
    slope, q = float(np.float32(call.node.attrs["alpha"])), integers(x)
    found = tf.where(q >= 0, scaled(q, s_x / s_y), scaled(q, s_x * slope / s_y))
    return with_gradient(compute(call.node, [x.value]) / out.scale, found)


def _both(arithmetic: Arithmetic) -> dict[int, Arithmetic]:
    return {8: arithmetic, 16: arithmetic}


def _only_8(op: str) -> dict[int, Arithmetic]:
    return {8: litert.REFERENCE_KERNELS[op].arithmetic[8]}


_INT4 = {8: (4,)}
_FUNCTION = litert.KERNELS["function"].operators
# operation -> fields that differ from the records of LiteRT's reference kernels
_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "conv2d": {"weights": _INT4},
    "depthwise_conv2d": {"weights": _INT4},
    # rounded as a convolution; int4 is refused with a scale per channel
    "dense": {"arithmetic": litert.REFERENCE_KERNELS["conv2d"].arithmetic, "weights": {}},
    "mul": {"arithmetic": _both(_mul)},
    "clip": {"arithmetic": _both(rescale), "fuses": ("NONE", "RELU")},  # RELU6 does not requantize
    "leaky_relu": {"arithmetic": _both(_leaky_relu)},
    "softmax": {"arithmetic": {**_only_8("softmax"), 16: softmax_16(RECIPROCAL)}},
    "rsqrt": {"arithmetic": {**_only_8("rsqrt"), 16: rsqrt_by_table(RECIPROCAL_ROOTS, tf.float64)}},
    "argmax": {"discrete": (8,)},
    "argmin": {"discrete": (8,)},
    "reduce_max": {"arithmetic": _only_8("reduce_max")},
    "resize": {"arithmetic": _only_8("resize")},
    "reduce_min": {"arithmetic": _only_8("reduce_min")},
    "gather": {"arithmetic": _only_8("gather")},
    "take_along": {"arithmetic": _only_8("take_along")},
    "embedding": {"arithmetic": _only_8("embedding")},
    # in float, what has no table
    "function": {"operators": {k: v for k, v in _FUNCTION.items() if k not in ("POW", "SIGN", "ATAN2")}},
    "transpose": {"max_rank": 5},
    "slice": {"max_rank": 4},
}
_MISSING = frozenset({"gelu", "top_k", "top_k_indices"})

KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {op: replace(k, **_CHANGES.get(op, {})) for op, k in litert.REFERENCE_KERNELS.items() if op not in _MISSING}
)
REFERENCE: Mapping[str, Reference] = MappingProxyType(
    {**litert.REFERENCE, **{code: Reference(compute=f) for code, f in DIFFERENT.items()}}
)
