"""What the operator DECODE of TensorFlow Lite Micro reads: encoded values and, beside them, how they are encoded.

The second ("ancillary") tensor starts with 16 bytes: the kind, version 1, two zeros, and from the fifth on parameters
of the kind, of which the first is its version, 1.

* 0, a table: the values are indices of 1 to 7 bits, most significant bits first; parameters: the bits, and the stride
  from a channel's table to the next; then the tables.
* 1, Huffman: the values are codes, their first bit the highest, in 32-bit words that are stored big-endian; parameter:
  the bits to look up first, less one, in the upper half of the byte; then linked tables.
* 2, pruned: the values are a bit for each, whether it is not zero; then those that are not.

An entry of the Huffman tables has 16 bits. The highest is set where a symbol is found: the next four say how many of
the bits that were looked up belong to it, and the lowest are the symbol. Otherwise the four are the bits to look up
next, less one, and the lowest eleven say how far behind this entry the table for them is. Source: the kernels
decode_state_*.cc of tflite-micro.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kquant.errors import ExportError
from kquant.targets.storage import huffman

CUSTOM_CODE = "TFLM_DECODE"
TABLE, HUFFMAN, PRUNED = 0, 1, 2
KINDS = {TABLE: "table", HUFFMAN: "Huffman", PRUNED: "pruned"}
MOST_INDEX_BITS = 7
_HEAD = 16
_FOUND, _COUNT_AT, _COUNT, _VALUE = 0x8000, 11, 15, 0x07FF
_MOST_LOOKED_UP = 11  # bits, so that the next table is within reach
_DIRECT = 20  # bits of the longest code that is decoded by one look-up

Array = np.ndarray


@dataclass(frozen=True)
class Encoded:
    """Values as DECODE reads them: two tensors of bytes."""

    kind: int
    values: bytes
    ancillary: bytes


def encode_table(values: Array) -> Encoded | None:
    """Indices into one table for all channels (a stride of 0); None where there are too many distinct values.

    Args:
        values: int8, any shape.
    """
    table, index = np.unique(values, return_inverse=True)
    bits = _index_bits(len(table))
    if bits > MOST_INDEX_BITS:
        return None
    return Encoded(TABLE, _packed(index.reshape(-1), bits), _head(TABLE, 1, bits, 0) + table.astype(np.int8).tobytes())


def encode_tables(values: Array, last: bool) -> Encoded | None:
    """Indices into a table for each channel; None where a channel has too many distinct values.

    Args:
        values: int8, any shape.
        last: the channels are the last axis; otherwise the first.
    """
    rows = np.moveaxis(values, -1 if last else 0, 0)
    rows = rows.reshape(len(rows), -1).astype(np.int64)
    present = np.zeros((len(rows), 256), bool)
    present[np.arange(len(rows))[:, None], rows + 128] = True
    stride = int(present.sum(axis=1).max())
    bits = _index_bits(stride)
    if bits > MOST_INDEX_BITS:
        return None
    ranks = np.cumsum(present, axis=1) - 1
    index = ranks[np.arange(len(rows))[:, None], rows + 128]
    index = index.T.reshape(-1) if last else index.reshape(-1)
    tables = np.zeros((len(rows), stride), np.int8)
    row, value = np.nonzero(present)
    tables[row, ranks[row, value]] = value - 128
    return Encoded(TABLE, _packed(index, bits), _head(TABLE, 1, bits, stride) + tables.tobytes())


def _index_bits(levels: int) -> int:
    return max(1, (levels - 1).bit_length())


def _packed(index: Array, bits: int) -> bytes:
    places = np.arange(bits - 1, -1, -1)
    return np.packbits((index[:, None] >> places & 1).astype(np.uint8)).tobytes()


def encode_pruned(values: Array) -> Encoded:
    """A bit for each value, and those that are not 0.

    Args:
        values: int8, any shape.
    """
    flat = np.asarray(values, np.int8).reshape(-1)
    return Encoded(PRUNED, np.packbits(flat != 0).tobytes(), _head(PRUNED, 1) + flat[flat != 0].tobytes())


@dataclass(frozen=True)
class Code:
    """A Huffman code for int8 values.

    Attributes:
        codes: symbol -> (length, code).
        first: bits that are looked up first.
        tables: entries of the linked tables.
    """

    codes: Mapping[int, tuple[int, int]]
    first: int
    tables: tuple[int, ...]

    @property
    def ancillary(self) -> bytes:
        """The second tensor, which tensors with the same code may share."""
        return _head(HUFFMAN, 1, (self.first - 1) << 4) + np.asarray(self.tables, "<u2").tobytes()

    def bits(self, counts: Mapping[int, int]) -> int:
        """Bits of so many symbols."""
        return sum(self.codes[symbol][0] * count for symbol, count in counts.items())

    def encode(self, values: Array) -> Encoded:
        """Values in this code."""
        symbols = np.asarray(values, np.int8).reshape(-1).astype(np.int64)
        width = max(length for length, _ in self.codes.values())
        rows, sizes = np.zeros((256, max(1, width)), np.uint8), np.zeros(256, np.int64)
        for symbol, (length, code) in self.codes.items():
            sizes[symbol & 255] = length
            rows[symbol & 255, :length] = [code >> (length - 1 - k) & 1 for k in range(length)]
        at = symbols & 255
        bits = rows[at][np.arange(rows.shape[1]) < sizes[at][:, None]]
        # for the last symbol the kernel looks up more bits than it has; and it starts with a word
        whole = max(4, (len(bits) + _MOST_LOOKED_UP - 1 + 31) // 32 * 4)
        return Encoded(HUFFMAN, np.packbits(bits).tobytes().ljust(whole, b"\0"), self.ancillary)


def huffman_code(counts: Mapping[int, int]) -> Code | None:
    """The code for symbols that occur so often; None where its tables are out of the kernel's reach."""
    codes = huffman.canonical(huffman.lengths(counts))
    tree = _Tree(codes)
    first = tree.best(0, 0)[1]
    entries = tree.tables(first)
    return None if entries is None else Code(codes, first, entries)


