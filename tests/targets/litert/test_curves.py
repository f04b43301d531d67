"""Activation functions of 8 bits on tensors against LiteRT's formulas in numpy, on random grids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.targets.litert import curves
from kquant.targets.litert.kernels import KERNELS, REFERENCE
from kquant.targets.litert.reader import Operator, read
from kquant.targets.litert.runtime import TFLiteModel
from kquant.targets.litert.writer import write_tflite
from kquant.targets.operand import Call, Operand
from tests.support.graphs import chain, op, rng
from tests.targets.litert.cases import scale

ALL = np.arange(-128, 128, dtype=np.int8)
CURVES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "logistic": ("LOGISTIC", {}, curves.logistic),
    "tanh": ("TANH", {}, curves.tanh),
    "elu": ("ELU", {}, curves.elu),
    "gelu": ("GELU", {"approximate": False}, curves.gelu),
    "gelu_tanh": ("GELU", {"approximate": True}, curves.gelu),
    "hard_swish": ("HARD_SWISH", {}, curves.hard_swish),
}


def random_grid(seed: int, low: float, high: float) -> Grid:
    g = rng(seed)
    return Grid(scale(g, low, high), np.int32(g.integers(-128, 128)), -128, 127)


def files(kind: str, attrs: dict[str, Any], x: Grid, y: Grid, shape: tuple[int, ...]) -> tuple[Node, bytes, Operator]:
    """The node, its file, and the operator of the file that computes it."""
    graph = chain(shape, op(kind, shape, **attrs))
    content, _ = write_tflite(QuantizedGraph(graph, {"x": x, kind: y}, {}))
    return graph[kind], content, read(content).operators[0]


def simulated(arithmetic: Any, node: Node, q: np.ndarray, x: Grid, y: Grid) -> np.ndarray:
    centered = tf.constant(q.astype(np.float32) - np.float32(x.zero_point))
    operand = Operand(centered, tf.constant(x.scale), tf.constant(np.float32(x.zero_point)))
    out = Operand(None, tf.constant(y.scale), tf.constant(np.float32(y.zero_point)))
    found = arithmetic(Call(node=node, inputs=[operand], out=out)).numpy() + y.zero_point
    return np.clip(found, -128, 127).astype(np.int8)


@pytest.mark.parametrize("name", CURVES)
def test_all_inputs_equal_the_numpy_reference(name: str) -> None:
    builtin, attrs, arithmetic = CURVES[name]
    kind = name.removesuffix("_tanh")
    for seed in range(40):
        x = random_grid(seed, 0.002, 0.2)
        y = random_grid(1000 + seed, 0.002, 0.2)
        fixed = KERNELS[kind].output.get(8)
        y = y if fixed is None else Grid(np.float32(fixed[0]), np.int32(fixed[1]), -128, 127)
        node, _, operator = files(kind, attrs, x, y, (256,))
        expected = REFERENCE[builtin].compute(operator, [ALL])
        np.testing.assert_array_equal(simulated(arithmetic, node, ALL, x, y), expected, err_msg=f"seed {seed}")


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_softmax_equals_the_numpy_reference(classes: int) -> None:
    y = Grid(np.float32(1 / 256), np.int32(-128), -128, 127)
    for seed in range(10):
        x, q = random_grid(seed, 0.002, 0.5), rng(seed).integers(-128, 128, (20, classes)).astype(np.int8)
        node, _, operator = files("softmax", {}, x, y, (classes,))
        expected = REFERENCE["SOFTMAX"].compute(operator, [q])
        np.testing.assert_array_equal(simulated(curves.softmax, node, q, x, y), expected, err_msg=f"seed {seed}")


def test_hard_swish_equals_the_default_kernel() -> None:
    for seed in range(20):
        x, y = random_grid(seed, 0.005, 0.2), random_grid(100 + seed, 0.005, 0.2)
        node, content, _ = files("hard_swish", {}, x, y, (256,))
        found = TFLiteModel(content).run([ALL[None]])[0][0]
        np.testing.assert_array_equal(simulated(curves.hard_swish, node, ALL, x, y), found, err_msg=f"seed {seed}")
