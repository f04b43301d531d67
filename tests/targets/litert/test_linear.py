"""Operations with weights: how the simulation rounds them, and their weights in every container and mode."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf

from kquant.errors import ExportError
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import OPS, bias_of, compute, evaluate, weight_of, weight_view
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid, dequantize, fake_quantize, quantize
from kquant.keras.model import insert
from kquant.targets.litert.flatbuffer import read_tensors
from kquant.targets.litert.kernels import KERNELS as RECORDS
from kquant.targets.litert.runtime import TFLiteModel
from kquant.targets.litert.writer import write_tflite
from kquant.targets.operand import Call, Operand
from tests.support.graphs import (
    KERNELS,
    chain,
    check_file,
    dense,
    grid,
    integers,
    quantized,
    rng,
    weight_grid,
)
from tests.support.litert_files import run
from tests.support.operations import LINEAR
from tests.support.toy import asked

# where the kernels have a container of fewer than 8 bits
SMALL = {"conv": 4, "groups": 4, "depthwise": 4, "dense": 2, "dense_rank3": 2}


def _feed(graph: Graph, batch: int = 2) -> np.ndarray:
    return rng(7).normal(size=(batch, *graph["x"].shape[1:])).astype(np.float32)


def _kernel(graph: Graph) -> tuple[Node, str]:
    node = graph[graph.outputs[0]]
    return node, f"{node.name}/{weight_of(node).name}"


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize("name", LINEAR)
def test_int8_activations_with_weights_of_any_bits(name: str, bits: int, per_channel: bool) -> None:
    graph = LINEAR[name]()
    x = _feed(graph)
    qgraph = quantized(graph, [x], weight_bits=bits, per_channel=per_channel)
    content, report = write_tflite(qgraph)
    node, kernel = _kernel(graph)
    stored = read_tensors(content)[kernel]
    least = SMALL.get(name, 8)
    assert stored.type == f"INT{2 if bits == 2 and least == 2 else 4 if bits <= 4 and least <= 4 else 8}"
    assert report.rows[-1].weights == stored.type
    want = RECORDS[node.op].layout.to_file(quantize(weight_view(node), qgraph.weights[node.name]))
    np.testing.assert_array_equal(stored.data, want)
    # the reference resolver has no int4 depthwise kernel of version 7
    kernels = [k for k in KERNELS if not (k == "reference" and name == "depthwise" and stored.type == "INT4")]
    for k in kernels:
        check_file(content, qgraph, integers(qgraph, [x]), k)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", LINEAR)
def test_int16_activations(name: str, bits: int) -> None:
    graph = LINEAR[name]()
    x = _feed(graph)
    qgraph = quantized(graph, [x], bits=16, container=16, weight_bits=bits)
    content, _ = write_tflite(qgraph)
    node, kernel = _kernel(graph)
    tensors = read_tensors(content)
    if bits == 4:
        assert tensors[kernel].type == ("INT8" if name in ("depthwise", "transposed", "affine") else "INT4")
    assert tensors[f"{node.name}/{bias_of(node)}"].type == "INT64"
    for k in KERNELS:
        check_file(content, qgraph, integers(qgraph, [x]), k, lsb=2)


def test_bias_is_stored_at_the_scale_of_the_products() -> None:
    graph = LINEAR["conv"]()
    qgraph = quantized(graph, [_feed(graph)])
    stored = read_tensors(write_tflite(qgraph)[0])["conv/bias"]
    scale = qgraph.activations["x"].scale * qgraph.weights["conv"].scale
    np.testing.assert_array_equal(stored.scale, scale)
    np.testing.assert_array_equal(stored.data, np.rint(graph["conv"].weights["bias"] / scale))


def test_a_bias_that_does_not_fit_is_refused() -> None:
    graph = chain((4,), dense(cin=4, cout=3))
    node = graph["dense"]
    graph = graph.rebuild([graph["x"], node.with_weights(bias=np.float32([1e12, 0, 0]))])
    qgraph = quantized(graph, [_feed(graph)])
    with pytest.raises(ExportError, match="'dense'.*32 bits"):
        write_tflite(qgraph)


def test_integer_operation_without_weight_grid_is_refused() -> None:
    graph = chain((4,), dense(cin=4, cout=3))
    qgraph = replace(quantized(graph, [_feed(graph)]), weights={})
    with pytest.raises(ExportError, match="'dense'.*no grid"):
        write_tflite(qgraph)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("mode", ["weight_only", "float16", "dynamic_range"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_float_modes(name: str, mode: str, bits: int) -> None:
    graph = LINEAR[name]()
    x = _feed(graph, batch=3)
    qgraph = quantized(graph, [x], weight_bits=bits)
    content, report = write_tflite(qgraph, mode=mode)
    node, _ = _kernel(graph)
    view = weight_view(node)
    half = view.astype(np.float16).astype(np.float32)
    weights = half if mode == "float16" else fake_quantize(view, qgraph.weights[node.name])
    key = weight_of(node).name
    want = np.asarray(compute(node, [x], {**node.weights, key: weights.reshape(node.weights[key].shape)}))
    assert report.float_nodes == {node.name: ""}
    # hybrid kernels quantize the input of every sample to 8 bits
    tolerance = 0.02 * np.abs(want).max() if mode == "dynamic_range" else 2e-5
    for kernels in KERNELS:
        found = run(content, [x], KERNELS[kernels])[node.name]
        np.testing.assert_allclose(found, want, atol=tolerance, err_msg=kernels)


def test_weights_without_quantized_activations_are_stored_as_integers() -> None:
    graph = LINEAR["conv"]()
    x = _feed(graph)
    qgraph = quantized(graph, [x], weight_bits=4, floats=frozenset({"x", "conv"}))
    content, report = write_tflite(qgraph)
    assert report.op_counts == {"DEQUANTIZE": 1, "CONV_2D": 1} and report.rows[-1].weights == "INT4"
    node, w = graph["conv"], qgraph.weights["conv"]
    want = compute(node, [x], {**node.weights, "kernel": fake_quantize(node.weights["kernel"], w)})
    np.testing.assert_allclose(run(content, [x])["conv"], want, atol=1e-5)


def test_float16_refuses_what_it_cannot_hold() -> None:
    graph = chain((4,), dense(cin=4, cout=3))
    graph = graph.rebuild([graph["x"], graph["dense"].with_weights(kernel=np.full((4, 3), 1e6, np.float32))])
    with pytest.raises(ExportError, match="too large for float16"):
        write_tflite(quantized(graph, [_feed(graph)]), mode="float16")


@pytest.mark.parametrize("mode", ["integer", "float32", "float16", "weight_only"])
def test_embedding_gathers_rows(mode: str) -> None:
    table = rng(1).normal(size=(9, 5)).astype(np.float32)
    node = Node(name="embed", op="embedding", shape=(None, 4, 5), weights={"table": table})
    graph = chain((4,), node, dtype="int32")
    ids = rng(2).integers(0, 9, (3, 4)).astype(np.int32)
    q = grid(float(table.min()), float(table.max()))
    qgraph = QuantizedGraph(graph, {"x": None, "embed": q}, {"embed": q})
    content, _ = write_tflite(qgraph, mode=mode)
    for kernels in KERNELS.values():
        found = run(content, [ids], kernels)["embed"]
        if mode == "integer":
            np.testing.assert_array_equal(found, quantize(table, q)[ids])
        else:
            np.testing.assert_allclose(
                found, table[ids], atol={"float16": 2e-3, "weight_only": float(q.scale)}.get(mode, 0)
            )


def test_weight_grids_of_more_than_8_bits_are_refused() -> None:
    graph = chain((4,), dense(cin=4, cout=3))
    qgraph = quantized(graph, [_feed(graph)])
    wide = Grid(np.float32(1e-4), np.int32(0), -2047, 2047)
    with pytest.raises(ExportError, match="'dense'.*do not fit int8"):
        write_tflite(replace(qgraph, weights={"dense": wide}))


def test_float_evaluation_is_what_the_helpers_assume() -> None:
    graph = LINEAR["dense"]()
    x = _feed(graph)
    want = x @ graph["dense"].weights["kernel"] + graph["dense"].weights["bias"]
    np.testing.assert_allclose(evaluate(graph, [x])[0], want, atol=1e-5)
    q = grid(-1.0, 2.0)
    np.testing.assert_allclose(dequantize(quantize(np.float32([-1, 0, 2]), q), q), [-1, 0, 2], atol=0.01)


def rounded(kind: str, acc: list[float], bits: int, container: int, depth: int = 6, groups: int = 1) -> np.ndarray:
    """What the kernel makes of accumulators (which its bias brings) at a factor of 1/4."""
    cout = len(acc)
    kernel = {"conv2d": (1, 1, depth // groups, cout), "depthwise_conv2d": (1, 1, cout, 1), "affine": (cout,)}
    shape = {**kernel, "conv2d_transpose": (1, 1, cout, depth), "dense": (depth, cout)}[kind]
    attrs = {"strides": (1, 1), "padding": "same", "dilation": (1, 1), "groups": groups}
    node = Node(name=kind, op=kind, shape=(None, 1, 1, cout), attrs=attrs, weights={OPS[kind].weight.name: shape})
    channels = cout if kind in ("depthwise_conv2d", "affine") else depth
    one, zero = tf.constant(1.0), tf.constant(0.0)
    call = Call(
        node=node,
        inputs=[Operand(tf.zeros((1, 1, 1, channels)), tf.constant(0.25), zero, container)],
        out=Operand(None, one, zero, container),
        weight=Operand(tf.zeros(shape), one, 0.0, bits),
        weights={OPS[kind].bias: tf.constant(acc) * 0.25},
    )
    return np.ravel(RECORDS[kind].arithmetic[container](call))


@pytest.mark.parametrize(
    "kind, bits, container, shape, expected",
    [
        ("conv2d", 8, 8, {}, [-2, -2, 0]),  # XNNPACK: to even
        ("conv2d", 4, 8, {}, [-2, -1, 1]),  # own kernels: up
        ("conv2d", 4, 8, {"groups": 3}, [-3, -2, 1]),  # grouped: away
        ("dense", 4, 8, {"depth": 6}, [-2, -2, 0]),  # whole bytes: XNNPACK
        ("dense", 4, 8, {"depth": 5}, [-2, -1, 1]),
        ("dense", 2, 8, {"depth": 6}, [-2, -1, 1]),
        ("dense", 2, 8, {"depth": 8}, [-2, -2, 0]),
        ("affine", 8, 8, {}, [-2, -2, 0]),
        ("dense", 8, 16, {}, [-3, -2, 1]),
        ("conv2d", 8, 16, {}, [-2, -1, 1]),
    ],
)  # fmt: skip
def test_which_kernel_rounds(kind: str, bits: int, container: int, shape: dict[str, int], expected: list[int]) -> None:
    np.testing.assert_array_equal(rounded(kind, [-10.0, -6.0, 2.0], bits, container, **shape), expected)


@pytest.mark.parametrize("kind, bits", [("depthwise_conv2d", 4), ("conv2d_transpose", 4), ("conv2d_transpose", 8)])
def test_vectorized_in_blocks_of_8_channels(kind: str, bits: int) -> None:
    np.testing.assert_array_equal(rounded(kind, [-6.0] * 11, bits, 8), [-1] * 8 + [-2] * 3)


@pytest.mark.parametrize("seed", range(40))
def test_affine_equals_the_default_kernel(seed: int) -> None:
    """A factor and an offset for each channel, on random shapes and grids."""
    g = rng(seed)
    channels = int(g.integers(1, 40))
    shape = (*(int(v) for v in g.integers(1, 20, int(g.integers(3)))), channels)
    factor = (g.normal(size=channels) * np.exp(g.uniform(-5, 3))).astype(np.float32)
    x = Grid(np.float32(np.exp(g.uniform(-6, 0))), np.int32(g.integers(-128, 128)), -128, 127)
    offset = (g.normal(size=channels) * np.abs(factor).max() * x.scale * 40).astype(np.float32)
    weights = {"scale": factor, "offset": offset}
    graph = chain(shape, Node(name="affine", op="affine", shape=(None, *shape), weights=weights))
    q = g.integers(-128, 128, (int(g.integers(2, 5)), *shape)).astype(np.int8)
    real = x.scale * (q - np.float32(x.zero_point)) * factor + offset
    y = grid(float(real.min()), float(real.max()) * np.exp(g.uniform(-1, 1)) + 1e-3)
    w = weight_grid(graph["affine"], per_channel=bool(g.integers(2)))
    qgraph = QuantizedGraph(graph, {"x": x, "affine": y}, {"affine": w})
    content, _ = write_tflite(qgraph)
    values = insert(qgraph, asked("litert"))(x.scale * (q - np.float32(x.zero_point)))
    np.testing.assert_array_equal(np.rint(values / y.scale) + y.zero_point, TFLiteModel(content).run([q])[0])