class _Tree:
    """The prefixes of a code, and the linked tables for them that take the fewest entries."""

    def __init__(self, codes: Mapping[int, tuple[int, int]]) -> None:
        self._leaves = {place: symbol for symbol, place in codes.items()}
        self._inner: dict[int, list[int]] = {}
        for length, code in codes.values():
            for depth in range(length):
                self._inner.setdefault(depth, []).append(code >> (length - depth))
        self._inner = {depth: sorted(set(found)) for depth, found in self._inner.items()}
        self._depth = max(length for length, _ in codes.values())
        self._best: dict[tuple[int, int], tuple[int, int]] = {}

    def best(self, depth: int, prefix: int) -> tuple[int, int]:
        """(entries of the tables for what follows a prefix, bits that the first of them looks up)."""
        if (depth, prefix) not in self._best:
            choices = []
            for bits in range(1, max(1, min(_MOST_LOOKED_UP, self._depth - depth)) + 1):
                below = self._below(depth, prefix, bits)
                choices.append(((1 << bits) + sum(self.best(depth + bits, p)[0] for p in below), bits))
            self._best[depth, prefix] = min(choices, key=lambda c: (c[0], -c[1]))
        return self._best[depth, prefix]

    def _below(self, depth: int, prefix: int, bits: int) -> list[int]:
        return [p for p in self._inner.get(depth + bits, ()) if p >> bits == prefix]

    def tables(self, first: int) -> tuple[int, ...] | None:
        """The entries, tables in the order in which they are met; None where one is too far away."""
        entries: list[int] = [0] * (1 << first)
        waiting = [(0, 0, 0, first)]
        for at, depth, prefix, bits in waiting:
            for index in range(1 << bits):
                here, path = at + index, prefix << bits | index
                leaf = next((k for k in range(bits + 1) if (depth + k, path >> (bits - k)) in self._leaves), None)
                if leaf is not None:
                    symbol = self._leaves[depth + leaf, path >> (bits - leaf)]
                    entries[here] = _FOUND | leaf << _COUNT_AT | symbol & 255
                elif path in self._inner.get(depth + bits, ()):
                    following = self.best(depth + bits, path)[1]
                    distance = len(entries) - here
                    if distance > _VALUE:
                        return None
                    entries[here] = (following - 1) << _COUNT_AT | distance
                    waiting.append((len(entries), depth + bits, path, following))
                    entries += [0] * (1 << following)
        return tuple(entries)


def _head(*parameters: int) -> bytes:
    kind, *rest = parameters
    return bytes([kind, 1, 0, 0, *rest]).ljust(_HEAD, b"\0")


