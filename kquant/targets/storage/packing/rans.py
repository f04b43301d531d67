"""Many interleaved range coders on numpy arrays: rANS (Duda 2013, arXiv 1311.2540) with a state per lane.

Symbol n of a run belongs to lane n mod L, so that one numpy operation advances L coders. A state lies in
[2^16, 2^32); coding a symbol of frequency f (of 2^14) that starts at c in the cumulated frequencies makes
x -> (x div f) 2^14 + x mod f + c of it, after 16 bits of it were written where it would grow too large. The encoder
works backwards, the decoder forwards. A lane starts from 2^16 plus 16 bits of payload, which the decoder finds in its
last state; so a lane costs about a byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kquant.errors import PackError

BITS = 14
TOTAL = 1 << BITS
_LOW = 1 << 16
_STEPS = 1024  # of numpy operations that a file should take: fewer lanes cost fewer bytes, more take less time
_MOST_LANES = 4096

Array = np.ndarray


def lanes_for(symbols: int) -> int:
    """How many lanes to code so many symbols with: a power of two."""
    return int(min(_MOST_LANES, max(8, 1 << (max(1, symbols // _STEPS) - 1).bit_length())))


def encode(runs: Sequence[tuple[Array, Array]], lanes: int, payload: Array) -> tuple[Array, Array]:
    """Code runs of symbols, each a pair of arrays: frequency of the symbol, and where it starts (both below 2^14 + 1).

    Args:
        runs: in the order of decoding.
        lanes: number of coders.
        payload: uint16 (lanes,), given back by the decoder.

    Returns:
        The last states, uint32 (lanes,), and the words, uint16, in the order of decoding.
    """
    x = payload.astype(np.uint64) + _LOW
    words: list[Array] = []
    block = lanes * _STEPS // 4  # what is held as wide integers
    for freq, start in reversed(runs):
        for first in range((len(freq) - 1) // block * block, -1, -block):
            f64, c64 = (a[first : first + block].astype(np.uint64) for a in (freq, start))
            limits = f64 << np.uint64(32 - BITS)
            for low in range((len(f64) - 1) // lanes * lanes, -1, -lanes):
                high = min(low + lanes, len(f64))
                f, part = f64[low:high], x[: high - low]
                large = part >= limits[low:high]
                words.append(part[large].astype(np.uint16))
                part = np.where(large, part >> np.uint64(16), part)
                quotient = part // f
                x[: high - low] = (quotient << np.uint64(BITS)) + (part - quotient * f) + c64[low:high]
    words.reverse()
    return x.astype(np.uint32), np.concatenate(words) if words else np.zeros(0, np.uint16)


class Decoder:
    """The way back.

    Args:
        states: uint32 (lanes,).
        words: uint16.
    """

    def __init__(self, states: Array, words: Array) -> None:
        self._x = states.astype(np.int64)
        self._words = words.astype(np.int64)
        self._at = 0

    def run(self, rows: Array, slots: Array, freq: Array, start: Array) -> Array:
        """The symbols of one run, uint8.

        Args:
            rows: row of the tables that codes each symbol.
            slots: uint8 (rows, 2^14): the symbol at each place of the cumulated frequencies.
            freq, start: int64 (rows, 256): frequency of each symbol, and where it starts.

        Raises:
            PackError: there are too few words.
        """
        lanes, found = len(self._x), np.empty(len(rows), np.uint8)
        flat_slots, flat_freq, flat_start = slots.reshape(-1), freq.reshape(-1), start.reshape(-1)
        in_slots, in_rows = rows.astype(np.int64) << BITS, rows.astype(np.int64) << 8
        for low in range(0, len(rows), lanes):
            high = min(low + lanes, len(rows))
            x = self._x[: high - low]
            slot = x & (TOTAL - 1)
            symbol = flat_slots.take(in_slots[low:high] + slot)
            found[low:high] = symbol
            at = in_rows[low:high] + symbol
            x = flat_freq.take(at) * (x >> BITS) + slot - flat_start.take(at)
            small = np.flatnonzero(x < _LOW)
            end = self._at + len(small)
            if end > len(self._words):
                raise PackError("the packed file is damaged: its coded part ends too early")
            x[small] = (x[small] << 16) | self._words[self._at : end]
            self._at = end
            self._x[: high - low] = x
        return found

    def payload(self) -> Array:
        """What the lanes started from, uint16 (lanes,).

        Raises:
            PackError: the words were not those of the symbols.
        """
        if self._at != len(self._words) or np.any(self._x >> 16 != 1):
            raise PackError("the packed file is damaged: its coded part does not end where it should")
        return (self._x & 0xFFFF).astype(np.uint16)
