"""Which parts of a .tflite file are arrays of numbers: weights with their channels, biases, scales.

The file is read as the flatbuffer that it claims to be, with no more trust than that: what does not fit raises one of
NOT_A_FILE. Only bytes outside of the sections are read, so that a file without them is understood as the whole is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

NOT_A_FILE = (struct.error, IndexError, ValueError, OverflowError)
_LEAST = 8  # numbers; shorter arrays are left where they are
# of the schema's TensorType -> (kind, bits of a value)
_KINDS = {
    9: ("integers", 8),
    17: ("integers", 4),
    20: ("integers", 2),
    2: ("numbers", 32),
    0: ("floats", 32),
    1: ("floats", 16),
}


@dataclass(frozen=True)
class Section:
    """A range of bytes that holds an array.

    Attributes:
        start, size: in bytes.
        kind: "integers" (weights, of 8, 4 or 2 bits), "numbers" (int32), "scales" (float32 > 0), "floats".
        bits: of a value.
        shape: of integers: outputs, taps, inputs, and whether the outputs are the last axis in the file.
        name: of the tensor.
        product: of scales: where the scale of an input and those of its weights start, whose product these may be.
    """

    start: int
    size: int
    kind: str
    bits: int
    shape: tuple[int, int, int, bool] = (1, 1, 1, False)
    name: str = ""
    product: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return 8 * self.size // self.bits


class _Table:
    """A table of a flatbuffer."""

    def __init__(self, content: bytes, at: int, left: list[int] | None = None) -> None:
        self.content, self.at = content, at
        # how many tables may still be read: a file has no more than it has room for, unless they overlap
        self._left = [len(content) // 4] if left is None else left
        self._left[0] -= 1
        if self._left[0] < 0:
            raise ValueError("too many tables")
        self._vtable = at - struct.unpack_from("<i", content, at)[0]
        if self._vtable < 0:
            raise ValueError("a table without a description")
        self._size = struct.unpack_from("<H", content, self._vtable)[0]

    def field(self, number: int) -> int:
        """Where a field is; 0 if it is not there."""
        place = 4 + 2 * number
        offset = struct.unpack_from("<H", self.content, self._vtable + place)[0] if place + 2 <= self._size else 0
        return self.at + offset if offset else 0

    def number(self, number: int, code: str) -> int:
        """A number; 0 if it is not there."""
        place = self.field(number)
        return int(struct.unpack_from("<" + code, self.content, place)[0]) if place else 0

    def vector(self, number: int, width: int) -> tuple[int, int]:
        """Start and length of a vector of entries of `width` bytes; (0, 0) if it is not there."""
        place = self.field(number)
        if not place:
            return 0, 0
        at = place + struct.unpack_from("<I", self.content, place)[0]
        length = struct.unpack_from("<I", self.content, at)[0]
        if at + 4 + length * width > len(self.content):
            raise ValueError("a vector beyond the end")
        return at + 4, length

    def table(self, number: int) -> _Table | None:
        """Another table; None if it is not there."""
        place = self.field(number)
        return self._at(place) if place else None

    def tables(self, number: int) -> list[_Table]:
        """A vector of tables."""
        start, length = self.vector(number, 4)
        return [self._at(start + 4 * k) for k in range(length)]

    def _at(self, place: int) -> _Table:
        """The table that an offset leads to."""
        return _Table(self.content, place + struct.unpack_from("<I", self.content, place)[0], self._left)


def sections(content: bytes) -> tuple[Section, ...]:
    """The sections of a file, in order, none over another.

    Raises:
        One of NOT_A_FILE: it is no such file.
    """
    if content[4:8] != b"TFL3":
        raise ValueError("no identifier")
    model = _Table(content, struct.unpack_from("<I", content, 0)[0])
    data = [buffer.vector(0, 1) for buffer in model.tables(4)]
    found: dict[int, Section] = {}
    products: set[int] = set()  # none is that of another
    for graph in model.tables(2):
        tensors = graph.tables(0)
        grids = [_grid(t) for t in tensors]
        for tensor, (grid, axis) in zip(tensors, grids, strict=True):
            for section in _of_tensor(tensor, data, grid, axis):
                found.setdefault(section.start, section)
        for section in _products(graph, [grid for grid, _ in grids]):
            if section.start in found and section.product is not None and section.product[1] not in products:
                products.add(section.start)
                found[section.start] = replace(section, name=found[section.start].name)
    kept, end = [], 8
    for start in sorted(found):
        if start >= end:
            kept.append(found[start])
            end = start + found[start].size
    return tuple(kept)


def _grid(tensor: _Table) -> tuple[tuple[int, int], int]:
    """(start and length of the scales, axis of the channels)."""
    quantization = tensor.table(4)
    return ((0, 0), 0) if quantization is None else (quantization.vector(2, 4), quantization.number(6, "i"))


def _of_tensor(tensor: _Table, data: list[tuple[int, int]], scales: tuple[int, int], axis: int) -> Iterator[Section]:
    """The sections that a tensor has."""
    place, length = tensor.vector(3, 1)
    name = tensor.content[place : place + length].decode(errors="replace")
    if scales[1] >= _LEAST:
        yield Section(scales[0], 4 * scales[1], "scales", 32, name=name)
    kind, bits = _KINDS.get(tensor.number(1, "b"), ("", 0))
    start, size = data[tensor.number(2, "I")]
    if not kind or size * 8 < _LEAST * bits:
        return
    if kind != "integers":
        if size % (bits // 8) == 0:
            yield Section(start, size, kind, bits, name=name)
        return
    place, rank = tensor.vector(0, 4)
    shape = struct.unpack_from(f"<{rank}i", tensor.content, place)
    count = 1
    for d in shape:
        count *= d
    if rank and min(shape) > 0 and (count * bits + 7) // 8 == size and count * bits % 8 == 0:
        yield Section(start, size, kind, bits, _matrix(shape, axis if scales[1] > 1 else 0), name)


def _matrix(shape: tuple[int, ...], axis: int) -> tuple[int, int, int, bool]:
    """Outputs, taps, inputs: OHWI kernels, depthwise ones (1HWO), rows."""
    total = 1
    for d in shape:
        total *= d
    if axis == len(shape) - 1 and len(shape) > 1 and shape[0] == 1:
        return shape[-1], total // shape[-1], 1, True
    taps = 1
    for d in shape[1:-1]:
        taps *= d
    return shape[0], taps, total // (shape[0] * taps), False


def _products(graph: _Table, grids: list[tuple[int, int]]) -> Iterator[Section]:
    """Scales of biases, which are those of the weights times that of the input."""
    for operator in graph.tables(3):
        start, length = operator.vector(1, 4)
        if length < 3:
            continue
        x, w, bias = struct.unpack_from("<3i", graph.content, start)
        if min(x, w, bias) < 0:
            continue
        of_x, of_w, of_bias = grids[x], grids[w], grids[bias]
        if of_bias[1] >= _LEAST and of_w[1] == of_bias[1] and of_x[1] == 1 and of_w[0] != of_bias[0]:
            yield Section(of_bias[0], 4 * of_bias[1], "scales", 32, product=(of_x[0], of_w[0]))
