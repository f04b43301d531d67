"""Huffman codes: the shortest whole-bit code for each value (Huffman 1952), in canonical form."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import numpy as np


def lengths(counts: Mapping[int, int]) -> dict[int, int]:
    """Bits of the code of each symbol; of a single symbol, none.

    Args:
        counts: symbol -> how often it occurs, above 0.
    """
    heap: list[tuple[int, int, tuple[int, ...]]] = [
        (count, k, (symbol,)) for k, (symbol, count) in enumerate(sorted(counts.items()))
    ]
    heapq.heapify(heap)
    found = dict.fromkeys(counts, 0)
    while len(heap) > 1:
        a, b = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in a[2] + b[2]:
            found[symbol] += 1
        heapq.heappush(heap, (a[0] + b[0], a[1], a[2] + b[2]))
    return found


def canonical(bits: Mapping[int, int]) -> dict[int, tuple[int, int]]:
    """Symbol -> (length, code): codes of equal length rise with the symbols, and shorter ones come first.

    Args:
        bits: symbol -> length of its code.
    """
    made, code, last = {}, 0, 0
    for symbol, length in sorted(bits.items(), key=lambda item: (item[1], item[0])):
        code <<= length - last
        made[symbol], code, last = (length, code), code + 1, length
    return made


def mean_bits(values: np.ndarray) -> float:
    """Bits per value of a Huffman code for these values, without its table."""
    symbols, counts = np.unique(values, return_counts=True)
    bits = lengths(dict(zip(symbols.tolist(), counts.tolist(), strict=True)))
    return sum(bits[s] * c for s, c in zip(symbols.tolist(), counts.tolist(), strict=True)) / max(1, np.size(values))
