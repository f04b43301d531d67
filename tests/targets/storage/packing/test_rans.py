"""The coder: what goes in comes out, at the price that the frequencies say."""

from __future__ import annotations

import numpy as np
import pytest

from kquant.errors import PackError
from kquant.targets.storage.packing import rans


def table(seed: int, values: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frequencies, starts and slots of a random distribution, one row."""
    rng = np.random.default_rng(seed)
    freq = np.zeros((1, 256), np.int64)
    freq[0, :values] = 1 + rng.multinomial(rans.TOTAL - values, rng.dirichlet(np.ones(values)))
    start = np.cumsum(freq, axis=1) - freq
    return freq, start, np.repeat(np.arange(256, dtype=np.uint8), freq[0])[None]


@pytest.mark.parametrize("sizes, lanes, values", [((1000,), 16, 200), ((3, 500, 0, 77), 8, 3), ((40,), 64, 1)])
def test_symbols_and_payload_come_back(sizes: tuple[int, ...], lanes: int, values: int) -> None:
    rng = np.random.default_rng(len(sizes))
    freq, start, slots = table(1, values)
    runs = [rng.choice(256, n, p=freq[0] / rans.TOTAL) for n in sizes]
    payload = rng.integers(0, 1 << 16, lanes).astype(np.uint16)
    states, words = rans.encode([(freq[0, s], start[0, s]) for s in runs], lanes, payload)
    decoder = rans.Decoder(states, words)
    for symbols in runs:
        rows = np.zeros(len(symbols), np.int64)
        np.testing.assert_array_equal(decoder.run(rows, slots, freq, start), symbols)
    np.testing.assert_array_equal(decoder.payload(), payload)


def test_the_length_is_that_of_the_information() -> None:
    """Shannon's: log2(2^14 / f) bits for each symbol; and a byte or so for a lane, beside its payload."""
    freq, start, _ = table(2, 60)
    symbols = np.random.default_rng(3).choice(256, 50_000, p=freq[0] / rans.TOTAL)
    states, words = rans.encode([(freq[0, symbols], start[0, symbols])], 32, np.zeros(32, np.uint16))
    information = float(np.sum(rans.BITS - np.log2(freq[0, symbols])))
    length = 16 * len(words) + 32 * len(states)
    assert 0 <= length - information - 16 * 32 < 32 * 17 + 0.0005 * information


def test_words_that_are_missing_or_left_over_are_noticed() -> None:
    freq, start, slots = table(4, 100)
    symbols = np.random.default_rng(5).choice(256, 2000, p=freq[0] / rans.TOTAL)
    states, words = rans.encode([(freq[0, symbols], start[0, symbols])], 8, np.zeros(8, np.uint16))
    rows = np.zeros(len(symbols), np.int64)
    with pytest.raises(PackError, match="too early"):
        rans.Decoder(states, words[:-1]).run(rows, slots, freq, start)
    longer = rans.Decoder(states, np.append(words, np.uint16(1)))
    longer.run(rows, slots, freq, start)
    with pytest.raises(PackError, match="end where"):
        longer.payload()


@pytest.mark.parametrize("symbols", [0, 100, 20_000, 10**7])
def test_the_number_of_lanes_is_a_power_of_two(symbols: int) -> None:
    lanes = rans.lanes_for(symbols)
    assert lanes & (lanes - 1) == 0 and 8 <= lanes <= 4096
