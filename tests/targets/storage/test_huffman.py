"""Huffman codes: prefix-free, optimal, canonical."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kquant.targets.storage.huffman import canonical, lengths, mean_bits


def counts_of(seed: int) -> dict[int, int]:
    rng = np.random.default_rng(seed)
    return {int(k): int(c) for k, c in enumerate(rng.integers(1, 1000, rng.integers(2, 60)))}


@pytest.mark.parametrize("seed", range(5))
def test_codes_are_complete_and_within_a_bit_of_the_entropy(seed: int) -> None:
    """Kraft's sum is one, and entropy <= bits < entropy + 1 (Cover and Thomas, theorem 5.4.1)."""
    counts = counts_of(seed)
    bits = lengths(counts)
    assert sum(2.0**-b for b in bits.values()) == 1
    share = np.array(list(counts.values())) / sum(counts.values())
    entropy = float(-np.sum(share * np.log2(share)))
    mean = float(np.sum(share * [bits[s] for s in counts]))
    assert entropy <= mean + 1e-12 < entropy + 1


def test_few_symbols_have_the_shortest_of_all_codes() -> None:
    """Against all lengths that satisfy Kraft's inequality."""
    counts = {0: 7, 1: 1, 2: 3, 3: 1, 4: 2}
    possible = (p for p in itertools.product(range(1, 5), repeat=5) if sum(2.0**-b for b in p) <= 1)
    best = min(sum(c * b for c, b in zip(counts.values(), p, strict=True)) for p in possible)
    bits = lengths(counts)
    assert sum(counts[s] * b for s, b in bits.items()) == best


@pytest.mark.parametrize("seed", range(3))
def test_canonical_codes_are_prefix_free_and_in_order(seed: int) -> None:
    codes = canonical(lengths(counts_of(seed)))
    texts = [f"{code:0{length}b}" for length, code in codes.values()]
    assert not any(a != b and b.startswith(a) for a in texts for b in texts)
    places = sorted((length, symbol) for symbol, (length, _) in codes.items())
    assert [codes[s] for _, s in places] == sorted(codes.values())


def test_powers_of_two_are_coded_at_their_entropy() -> None:
    values = np.repeat([5, -3, 0, 7], [8, 4, 2, 2])
    assert mean_bits(values) == 1.75
    assert mean_bits(np.full(9, 4)) == 0


@pytest.mark.parametrize("width, more", [(3, 1.02), (30, 1.02), (0.8, 1.1)])  # of few levels, each has a bit at least
def test_the_code_of_weights_is_near_their_entropy(width: float, more: float) -> None:
    values = np.rint(np.random.default_rng(1).normal(0, width, 20_000)).astype(int)
    share = np.unique(values, return_counts=True)[1] / len(values)
    assert mean_bits(values) <= more * -np.sum(share * np.log2(share))
