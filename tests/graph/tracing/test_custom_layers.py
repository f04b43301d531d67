"""Custom layers as libraries of language and vision models write them."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

from kquant.errors import ModelError
from kquant.graph.tracing.trace import trace_model
from tests.support.tracing import assert_equal, build, randomize
from tests.support.tracing import ops as operations

LENGTH, WIDTH = 6, 8


class Heads(L.Layer):
    """Attention whose projections leave the length open, and whose mask is counted in zeros and ones."""

    def __init__(self, causal: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.causal, self.softmax = causal, L.Softmax()
        self.parts = [L.EinsumDense("btd,dhk->bthk", (None, 2, 4), name=name) for name in ("query", "key", "value")]

    def build(self, shape: Any) -> None:
        for part in self.parts:
            part.build(shape)

    def call(self, x: Any, visible: Any) -> Any:
        batch, length = ops.shape(x)[:2]
        q, k, v = (part(x) for part in self.parts)
        mask = ops.cast(ops.expand_dims(visible, 1), "int32")
        if self.causal:
            i = ops.arange(length)
            past = ops.cast(ops.broadcast_to(i[:, None] >= i[None], (batch, length, length)), "int32")
            mask = ops.minimum(mask, past)
        weights = self.softmax(ops.einsum("bqhd,bkhd->bhqk", q, k), ops.cast(mask, "bool")[:, None])
        return ops.reshape(ops.einsum("bhqk,bkhd->bqhd", weights, v), (batch, length, 8))


class WithCache(L.Layer):
    """Returns a tensor and None, which Keras does not record."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.dense = L.Dense(WIDTH, name="dense")

    def build(self, shape: Any) -> None:
        self.dense.build(shape)

    def call(self, x: Any, cache: Any = None) -> Any:
        return self.dense(x), cache


class Block(L.Layer):
    """Two of them, whose inner layers have one name."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.first, self.second = WithCache(name="first"), WithCache(name="second")

    def build(self, shape: Any) -> None:
        self.first.build(shape)
        self.second.build(shape)

    def call(self, x: Any) -> Any:
        return self.second(ops.relu(self.first(x)[0]))[0] + x

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


def three_parts(x: Any) -> Any:
    """Queries, keys and values of one projection, taken along an axis in front of the batch."""
    parts = ops.transpose(ops.reshape(L.Dense(3 * WIDTH)(x), (-1, LENGTH, 3, 2, 4)), (2, 0, 3, 1, 4))
    q, k, v = parts[0], parts[1], parts[-1]
    scores = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))))
    return ops.reshape(ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3)), (-1, LENGTH, WIDTH))


@pytest.mark.parametrize("causal", [True, False])
def test_masks_counted_in_zeros_and_ones(causal: bool) -> None:
    x, visible = keras.Input((LENGTH, WIDTH)), keras.Input((LENGTH,), dtype="int32")
    model = randomize(keras.Model([x, visible], Heads(causal)(x, visible)))
    graph = trace_model(model)
    assert "float" not in operations(graph)
    assert_equal(graph, model)


def test_layers_that_keras_cannot_record_run_in_place() -> None:
    model = build(lambda x: Block(name="block")(x), (LENGTH, WIDTH))
    block = model.get_layer("block")
    before = [(type(layer), layer.name, len(layer._inbound_nodes)) for layer in block._flatten_layers()]
    graph = trace_model(model)
    assert "float" not in operations(graph)
    assert_equal(graph, model)
    assert [(type(layer), layer.name, len(layer._inbound_nodes)) for layer in block._flatten_layers()] == before
    assert all("compute_output_shape" not in vars(layer) for layer in block._flatten_layers())


def test_parts_of_a_tensor_whose_batch_is_not_in_front() -> None:
    model = build(three_parts, (LENGTH, WIDTH))
    graph = trace_model(model)
    assert "float" not in operations(graph)
    assert_equal(graph, model)
    unstacked = build(lambda x: ops.unstack(ops.transpose(x, (1, 0, 2)), axis=0)[2], (LENGTH, WIDTH))
    assert_equal(trace_model(unstacked), unstacked)


def test_heads_and_batch_as_one_axis_behind_the_parts() -> None:
    """As the encoder of Segment Anything writes its attention."""

    class Attention(L.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = L.Dense(3 * WIDTH)

        def call(self, x: Any) -> Any:
            batch = ops.shape(x)[0]
            parts = ops.transpose(ops.reshape(self.qkv(x), (batch, LENGTH, 3, 2, WIDTH // 2)), (2, 0, 3, 1, 4))
            q, k, v = ops.unstack(ops.reshape(parts, (3, batch * 2, LENGTH, WIDTH // 2)), axis=0)
            y = ops.softmax(q @ ops.transpose(k, (0, 2, 1))) @ v
            y = ops.transpose(ops.reshape(y, (batch, 2, LENGTH, WIDTH // 2)), (0, 2, 1, 3))
            return ops.reshape(y, (batch, LENGTH, WIDTH))

    model = randomize(build(Attention(), (LENGTH, WIDTH)))
    graph = trace_model(model)
    assert "float" not in operations(graph)
    assert_equal(graph, model)


def test_a_batch_that_is_not_in_front_is_refused_otherwise() -> None:
    moved = build(lambda x: ops.relu(ops.transpose(x, (1, 0, 2)))[0], (LENGTH, WIDTH))
    with pytest.raises(ModelError, match="batch"):
        trace_model(moved)
    with pytest.raises(ModelError, match="batch"):
        trace_model(build(lambda x: ops.transpose(x, (1, 0, 2)), (LENGTH, WIDTH)))


def test_counted_truth_values_are_integers_to_layers_that_stay_float() -> None:
    """Two masks that hide the same place add up to two of them."""

    def function(x: Any) -> Any:
        hidden = ops.cast(x > 0.5, "int32")
        return ops.cast(ops.cumsum(hidden, 1) + hidden, "float32") * 1.5

    model = build(function, (LENGTH, WIDTH))
    graph = trace_model(model)
    assert "float" in operations(graph)
    assert_equal(graph, model)
    assert np.asarray(model(np.ones((1, LENGTH, WIDTH), "float32"))).max() > LENGTH
