"""Means of random shapes, axes and grids: the simulation's integers are those of LiteRT's default kernels."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.targets.litert.kernels import KERNELS
from kquant.targets.litert.runtime import TFLiteModel
from kquant.targets.litert.writer import write_tflite
from kquant.targets.operand import Call, Operand
from tests.support.graphs import chain, op, rng
from tests.targets.litert.cases import scale

AXES = ((1, 2), (1,), (2,), (3,), (1, 3), (2, 3), (1, 2, 3))


def sides(g: np.random.Generator, rank: int) -> tuple[int, ...]:
    """Sizes of an image, some of them large, or of a tensor of fewer axes."""
    return tuple(int(g.integers(1, 120 if g.random() < 0.2 else 20)) for _ in range(rank - 1))


@pytest.mark.parametrize("seed", range(60))
def test_mean_equals_the_default_kernel(seed: int) -> None:
    g = rng(seed)
    rank = int(g.integers(2, 5))
    shape, keepdims = sides(g, rank), bool(g.integers(2))
    possible = [axes for axes in AXES if max(axes) < rank]
    axes = possible[g.integers(len(possible))]
    kept = [1 if k in axes else d for k, d in enumerate(shape, 1) if keepdims or k not in axes]
    graph = chain(shape, op("mean", kept, axes=axes, keepdims=keepdims))
    x = Grid(scale(g, 0.002, 0.5), np.int32(g.integers(-128, 128)), -128, 127)
    low, high = sorted(g.integers(-128, 128, 2))
    q = g.integers(low, high + 1, (int(g.integers(1, 5)), *shape)).astype(np.int8)
    values = (x.scale * (q - np.float32(x.zero_point))).mean(axes)
    step = np.float32(max(np.ptp(values) / 200, x.scale / 60) * np.exp(g.uniform(-0.5, 0.7)))
    y = Grid(step, np.int32(np.clip(np.rint(-values.mean() / step), -128, 127)), -128, 127)

    content, _ = write_tflite(QuantizedGraph(graph, {"x": x, "mean": y}, {}))
    expected = TFLiteModel(content).run([q])[0]
    centered = tf.constant(q.astype(np.float32) - np.float32(x.zero_point))
    operand = Operand(centered, tf.constant(x.scale), tf.constant(np.float32(x.zero_point)))
    out = Operand(None, tf.constant(y.scale), tf.constant(np.float32(y.zero_point)))
    found = KERNELS["mean"].arithmetic[8](Call(node=graph["mean"], inputs=[operand], out=out)).numpy() + y.zero_point
    np.testing.assert_array_equal(np.clip(found, -128, 127), expected)