def decode(values: bytes, ancillary: bytes, count: int, channels: int, last: bool, dtype: np.dtype) -> Array:
    """What DECODE makes of two tensors.

    Args:
        values: the first, as stored.
        ancillary: the second.
        count: values of the output.
        channels: scales of the output.
        last: the channels are its last axis; otherwise the first.
        dtype: of the output.

    Raises:
        ExportError: it cannot be read.
    """
    if len(ancillary) < _HEAD or ancillary[0] not in KINDS or ancillary[1] != 1 or ancillary[4] != 1:
        raise ExportError(f"a tensor for DECODE is of a kind or version that is not known: {ancillary[:8].hex()}")
    try:
        if ancillary[0] == TABLE:
            return _from_table(values, ancillary, count, channels, last, dtype)
        if ancillary[0] == PRUNED:
            return _from_pruned(values, ancillary, count, dtype)
        return _from_huffman(values, ancillary, count)
    except (IndexError, ValueError) as error:
        raise ExportError(f"a tensor for DECODE is damaged: {error}; export the model again") from error


def _from_table(values: bytes, ancillary: bytes, count: int, channels: int, last: bool, dtype: np.dtype) -> Array:
    bits, stride = ancillary[5] & 7, ancillary[6]
    table = np.frombuffer(ancillary[_HEAD : len(ancillary) - (len(ancillary) - _HEAD) % dtype.itemsize], dtype)
    flat = np.unpackbits(np.frombuffer(values, np.uint8))[: count * bits].reshape(count, bits).astype(np.int64)
    index = (flat << np.arange(bits - 1, -1, -1)).sum(axis=1)
    place = np.arange(count)
    channel = place % channels if last else place // (count // channels)
    return table[index + stride * channel]


def _from_pruned(values: bytes, ancillary: bytes, count: int, dtype: np.dtype) -> Array:
    kept = np.unpackbits(np.frombuffer(values, np.uint8))[:count].astype(bool)
    made = np.zeros(count, dtype)
    made[kept] = np.frombuffer(ancillary[_HEAD:], dtype)[: int(kept.sum())]
    return made


@lru_cache(maxsize=8)
def _leaves(ancillary: bytes) -> dict[tuple[int, int], int]:
    """(length, code) -> symbol of linked tables."""
    if ancillary[5] & 1:
        raise ValueError("Huffman tables of 32-bit entries are not read here")
    entries = np.frombuffer(ancillary[_HEAD:], "<u2").tolist()
    found, waiting = {}, [(0, (ancillary[5] >> 4) + 1, 0, 0)]
    for at, bits, depth, prefix in waiting:
        if len(waiting) > len(entries) or depth > 40:
            raise ValueError("its Huffman tables do not end")
        for index in range(1 << bits):
            entry, path = entries[at + index], prefix << bits | index
            count = entry >> _COUNT_AT & _COUNT
            if entry & _FOUND:
                symbol = (entry & 255) - (entry & 128) * 2
                found[depth + count, path >> (bits - count)] = symbol
            else:
                waiting.append((at + index + (entry & _VALUE), count + 1, depth + bits, path))
    return found


def _from_huffman(values: bytes, ancillary: bytes, count: int) -> Array:
    leaves = _leaves(ancillary)
    longest = max(length for length, _ in leaves)
    if longest == 0:
        return np.full(count, leaves[0, 0], np.int8)
    if longest > _DIRECT:
        raise ValueError(f"its Huffman code is longer than {_DIRECT} bits")
    symbols, sizes = np.zeros(1 << longest, np.int8), np.zeros(1 << longest, np.int64)
    for (length, code), symbol in leaves.items():
        covered = slice(code << (longest - length), (code + 1) << (longest - length))
        symbols[covered], sizes[covered] = symbol, length
    raw = np.frombuffer(values + bytes(8), np.uint8).astype(np.int64)
    window = raw[:-4] << 24 | raw[1:-3] << 16 | raw[2:-2] << 8 | raw[3:-1]
    places = np.arange(8 * len(values))
    ahead = window[places >> 3] >> (32 - longest - (places & 7)) & ((1 << longest) - 1)
    following = (places + sizes[ahead]).tolist()
    at, path = 0, []
    for _ in range(count):
        path.append(at)
        at = following[at]
    return symbols[ahead[path]]
