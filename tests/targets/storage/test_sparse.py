"""Sparse tensors: the values come back, and the axis that is compressed is the one that takes the fewest bytes."""

from __future__ import annotations

import numpy as np
import pytest

from kquant.errors import ExportError
from kquant.targets.storage import sparse


def pruned(shape: tuple[int, ...], zeros: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 127, shape) * (rng.random(shape) >= zeros)).astype(np.int8)


@pytest.mark.parametrize("shape", [(7,), (4, 300), (8, 3, 3, 16), (1, 3, 3, 40), (64, 1, 1, 8)])
@pytest.mark.parametrize("zeros", [0.0, 0.6, 1.0])
def test_the_values_come_back(shape: tuple[int, ...], zeros: float) -> None:
    values = pruned(shape, zeros)
    kept, sparsity, _ = sparse.encode(values)
    np.testing.assert_array_equal(sparse.decode(kept, shape, sparsity), values)
    assert len(kept) == np.count_nonzero(values)


def test_the_compressed_axis_is_the_one_of_fewest_rows() -> None:
    _, sparsity, size = sparse.encode(pruned((64, 1, 1, 8), 0.8))
    assert list(sparsity.traversalOrder) == [1, 2, 3, 0]
    kept = np.count_nonzero(pruned((64, 1, 1, 8), 0.8))
    assert size == kept + kept + 9 * (1 if kept < 256 else 2)  # values, indices, where each row starts


def test_other_forms_are_refused() -> None:
    kept, sparsity, _ = sparse.encode(pruned((8, 8), 0.5))
    sparsity.dimMetadata = sparsity.dimMetadata[::-1]
    with pytest.raises(ExportError, match="blocks"):
        sparse.decode(kept, (8, 8), sparsity)
