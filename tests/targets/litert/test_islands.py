"""Float islands: converted alone, embedded, run on any batch between integer operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest

import kquant
from kquant.errors import ExportError
from kquant.graph.ir import Graph, Node
from kquant.graph.quantized import QuantizedGraph
from kquant.graph.tracing.float_call import FloatCall
from kquant.grids.grid import dequantize, quantize
from kquant.targets.litert.flatbuffer import only_integer_ops, read_tensors, summary
from kquant.targets.litert.writer import write_tflite
from tests.support.graphs import KERNELS, chain, grid, op, rng
from tests.support.litert_files import run

SHAPE = (4, 6)


def island(call: Callable[[Sequence[Any]], Any], inputs: tuple[str, ...] = (), shape: tuple[int, ...] = SHAPE) -> Node:
    return Node(name="island", op="float", shape=(None, *shape), inputs=inputs, call=call, origin_type="Custom")


def between(*nodes: Node) -> tuple[Graph, QuantizedGraph]:
    """int8 leaky_relu -> the nodes -> requantize."""
    graph = chain(SHAPE, op("leaky_relu", SHAPE, alpha=0.5), *nodes, op("requantize", nodes[-1].shape[1:]))
    floats = {n.name for n in nodes}
    return graph, QuantizedGraph(graph, {n: None if n in floats else grid(-4.0, 4.0) for n in graph.nodes}, {})


def test_island_between_integer_operations() -> None:
    keras.utils.set_random_seed(0)
    layer = keras.layers.LayerNormalization()
    graph, qgraph = between(island(lambda x: layer(x[0])))
    content, report = write_tflite(qgraph, float_reasons={"island": "no kernel"})
    assert report.float_nodes == {"island": "no kernel"}
    assert not only_integer_ops(content)
    assert "DEQUANTIZE (leaky_relu/float)" in summary(content).float_ops
    for batch in (1, 3):
        x = rng(batch).normal(size=(batch, *SHAPE)).astype(np.float32)
        for kernels in ("builtin", "reference"):
            tensors = run(content, [quantize(x, grid(-4.0, 4.0)).astype(np.int8)], KERNELS[kernels])
            want = np.asarray(layer(dequantize(tensors["leaky_relu"], grid(-4.0, 4.0))))
            np.testing.assert_allclose(tensors["island"], want, atol=1e-4)
            np.testing.assert_allclose(tensors["requantize"], quantize(want, grid(-4.0, 4.0)), atol=1)


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_attention_runs_on_any_batch(batch: int | None) -> None:
    keras.utils.set_random_seed(1)
    layer = keras.layers.MultiHeadAttention(num_heads=2, key_dim=3)
    node = island(lambda x: layer(x[0], x[1]), inputs=("x", "y"))
    graph = chain(SHAPE, node)
    qgraph = QuantizedGraph(graph, dict.fromkeys(graph.nodes), {})
    content, _ = write_tflite(qgraph, batch=batch)
    feeds = [rng(k).normal(size=(batch or 3, *SHAPE)).astype(np.float32) for k in range(2)]
    want = np.asarray(layer(*feeds))
    for kernels in KERNELS.values():
        np.testing.assert_allclose(run(content, feeds, kernels)["island"], want, atol=1e-5)


def test_inputs_keep_their_order() -> None:
    graph = chain(SHAPE, island(lambda x: x[1] - 2.0 * x[0], inputs=("x", "y")))
    content, _ = write_tflite(QuantizedGraph(graph, dict.fromkeys(graph.nodes), {}))
    feeds = [rng(k).normal(size=(2, *SHAPE)).astype(np.float32) for k in range(2)]
    np.testing.assert_allclose(run(content, feeds)["island"], feeds[1] - 2.0 * feeds[0], atol=1e-6)


def test_one_tensor_may_be_read_twice() -> None:
    graph = chain(SHAPE, island(lambda x: x[0] * keras.ops.sin(x[1]), inputs=("x", "x")))
    content, _ = write_tflite(QuantizedGraph(graph, dict.fromkeys(graph.nodes), {}))
    x = rng().normal(size=(2, *SHAPE)).astype(np.float32)
    np.testing.assert_allclose(run(content, [x])["island"], x * np.sin(x), atol=1e-6)


def test_two_islands_have_tensors_of_their_own() -> None:
    first = island(lambda x: keras.ops.sin(x[0]))
    second = island(lambda x: keras.ops.sin(x[0])).with_(name="other")
    graph, qgraph = between(first, second)
    content, report = write_tflite(qgraph)
    assert report.op_counts["SIN"] == 2 and report.op_counts["DEQUANTIZE"] == 1
    names = list(read_tensors(content))
    assert len(names) == len(set(names)) and not any("#" in n for n in names)


def test_a_layer_of_a_model_is_left_as_it_was() -> None:
    keras.utils.set_random_seed(2)
    layer = keras.layers.LayerNormalization()
    source = keras.Input(SHAPE)
    model = keras.Model(source, layer(source))
    graph = chain(SHAPE, island(FloatCall.of(layer)))
    content, _ = write_tflite(QuantizedGraph(graph, dict.fromkeys(graph.nodes), {}))
    assert len(layer._inbound_nodes) == 1
    x = rng().normal(size=(2, *SHAPE)).astype(np.float32)
    np.testing.assert_allclose(run(content, [x])["island"], model(x), atol=1e-5)


def test_constants_of_an_island_are_counted() -> None:
    table = keras.ops.convert_to_tensor(rng().normal(size=(6, 50)).astype(np.float32))
    graph = chain(SHAPE, island(lambda x: keras.ops.matmul(x[0], table), shape=(4, 50)))
    _, report = write_tflite(QuantizedGraph(graph, dict.fromkeys(graph.nodes), {}))
    assert report.rows[-1].bytes >= 6 * 50 * 4


def _loop(x: Sequence[Any]) -> Any:
    return keras.ops.while_loop(lambda y: keras.ops.sum(y) < 9, lambda y: (y + 1,), (x[0],))[0]


@pytest.mark.parametrize(
    ("what", "call"), [("cannot convert", lambda x: keras.ops.erfinv(x[0])), ("cannot be embedded", _loop)]
)
def test_what_cannot_be_embedded_is_refused(what: str, call: Callable[[Sequence[Any]], Any]) -> None:
    graph = chain(SHAPE, island(call))
    with pytest.raises(ExportError, match=f"'island' .Custom.*{what}"):
        write_tflite(QuantizedGraph(graph, dict.fromkeys(graph.nodes), {}))


def test_an_integer_operation_must_not_read_an_island() -> None:
    graph = chain(SHAPE, island(lambda x: keras.ops.sin(x[0])), op("leaky_relu", SHAPE, alpha=0.1))
    qgraph = QuantizedGraph(graph, {"x": None, "island": None, "leaky_relu": grid(-1, 1)}, {})
    with pytest.raises(ExportError, match="'leaky_relu' runs in integers but reads 'island'.*requantize"):
        write_tflite(qgraph)


def test_what_the_converter_makes_another_function_of_is_refused_by_name() -> None:
    """TensorFlow's converter takes a norm over two axes for one over the last."""

    def normalized(x: Sequence[Any]) -> Any:
        square = keras.ops.sum(keras.ops.square(x[0]), axis=(-1, 1), keepdims=True)
        return x[0] * keras.ops.rsqrt(keras.ops.maximum(square, 1e-12))

    _, qgraph = between(island(normalized))
    with pytest.raises(ExportError, match=r"'island' \(Custom\) stays float.*something else.*register_layer"):
        write_tflite(qgraph)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(keras.layers.LSTM, marks=pytest.mark.slow),
        pytest.param(keras.layers.GRU, marks=pytest.mark.slow),
        keras.layers.SimpleRNN,
    ],
)
def test_both_directions_of_a_masked_sequence_are_those_of_keras(layer: type) -> None:
    """Keras unrolls reversed layers with the mask in the wrong order."""
    keras.utils.set_random_seed(2)
    recurrent = keras.layers.Bidirectional(layer(3, return_sequences=True))
    ids = keras.Input((3,), dtype="int32", name="ids")
    model = keras.Model(ids, recurrent(keras.layers.Embedding(9, 4, mask_zero=True)(ids)))
    data = np.array([[1, 2, 0], [4, 5, 6], [8, 0, 0]], np.int32)
    qmodel = kquant.quantize_model(model, data, progress=False)
    file = kquant.TFLiteModel(kquant.export_tflite(qmodel).content)
    np.testing.assert_allclose(file.predict(data)[0], qmodel.predict(data, verbose=0), atol=1e-5)
