"""What the operators of a file take: bytes, multiplications, and operations on bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from kquant.targets.litert.reader import Operator, Program, Tensor

_PACKED = {"INT4": 4, "INT2": 2}


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one operator takes.

    Attributes:
        constants: bytes of weights, biases and other constants; one that several operators read is that of the first.
        parameters: bytes of the scales of its constants and outputs.
        macs: multiplications of one inference.
        weight_bits: bits of the widest of its weights as integers; 32 in float, 0 where it has none.
        activation_bits: bits of the type of its data.
    """

    constants: int
    parameters: int
    macs: int
    weight_bits: int
    activation_bits: int

    @property
    def bit_operations(self) -> int:
        """Multiplications times the bits of both factors."""
        return self.macs * self.weight_bits * self.activation_bits


def stored_bytes(t: Tensor) -> int:
    """Bytes of a constant as the file stores it."""
    return 0 if t.data is None else (t.data.size * _PACKED.get(t.type, 8 * t.dtype.itemsize) + 7) // 8


def sizes(program: Program) -> tuple[Size, ...]:
    """One for each operator, in order."""
    contents: set[tuple[str, bytes]] = set()  # equal constants share their bytes
    scales: set[bytes] = set()
    found = []
    for op in program.operators:
        constants = parameters = 0
        for t in (*op.inputs, *op.outputs):
            if t is None:
                continue
            if t.data is not None and (key := (t.type, t.data.tobytes())) not in contents:
                contents.add(key)
                constants += stored_bytes(t)
            if t.scale.size and (t.data is not None or t in op.outputs) and (key_ := t.scale.tobytes()) not in scales:
                scales.add(key_)
                parameters += t.scale.nbytes
        weight, macs = _macs(op)
        data = op.outputs[0] if op.outputs else None
        found.append(
            Size(
                constants=constants,
                parameters=parameters,
                macs=macs,
                weight_bits=_bits(weight),
                activation_bits=0 if data is None else 8 * data.dtype.itemsize,
            )
        )
    return tuple(found)


def _bits(weight: Tensor | None) -> int:
    """Bits of the widest integer of a weight."""
    if weight is None:
        return 0
    if weight.data is None or weight.data.dtype.kind not in "iu":
        return 8 * weight.dtype.itemsize
    low, high = int(weight.data.min(initial=0)), int(weight.data.max(initial=0))
    return max(low.__invert__().bit_length(), high.bit_length()) + 1


def _elements(t: Tensor) -> int:
    return math.prod(t.shape)


def _by_outputs(op: Operator, per_output: Callable[[Tensor], int]) -> int:
    return _elements(op.outputs[0]) * per_output(op.given(1))


# operator -> multiplications; its second input is the weight, or the second factor
_MACS: Mapping[str, Callable[[Operator], int]] = {
    "CONV_2D": lambda op: _by_outputs(op, lambda w: math.prod(w.shape[1:])),
    "DEPTHWISE_CONV_2D": lambda op: _by_outputs(op, lambda w: math.prod(w.shape[1:3])),
    "FULLY_CONNECTED": lambda op: _by_outputs(op, lambda w: w.shape[-1]),
    "BATCH_MATMUL": lambda op: _elements(op.outputs[0]) * op.given(0).shape[-1],
    "TRANSPOSE_CONV": lambda op: _elements(op.given(2)) * math.prod(op.given(1).shape[:3]),
}


def _macs(op: Operator) -> tuple[Tensor | None, int]:
    count = _MACS.get(op.code)
    return (None, 0) if count is None else (op.given(1), int(np.int64(count(op))))
