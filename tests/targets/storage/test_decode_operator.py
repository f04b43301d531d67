"""What DECODE reads: ways of encoding that give back the values, and one table as the kernel's own tests have it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from kquant.errors import ExportError
from kquant.targets.storage import decode_operator as d

INT8 = np.dtype(np.int8)


def weights(width: float, shape: tuple[int, ...] = (16, 3, 3, 8), seed: int = 0) -> np.ndarray:
    values = np.rint(np.random.default_rng(seed).normal(0, width, shape))
    return np.clip(values, -127, 127).astype(np.int8)


def decoded(e: d.Encoded, values: np.ndarray, channels: int = 1, last: bool = False) -> np.ndarray:
    return d.decode(e.values, e.ancillary, values.size, channels, last, INT8).reshape(values.shape)


@pytest.mark.parametrize("width", [0, 0.3, 1, 5, 40])
def test_every_way_gives_the_values_back(width: float) -> None:
    values = weights(width)
    code = d.huffman_code(Counter(values.reshape(-1).tolist()))
    assert code is not None
    ways = [code.encode(values), d.encode_pruned(values), d.encode_table(values), d.encode_tables(values, last=False)]
    for way in ways:
        if way is not None:
            np.testing.assert_array_equal(decoded(way, values, channels=16), values)
    last = d.encode_tables(values, last=True)
    if last is not None:
        np.testing.assert_array_equal(decoded(last, values, channels=8, last=True), values)
    assert (d.encode_table(values) is None) == (width == 40)  # more than 128 levels


def test_a_table_has_the_bits_that_its_levels_need() -> None:
    values = np.resize(np.array([-9, 0, 4, 77, 5], np.int8), 40)
    made = d.encode_table(values)
    assert made is not None and (made.ancillary[0], made.ancillary[5], made.ancillary[6]) == (d.TABLE, 3, 0)
    assert len(made.values) == 15 and len(made.ancillary) == 16 + 5
    assert made.values[0] >> 5 == 0 and made.values[0] >> 2 & 7 == 1  # -9, 0: the first in the highest bits


def test_each_channel_has_a_table_of_its_own() -> None:
    values = np.array([[1, 2, 1, 2], [50, 50, 50, 60]], np.int8)
    made = d.encode_tables(values, last=False)
    assert made is not None and made.ancillary[5:7] == bytes([1, 2])
    assert made.values == bytes([0b01010001]) and made.ancillary[16:] == bytes([1, 2, 50, 60])


def test_pruned_values_are_a_mask_and_the_others() -> None:
    made = d.encode_pruned(np.array([0, 3, 0, 0, -1, 0, 0, 0, 9], np.int8))
    assert made.values == bytes([0b01001000, 0b10000000]) and made.ancillary[16:] == bytes([3, 255, 9])


def test_the_linked_tables_are_read_as_the_kernel_reads_them() -> None:
    """The tables and a stream of the kernel's own tests (decode_state_huffman_test.cc): 'n', 'm', 'm', 'a', ..."""
    entries = (
        *(0x986D, 0x9861, 0x986A, 0x0005, 0x0806, 0x0809, 0x000E, 0x000F, 0x886F, 0x8868, 0x8864, 0x8864),
        *(0x9069, 0x9066, 0x8863, 0x8863, 0x0002, 0x906B, 0x8867, 0x886C, 0x8865, 0x8862, 0x8870, 0x886E),
    )
    ancillary = bytes([1, 1, 0, 0, 1, 0x20]).ljust(16, b"\0") + np.asarray(entries, "<u2").tobytes()
    found = d.decode(bytes.fromhex("f00d79fc9c1a6e4c"), ancillary, 16, 1, False, INT8)
    assert bytes(found.view(np.uint8)).decode() == "nmmacnanefdacopj"


def test_words_are_whole_and_hold_what_is_looked_up_for_the_last_symbol() -> None:
    values = weights(6)
    code = d.huffman_code(Counter(values.reshape(-1).tolist()))
    assert code is not None
    made = code.encode(values)
    used = code.bits(Counter(values.reshape(-1).tolist()))
    assert len(made.values) % 4 == 0 and used + 10 <= 8 * len(made.values) < used + 10 + 32


def test_tables_take_fewer_entries_than_one_for_the_longest_code() -> None:
    counts = {k: 1 << (18 - k) for k in range(18)}  # codes of 1 to 17 bits
    code = d.huffman_code(counts)
    assert code is not None and max(length for length, _ in code.codes.values()) == 17
    assert len(code.tables) == 2 * 17
    values = np.repeat(np.arange(18), 3).astype(np.int8)
    np.testing.assert_array_equal(decoded(code.encode(values), values), values)


@pytest.mark.parametrize(
    "ancillary",
    [b"", bytes(16), bytes([7, 1, 0, 0, 1]).ljust(20, b"\0"), bytes([1, 1, 0, 0, 1, 0x21]).ljust(40, b"\0"),
     bytes([1, 1, 0, 0, 1, 0]).ljust(20, b"\0"), bytes([0, 1, 0, 0, 1, 7]).ljust(17, b"\0")],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(ancillary: bytes) -> None:
    with pytest.raises(ExportError, match="DECODE"):
        d.decode(b"\xff" * 4, ancillary, 4, 1, False, INT8)
