"""Layers with weights compute what Keras computes, and get the names that users know."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from kquant.graph.tracing.linear import dilate
from tests.support.tracing import build, ops, traced

L = keras.layers
IMAGE, LINE = (9, 8, 4), (11, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": "same", "strides": 2, "use_bias": False},
        {"strides": (1, 3)},
        {"dilation_rate": (2, 3), "padding": "same"},
        {"groups": 2, "padding": "same"},
        {"kernel_size": (1, 4)},
    ],
)
def test_conv2d(settings: dict[str, Any]) -> None:
    layer = L.Conv2D(6, name="conv1", **{"kernel_size": 3, **settings})
    graph = traced(build(layer, IMAGE))
    assert ops(graph) == ["conv2d"] and graph.outputs == ("conv1",)
    node = graph["conv1"]
    assert node.origin == "conv1" and node.origin_type == "Conv2D"
    assert node.weights["bias"].shape == (6,)


@pytest.mark.parametrize("padding", ["valid", "same", "causal"])
@pytest.mark.parametrize("settings", [{}, {"strides": 2}, {"dilation_rate": 2}, {"groups": 2}])
def test_conv1d_is_a_convolution_between_two_reshapes(padding: str, settings: dict[str, Any]) -> None:
    graph = traced(build(L.Conv1D(6, 3, padding=padding, name="c", activation="relu", **settings), LINE))
    pads = ["pad"] if padding == "causal" else []
    assert ops(graph) == ["reshape", *pads, "conv2d", "clip", "reshape"]
    assert graph["c"].op == "conv2d"


@pytest.mark.parametrize(
    "settings",
    [{}, {"depth_multiplier": 3}, {"strides": 2, "padding": "same"}, {"dilation_rate": 2}, {"use_bias": False}],
)
def test_depthwise_conv2d(settings: dict[str, Any]) -> None:
    graph = traced(build(L.DepthwiseConv2D(3, **settings), IMAGE))
    assert ops(graph) == ["depthwise_conv2d"]


def test_depthwise_conv1d() -> None:
    graph = traced(build(L.DepthwiseConv1D(3, depth_multiplier=2, padding="same"), LINE))
    assert "depthwise_conv2d" in ops(graph)


@pytest.mark.parametrize("settings", [{}, {"strides": 2, "padding": "same"}, {"depth_multiplier": 2}])
def test_separable_conv2d_is_depthwise_and_pointwise(settings: dict[str, Any]) -> None:
    graph = traced(build(L.SeparableConv2D(5, 3, name="s", activation="relu", **settings), IMAGE))
    assert ops(graph) == ["depthwise_conv2d", "conv2d", "clip"]
    assert list(graph.nodes)[1:] == ["s/depthwise", "s", "s/clip"]
    assert not graph["s/depthwise"].weights["bias"].any()


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_separable_conv1d(padding: str) -> None:
    traced(build(L.SeparableConv1D(5, 3, padding=padding), LINE))


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("strides", [1, 2, (3, 2)])
@pytest.mark.parametrize("kernel", [2, 3, (4, 5)])
def test_conv2d_transpose(padding: str, strides: Any, kernel: Any) -> None:
    graph = traced(build(L.Conv2DTranspose(5, kernel, strides=strides, padding=padding), IMAGE))
    assert ops(graph) == ["conv2d_transpose"]


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("output_padding", [0, 1])
def test_conv2d_transpose_output_padding(padding: str, output_padding: int) -> None:
    traced(build(L.Conv2DTranspose(5, 3, strides=2, padding=padding, output_padding=output_padding), IMAGE))


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_dilated_transposed_convolution_has_a_spread_kernel(padding: str) -> None:
    graph = traced(build(L.Conv2DTranspose(5, 3, dilation_rate=2, padding=padding), IMAGE))
    (node,) = [n for n in graph if n.op == "conv2d_transpose"]
    assert node.weights["kernel"].shape[:2] == (5, 5)


def test_conv1d_transpose() -> None:
    graph = traced(build(L.Conv1DTranspose(5, 3, strides=2, padding="same"), LINE))
    assert "conv2d_transpose" in ops(graph)


def test_dilate_puts_zeros_between_the_taps() -> None:
    kernel = np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3, 1, 1)
    expected = [[1, 0, 2, 0, 3], [0] * 5, [0] * 5, [4, 0, 5, 0, 6]]
    np.testing.assert_array_equal(dilate(kernel, (3, 2))[..., 0, 0], expected)


def test_a_convolution_of_volumes_in_groups_stays_float() -> None:
    graph = traced(build(L.Conv3D(2, 2, groups=2), (4, 4, 4, 2)))
    assert ops(graph) == ["float"]
    assert "three-dimensional" in graph[graph.outputs[0]].attrs["reason"]


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7)])
def test_dense_of_any_rank(shape: tuple[int, ...]) -> None:
    assert ops(traced(build(L.Dense(4, use_bias=len(shape) > 1), shape))) == ["dense"]


@pytest.mark.parametrize(
    ("equation", "output", "bias_axes", "shape"),
    [
        ("abc,cd->abd", (5, 6), "d", (5, 4)),
        ("abc,cde->abde", (5, 2, 3), "de", (5, 4)),
        ("abcd,cde->abe", (5, 3), None, (5, 2, 4)),
        ("abc,bd->adc", (6, 4), "dc", (5, 4)),
        ("abc,cd->abd", (5, 6), "bd", (5, 4)),
        ("...x,xy->...y", (6,), "y", (5, 4)),
        ("abc,cd->adb", (6, 5), "d", (5, 4)),
    ],
)
def test_einsum_dense_is_a_dense(
    equation: str, output: tuple[int, ...], bias_axes: str | None, shape: tuple[int, ...]
) -> None:
    layer = L.EinsumDense(equation, output_shape=output, bias_axes=bias_axes, activation="relu")
    graph = traced(build(layer, shape))
    assert "dense" in ops(graph) and "float" not in ops(graph)


@pytest.mark.parametrize(
    ("equation", "output", "bias_axes", "shape"),
    [
        ("abc,bcd->abd", (5, 6), None, (5, 4)),
        ("abc,bcd->abd", (5, 6), "bd", (5, 4)),
        ("abcd,cde->abce", (5, 3, 6), "e", (5, 3, 4)),
        ("abcd,ecd->aebc", (6, 5, 3), None, (5, 3, 4)),
    ],
)
def test_einsum_dense_with_a_kernel_for_each_group(
    equation: str, output: tuple[int, ...], bias_axes: str | None, shape: tuple[int, ...]
) -> None:
    computed = ops(traced(build(L.EinsumDense(equation, output_shape=output, bias_axes=bias_axes), shape)))
    assert "batch_matmul" in computed and "float" not in computed


def test_embedding_makes_its_input_ids() -> None:
    for dtype in ("float32", "int32"):
        graph = traced(build(L.Embedding(5, 3), (4,), dtype=dtype))
        assert graph[graph.inputs[0]].dtype == "int32" and ops(graph) == ["embedding"]


def test_half_precision_weights_are_cast() -> None:
    model = build(L.Conv2D(3, 3, dtype="float16"), IMAGE)
    graph = traced(model, tolerance=2e-2)
    assert all(w.dtype == np.float32 for n in graph for w in n.weights.values())
    assert graph[graph.outputs[0]].dtype == "float32"


def test_shared_layer_is_lowered_per_call() -> None:
    layer = L.Dense(4, name="shared")
    graph = traced(build(lambda x: layer(layer(x)), (4,)))
    assert list(graph.nodes)[1:] == ["shared", "shared_1"]
    assert [graph[n].origin for n in ("shared", "shared_1")] == ["shared", "shared"]


KERNEL = np.random.default_rng(0).normal(size=(3, 3, 4, 2)).astype("float32")


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_convolution_operations_with_constant_kernels(padding: str) -> None:
    k = keras.ops
    pointwise = KERNEL[:1, :1].reshape(1, 1, 8, 1)
    for function, op in [
        (lambda x: k.conv(x, KERNEL, 2, padding), "conv2d"),
        (lambda x: k.depthwise_conv(x, KERNEL, 1, padding), "depthwise_conv2d"),
        (lambda x: k.separable_conv(x, KERNEL, pointwise, 1, padding), "conv2d"),
    ]:
        assert op in ops(traced(build(function, IMAGE)))


def test_products_with_constants_are_dense() -> None:
    k = keras.ops
    w = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    for function in (
        lambda x: k.matmul(x, w),
        lambda x: x @ w,
        lambda x: k.matmul(w.T[:, :4], k.transpose(x, (0, 2, 1))),
        lambda x: k.einsum("abc,cd->abd", x, w),
        lambda x: k.einsum("cd,abc->adb", w, x),
        lambda x: k.dot(x, w),
    ):
        computed = ops(traced(build(function, (5, 4))))
        assert "dense" in computed and "float" not in computed


def test_products_with_a_constant_matrix_for_each_head() -> None:
    k = keras.ops
    keys = np.random.default_rng(0).normal(size=(6, 3, 4)).astype("float32")  # [keys, heads, size]
    for equation in ("abcd,ecd->acbe", "abcd,ecd->abce"):
        computed = ops(traced(build(lambda x, e=equation: k.einsum(e, x, keys), (5, 3, 4))))
        assert "batch_matmul" in computed and "float" not in computed
    flipped = build(lambda x: k.einsum("ecd,abcd->acbe", keys, x), (5, 3, 4))
    assert "batch_matmul" in ops(traced(flipped))


def test_product_of_two_tensors_is_a_batch_matmul() -> None:
    graph = traced(build(lambda x, y: keras.ops.matmul(x, y), (3, 4), (4, 5)))
    assert ops(graph) == ["batch_matmul"] and len(graph[graph.outputs[0]].inputs) == 2
