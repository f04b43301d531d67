"""A scale for every block of weights, on kernels that read such scales, and on those that have one scale per channel.

The former read them in float16 (`as_scales`). For the latter (`as_tables`) the scale of a block becomes an integer
multiple m of its channel's scale s, and the values s m q lie in the int8 tensor as m q: the block has a table of
allowed integers of its own, and no kernel needs to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kquant.errors import ConfigError
from kquant.grids.grid import Array, Grid

_LARGEST = 127
_SMALLEST = np.float32(np.finfo(np.float16).tiny)  # kernels refuse scales that are zero, or no normal numbers
_COUNTS_BY = 32  # the block sizes that kernels take are multiples of it


def block_axis_of(ndim: int, axis: int) -> int:
    """The axis that blocks run along: the last one that is not that of the channels, which is that of the inputs."""
    return ndim - 1 if axis != ndim - 1 else ndim - 2


def blocks_of(w: Array, block: int, axis: int) -> Iterator[Array]:
    """The blocks of a weight tensor; the last one may be smaller."""
    for start in range(0, w.shape[axis], block):
        yield np.take(w, np.arange(start, min(start + block, w.shape[axis])), axis)


def as_tables(parts: Sequence[Grid], block: int, block_axis: int) -> Grid:
    """One grid of the grids of the blocks, which have a scale per channel and one range of integers, or one table.

    m = round(s_block / s), s = the largest s_block / M, with M the largest multiple that int8 has room for.

    Raises:
        ConfigError: the integers of the blocks leave no room for multiples.
    """
    first = parts[0]
    q = np.arange(first.qmin, first.qmax + 1) if first.table is None else first.table
    most = _LARGEST // max(abs(first.qmin), first.qmax)
    if most < 2:
        raise ConfigError(
            f"Blocks of weights need fewer than {first.bits} bits, so that int8 has room for their scales."
        )
    scales = np.stack([p.scale for p in parts], axis=1).astype(np.float64)
    base = scales.max(axis=1, keepdims=True) / most
    multiple = np.clip(np.rint(scales / base), 1, most).astype(np.int32)
    table = multiple[:, :, None] * q.astype(np.int32)
    return Grid(
        scale=base[:, 0].astype(np.float32),
        zero_point=np.zeros(len(base), np.int32),
        qmin=int(table.min()),
        qmax=int(table.max()),
        axis=first.axis,
        table=table,
        block=block,
        block_axis=block_axis,
    )


def fits_kernels(size: int, block: int) -> bool:
    """Whether kernels take blocks of an axis: they want a multiple of 32, and whole blocks."""
    return block % _COUNTS_BY == 0 and size % block == 0


def in_float16(scale: Array) -> Array:
    """Scales as kernels have them: normal float16 numbers, here in float32."""
    largest = np.float32(np.finfo(np.float16).max)
    return np.clip(scale.astype(np.float32), _SMALLEST, largest).astype(np.float16).astype(np.float32)


def as_scales(parts: Sequence[Grid], block: int, block_axis: int) -> Grid:
    """One grid of those of the blocks, which are uniform, with their own scales, rounded to float16."""
    first = parts[0]
    return Grid(
        scale=in_float16(np.stack([p.scale for p in parts], axis=1)),
        zero_point=first.zero_point,
        qmin=first.qmin,
        qmax=first.qmax,
        axis=first.axis,
        block=block,
        block_axis=block_axis,
    )
