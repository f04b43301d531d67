"""Operations that are not layers compute what Keras computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from tests.support.tracing import build, ops, traced

k, L = keras.ops, keras.layers
IMAGE = (6, 8, 3)
VECTOR = np.array([0.5, -1.0, 2.0], np.float32)
POSITIVE = ("log", "log1p", "log2", "log10", "sqrt", "rsqrt")
BOUNDED = ("arcsin", "arccos", "arctanh")
ROWS = np.random.default_rng(0).normal(size=(6, 1, 3)).astype("float32")


CHOSEN = np.random.default_rng(1).uniform(size=(1, 6, 8, 3)) > 0.5
PLACES = np.random.default_rng(0).integers(-3, 3, (1, 6, 8, 3))
BLOCKS = ["reshape", "transpose", "reshape"]
NEWER = {  # than the oldest Keras that is supported
    "ptp": (lambda x: k.ptp(x, axis=-1), ["reduce_max", "reduce_min", "sub"]),
    "fmax": (lambda x: k.fmax(x, k.exp(x)), ["function", "maximum"]),
    "space_to_depth": (lambda x: k.nn.space_to_depth(x, 2), BLOCKS),
    "depth_to_space": (lambda x: k.nn.depth_to_space(k.concatenate([x] * 4, -1), 2), ["concat", *BLOCKS]),
}


@pytest.mark.parametrize("name", [n for n in NEWER if hasattr(k, n) or hasattr(k.nn, n)])
def test_newer_operations(name: str) -> None:
    function, expected = NEWER[name]
    assert ops(traced(build(function, IMAGE))) == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x + 1.0, ["affine"]),
        (lambda x: 1.0 - x, ["affine"]),
        (lambda x: x - VECTOR, ["affine"]),
        (lambda x: x * VECTOR, ["affine"]),
        (lambda x: x / VECTOR, ["affine"]),
        (lambda x: -x, ["affine"]),
        (lambda x: x + VECTOR[None, None, None], ["affine"]),
        (lambda x: x + ROWS, ["const", "add"]),
        (lambda x: x - ROWS, ["const", "add"]),
        (lambda x: k.subtract(ROWS, x), ["const", "mul", "const", "add"]),
        (lambda x: x * ROWS, ["const", "mul"]),
        (lambda x: k.maximum(x, ROWS), ["const", "maximum"]),
        (lambda x: k.maximum(x, 0.0), ["clip"]),
        (lambda x: k.minimum(1.0, x), ["clip"]),
        (lambda x: x + x, ["add"]),
        (lambda x: k.square(x), ["mul"]),
        (lambda x: x / (x * x + 1.0), ["mul", "affine", "function", "mul"]),
        (lambda x: 1.0 / x, ["function"]),
        *(
            (getattr(k, name), ["function"])
            for name in ("exp", "exp2", "expm1", "abs", "sign", "floor", "ceil", "trunc")
        ),
        *((getattr(k, name), ["function"]) for name in ("sin", "cos", "tan", "sinh", "cosh", "arctan", "arcsinh")),
        *((getattr(k, name), ["function"]) for name in ("cbrt", "erf", "reciprocal") if hasattr(k, name)),
        *((lambda x, name=n: getattr(k, name)(0.1 + x * x), ["mul", "affine", "function"]) for n in POSITIVE),
        *((lambda x, name=n: getattr(k, name)(0.9 * k.tanh(x)), ["tanh", "affine", "function"]) for n in BOUNDED),
        (lambda x: k.roll(x, 3, axis=1), ["gather"]),
        (lambda x: k.roll(x, 6, axis=1), ["gather"]),
        (lambda x: k.flip(x, (1, -1)), ["gather", "gather"]),
        (lambda x: k.take(x, [[0, 1], [-1, 2]], axis=2), ["gather", "reshape"]),
        (lambda x: k.repeat(x, [1, 0, 2], axis=-1), ["gather"]),
        (lambda x: k.tile(x, (1, 2, 1, 3)), ["gather", "gather"]),
        (lambda x: k.sort(x, axis=-1), ["top_k", "gather"]),
        (lambda x: k.argmax(x, axis=1, keepdims=True)[:, 0], ["argmax", "reshape", "reshape"]),
        (lambda x: k.take_along_axis(x, k.argmin(x, -1, keepdims=True), -1), ["argmin", "reshape", "take_along"]),
        (lambda x: k.take_along_axis(x, PLACES[:, :, :, :1], -1), ["reshape", "gather", "reshape"]),
        (lambda x: k.take_along_axis(x, PLACES[:, :1], -1), ["reshape", "gather", "reshape"]),
        (lambda x: k.take_along_axis(x, PLACES[:, :2], 1), ["transpose", "reshape", "gather", "reshape", "transpose"]),
        (lambda x: k.min(x, axis=(1, 2), keepdims=True), ["reduce_min"]),
        (lambda x: k.cumsum(x, axis=2), ["transpose", "const", "batch_matmul", "transpose"]),
        (lambda x: k.round(x, 1), ["function"]),
        (lambda x: k.power(x, 2), ["mul"]),
        (lambda x: k.power(x, 3.0), ["function"]),
        (lambda x: k.power(2.0, x), ["function"]),
        (lambda x: k.mod(x, 0.7), ["function"]),
        (lambda x: x // 0.3, ["function"]),
        (lambda x: k.where(x > 0.1, x, x * 0.5), ["function", "affine", "select"]),
        (lambda x: k.where(0.1 >= x, 1.0, -1.0), ["function", "function"]),
        (lambda x: k.where(k.logical_and(x > 0, x < 1), x, 0.0), ["function"] * 3 + ["const", "select"]),
        (lambda x: k.cast(k.logical_not(x != 0.0), "float32"), ["function", "function", "function"]),
        (lambda x: k.cast(x * x > x, "float32"), ["mul", "sub", "function", "function"]),
        (lambda x: k.where(CHOSEN, x, 0.0), ["const", "mul"]),
        (lambda x: k.where(CHOSEN, 0.5, x), ["const", "mul", "const", "add"]),
        (lambda x: k.where(CHOSEN, x, -x), ["affine", "const", "mul", "const", "mul", "add"]),
        (lambda x: k.where(CHOSEN, x, -1e9), ["const", "add"]),
        (lambda x: k.all(x > 0, axis=2), ["function", "function", "reduce_min", "function"]),
        (lambda x: k.cast(k.equal(x > 0, 0), "float32"), ["function", "function", "function"]),
        (lambda x: x + k.ones_like(x) - k.zeros_like(x), ["const", "add"]),
        (L.Lambda(lambda x: k.broadcast_to(x[:, :1], k.shape(x))), ["slice", "gather"]),
        (lambda x: k.convert_to_tensor(x), []),
        (lambda x: k.cast(k.convert_to_tensor(x, "bool"), "float32"), ["function", "function"]),
        (lambda x: k.stop_gradient(x), []),
        (lambda x: k.cast(x, "float32"), []),
    ],
)
def test_arithmetic(function: Callable[[Any], Any], expected: list[str]) -> None:
    assert ops(traced(build(function, IMAGE))) == expected


def test_binary_operations_of_two_tensors() -> None:
    for function, op in [
        (lambda x, y: x + y, "add"),
        (lambda x, y: x - y, "sub"),
        (lambda x, y: x * y, "mul"),
        (k.maximum, "maximum"),
        (k.minimum, "minimum"),
    ]:
        assert ops(traced(build(function, IMAGE, (1, 1, 3)))) == [op]
        assert ops(traced(build(function, (6, 8, 1), (6, 1, 3)))) == [op]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (np.s_[:, 1:5:2, ::3], ["slice"]),
        (np.s_[:, ::2, ::2, :], ["slice"]),
        (np.s_[..., :2], ["slice"]),
        (np.s_[..., -1], ["slice", "reshape"]),
        (np.s_[:, -2:], ["slice"]),
        (np.s_[:, 2], ["slice", "reshape"]),
        (np.s_[:, None], ["reshape"]),
        (np.s_[:, 1, ..., None], ["slice", "reshape"]),
        (np.s_[:, :, 1:-1, None, 2], ["slice"]),
        (np.s_[:, 0:100], []),
        (np.s_[:, ::-1], ["gather"]),
        (np.s_[:, 4:0:-2, ::-1, None, 1], ["gather", "gather", "slice"]),
    ],
    ids=str,
)
def test_indexing(key: Any, expected: list[str]) -> None:
    assert ops(traced(build(lambda x: x[key], IMAGE))) == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: k.pad(x, ((0, 0), (1, 2), (0, 3), (2, 1))), ["pad"]),
        (lambda x: k.pad(x, ((0, 0), (1, 2), (0, 3), (2, 1)), constant_values=1.5), ["pad"]),
        (lambda x: k.pad(x, ((0, 0), (1, 2), (0, 3), (1, 1)), mode="reflect"), ["pad"]),
        (lambda x: k.pad(x, ((0, 0), (1, 2), (0, 3), (1, 1)), mode="symmetric"), ["pad"]),
        (lambda x: k.reshape(x, (-1, 48, 3)), ["reshape"]),
        (lambda x: k.transpose(x, (0, 3, 1, 2)), ["transpose"]),
        (lambda x: k.swapaxes(x, 1, -1), ["transpose"]),
        (lambda x: k.moveaxis(x, -1, 1), ["transpose"]),
        (lambda x: k.squeeze(k.expand_dims(x, 2), 2), ["reshape", "reshape"]),
        (lambda x: k.concatenate([x, x * 2.0], axis=-1), ["affine", "concat"]),
        (lambda x: k.stack([x, x], axis=1), ["reshape", "reshape", "concat"]),
        (lambda x: k.stack([x, x], axis=-1), ["reshape", "reshape", "concat"]),
        (lambda x: k.mean(x, axis=(1, 2)), ["mean"]),
        (lambda x: k.mean(x, axis=-1, keepdims=True), ["mean"]),
        (lambda x: k.max(x, axis=[1, 2]), ["reduce_max"]),
        (lambda x: k.sum(x, axis=1), ["mean", "affine"]),
        (lambda x: k.max_pool(x, 2), ["max_pool2d"]),
        (lambda x: k.average_pool(x, 2, padding="same"), ["avg_pool2d"]),
        (lambda x: k.image.resize(x, (3, 11)), ["resize"]),
        (lambda x: k.image.resize(x, (4, 5), interpolation="nearest"), ["resize"]),
        (lambda x: k.flip(x, 1), ["gather"]),
    ],
)
def test_shapes(function: Callable[[Any], Any], expected: list[str]) -> None:
    assert ops(traced(build(function, IMAGE))) == expected


def test_operations_with_several_outputs() -> None:
    assert ops(traced(build(lambda x: k.split(x, 2, axis=1), IMAGE))) == ["slice", "slice"]
    assert ops(traced(build(lambda x: k.split(x, [1, 4], axis=1), IMAGE))) == ["slice"] * 3
    assert ops(traced(build(lambda x: k.unstack(x, axis=-1), IMAGE))).count("slice") == 3


def test_integer_arithmetic_stays_float() -> None:
    graph = traced(build(lambda x: keras.layers.Embedding(20, 3)(x + 1), (4,), dtype="int32"))
    assert ops(graph) == ["float", "embedding"]
    assert graph[graph.inputs[0]].dtype == "int32" and graph[list(graph.nodes)[1]].dtype == "int32"
