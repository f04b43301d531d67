"""Models of every shape are traced to what they compute, and left as they were."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from kquant.errors import BackendError, ModelError
from kquant.graph.backend import check_backend
from kquant.graph.ops import evaluate
from kquant.graph.tracing.float_call import FloatCall
from kquant.graph.tracing.registry import register_layer
from kquant.graph.tracing.trace import trace_model
from tests.support.tracing import build, ops, randomize, traced

L = keras.layers
DATA = Path(os.environ.get("KQUANT_DATA", "../shared/data"))


class Scale(L.Layer):
    """A custom layer whose variable is an operand."""

    def build(self, shape: Any) -> None:
        self.factor = self.add_weight(shape=(shape[-1],), initializer="ones", name="factor")
        self.mix = self.add_weight(shape=(shape[-1], 2), name="mix")

    def call(self, x: Any) -> Any:
        return keras.ops.matmul(keras.ops.relu(x * self.factor + 1.0), self.mix)


class RawTensorFlow(L.Layer):
    """A custom layer that cannot be called on KerasTensors."""

    def build(self, shape: Any) -> None:
        self.factor = self.add_weight(shape=(shape[-1],), initializer="ones", name="factor")

    def call(self, x: Any) -> Any:
        return tf.math.multiply(tf.convert_to_tensor(x), tf.convert_to_tensor(self.factor))

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


class Block(L.Layer):
    """A composite layer."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv = L.Conv2D(4, 3, padding="same", name="conv")
        self.norm = L.BatchNormalization(name="norm")

    def call(self, x: Any, training: bool = False) -> Any:
        return keras.ops.relu(self.norm(self.conv(x), training=training) + x)


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(name="block")
        self.head = L.Dense(3, name="head")

    def call(self, x: Any, training: bool = False) -> Any:
        return self.head(keras.ops.mean(self.block(x, training=training), axis=(1, 2)))


class Untraceable(keras.Model):
    def call(self, x: Any) -> Any:
        return tf.nn.relu(x) if float(tf.reduce_sum(x)) > 0 else x


def test_sequential_and_its_names() -> None:
    model = randomize(keras.Sequential([L.Input((6, 6, 2)), L.Conv2D(3, 3, name="a"), L.ReLU(name="b")]))
    graph = traced(model)
    assert list(graph.nodes)[1:] == ["a", "b"]
    assert graph.name == model.name


def test_sequential_built_by_a_call() -> None:
    model = keras.Sequential([L.Dense(3), L.ReLU()])
    model(np.zeros((1, 4), "float32"))
    assert ops(traced(randomize(model))) == ["dense", "clip"]


def test_nested_models_are_inlined_with_their_name_as_prefix() -> None:
    inner = keras.Sequential([L.Input((8,)), L.Dense(8, name="fc"), L.ReLU(name="act")], name="inner")
    x = keras.Input((8,))
    middle = keras.Model(x, inner(x) + x, name="middle")
    graph = traced(build(lambda x: inner(middle(x)), (8,)))
    assert [n.name for n in graph if n.op == "dense"] == ["middle/inner/fc", "inner/fc"]
    assert graph["middle/inner/act"].origin == "middle/inner/act"


def test_shared_model_gets_numbered_names_and_the_same_origin() -> None:
    inner = keras.Sequential([L.Input((8,)), L.Dense(8, name="fc")], name="inner")
    graph = traced(build(lambda x, y: inner(x) - inner(y), (8,), (8,)))
    assert [n.name for n in graph if n.op == "dense"] == ["inner/fc", "inner_1/fc"]
    assert {n.origin for n in graph if n.op == "dense"} == {"inner/fc"}


def test_dictionaries_of_inputs_and_outputs() -> None:
    inputs = {"wide": keras.Input((4,), name="w"), "deep": keras.Input((3,), name="d")}
    outputs = {"z": L.Dense(2, name="head")(inputs["wide"]), "a": L.ReLU(name="act")(inputs["deep"])}
    graph = traced(randomize(keras.Model(inputs, outputs)))
    assert graph.input_names == ("deep", "wide") and graph.inputs == ("d", "w")
    assert graph.output_names == ("a", "z") and graph.outputs == ("act", "head")


def test_nested_model_with_a_dictionary_of_inputs() -> None:
    parts = {"p": keras.Input((3,), name="p"), "q": keras.Input((3,), name="q")}
    inner = keras.Model(parts, parts["p"] - 2.0 * parts["q"])
    traced(build(lambda x, y: inner({"q": x, "p": y}), (3,), (3,)))


def test_same_tensor_returned_twice_and_an_input_returned() -> None:
    x = keras.Input((4,), name="x")
    y = L.Dense(3, name="y")(x)
    graph = traced(randomize(keras.Model(x, [y, y, x])))
    assert graph.outputs == ("y", "y", "x")
    assert graph.output_names == ("y", "y_1", "x")


def test_branch_that_no_output_needs_is_dropped() -> None:
    x, unused = keras.Input((4,)), keras.Input((5,))
    L.Dense(2, name="dead")(x)
    graph = traced(keras.Model([x, unused], L.Dense(3)(x)))
    assert "dead" not in graph.nodes and len(graph.inputs) == 2


def test_subclassed_model_is_traced_through_its_composite_layers() -> None:
    model = Subclassed()
    model(np.zeros((2, 5, 5, 4), "float32"))
    randomize(model)
    graph = trace_model(model)
    assert ops(graph) == ["conv2d", "affine", "add", "clip", "mean", "dense"]
    assert graph["block/conv"].origin_type == "Conv2D" and graph.outputs == ("head",)
    x = np.random.default_rng(0).normal(size=(3, 5, 5, 4)).astype("float32")
    np.testing.assert_allclose(evaluate(graph, [x])[0], model(x), atol=1e-4)


def test_names_do_not_depend_on_what_was_built_before() -> None:
    first = list(traced(build(Block(name="block"), (5, 5, 4))).nodes)[1:]
    assert first == ["block/conv", "block/norm", "block/add", "block/relu"]


def test_custom_layer_with_variables_as_operands() -> None:
    assert ops(traced(build(Scale(), (3, 5)))) == ["affine", "affine", "clip", "dense"]


def test_custom_layer_is_lowered_whole_or_not_at_all() -> None:
    class Norm(L.Layer):
        def call(self, x: Any) -> Any:
            return x * keras.ops.median(x * x, axis=-1, keepdims=True)

    graph = traced(build(Norm(name="rms"), (5,)))
    assert ops(graph) == ["float"] and "Median" in graph["rms"].attrs["reason"]


def test_subclass_of_a_known_layer() -> None:
    class Renamed(L.Conv2D):
        def build(self, shape: Any) -> None:
            super().build(shape)

    class Doubled(L.Dense):
        def call(self, x: Any) -> Any:
            return 2.0 * super().call(x)

    assert ops(traced(build(Renamed(2, 3), (5, 5, 2)))) == ["conv2d"]
    assert ops(traced(build(Doubled(2), (5,)))) == ["dense", "affine", "affine"]


def test_what_cannot_be_traced_is_one_float_node_with_a_reason() -> None:
    graph = traced(build(lambda x: L.Dense(2)(RawTensorFlow(name="raw")(x)), (5,)))
    assert ops(graph) == ["float", "dense"]
    assert graph["raw"].origin_type == "RawTensorFlow" and "traced" in graph["raw"].attrs["reason"]
    assert ops(traced(build(L.ConvLSTM1D(4, 3), (5, 6, 8)))) == ["float"]


def test_lambda_is_traced_where_it_can_be() -> None:
    assert ops(traced(build(L.Lambda(lambda x: keras.ops.relu(x) * 2.0), (5,)))) == ["clip", "affine"]
    assert ops(traced(build(L.Lambda(lambda x: tf.math.exp(x)), (5,)))) == ["function"]
    assert ops(traced(build(L.Lambda(lambda x: tf.math.cumprod(x, 1)), (5,)))) == ["float"]
    assert ops(traced(build(L.Lambda(lambda x: x), (5,)))) == []


def test_registered_layer() -> None:
    class Gated(RawTensorFlow):
        pass

    assert ops(traced(build(Gated(), (5,)))) == ["float"]

    @register_layer(Gated)
    def lower_gated(layer: Any, x: Any) -> Any:
        return x * layer.factor

    assert ops(traced(build(Gated(), (5,)))) == ["affine"]
    with pytest.raises(TypeError):
        register_layer(lambda x: x)  # type: ignore[arg-type]


def test_each_output_of_a_layer_without_integer_form_is_a_node() -> None:
    class Sums(L.Layer):
        def call(self, x: Any) -> Any:
            y = tf.math.cumprod(x, 1)
            return {"all": y, "last": [y[:, -1], y[:, 0]]}

    x = keras.Input((4, 2))
    found = Sums(name="sums")(x)
    model = keras.Model(x, [found["last"][1], found["all"]])
    graph = trace_model(model)
    assert [(n.op, n.shape) for n in map(graph.__getitem__, graph.outputs)] == [
        ("float", (None, 2)),
        ("float", (None, 4, 2)),
    ]
    data = np.random.default_rng(0).normal(size=(3, 4, 2)).astype("float32")
    for name, expected in zip(graph.outputs, model.predict(data, verbose=0), strict=True):
        np.testing.assert_allclose(graph[name].call([data]), expected, rtol=1e-6)


def test_masks_are_carried_to_the_layers_that_use_them() -> None:
    def pooled(ids: Any) -> Any:
        return L.GlobalAveragePooling1D()(L.Embedding(5, 3, mask_zero=True)(ids))

    graph = traced(build(pooled, (6,), dtype="int32"))
    assert "softmax" in ops(graph) and "float" not in ops(graph)
    ids = np.array([[1, 2, 0, 0, 3, 0]], np.int32)
    table = next(n for n in graph if n.origin_type == "Embedding").weights["table"]
    np.testing.assert_allclose(evaluate(graph, [ids])[0], table[[1, 2, 3]].mean(0)[None], atol=1e-6)


@pytest.mark.parametrize("make", [lambda: build(Block(name="block"), (5, 5, 4)), lambda: build(Scale(), (3, 5))])
def test_users_model_is_left_alone(make: Callable[[], keras.Model]) -> None:
    model = make()
    layers = model._flatten_layers()
    weights = [np.array(w) for w in model.weights]
    nodes = [(len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in layers]
    graph = trace_model(model)
    assert [(len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in layers] == nodes
    for array in (a for n in graph for a in n.weights.values()):
        array += 1.0
    for before, after in zip(weights, model.weights, strict=True):
        np.testing.assert_array_equal(before, np.array(after))


# --- float nodes


def test_clone_of_a_float_call_shares_nothing() -> None:
    model = build(RawTensorFlow(name="raw"), (5,))
    node = trace_model(model)["raw"]
    clone = node.call.clone("copy")
    assert clone.operation is not node.call.operation and clone.operation.name == "copy"
    x = np.random.default_rng(0).normal(size=(2, 5)).astype("float32")
    np.testing.assert_array_equal(clone([x]), node.call([x]))
    clone.operation.factor.assign(clone.operation.factor + 1.0)
    assert np.abs(np.array(clone([x])) - np.array(node.call([x]))).max() > 0.1


def test_float_call_survives_in_a_new_model() -> None:
    shapes = ((6, 2, 8), (3, 2, 8))  # attention over two axes
    node = trace_model(build(lambda x, y: L.MultiHeadAttention(2, 4, name="mha")(x, y), *shapes))["mha"]
    inputs = [keras.Input(s) for s in shapes]
    clone = node.call.clone()
    model = keras.Model(inputs, clone(inputs))
    again = FloatCall.of(clone.operation)
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(2, *s)).astype("float32") for s in shapes]
    np.testing.assert_allclose(model(x), node.call(x), atol=1e-6)
    np.testing.assert_allclose(again(x), node.call(x), atol=1e-6)


def test_lambda_keeps_its_function_in_the_copy() -> None:
    """A deserialized lambda has lost its module's globals, `tf` here."""
    node = trace_model(build(L.Lambda(lambda x: tf.math.cumprod(x, 1), name="odd"), (2,)))["odd"]
    x = np.ones((1, 2), "float32")
    np.testing.assert_array_equal(node.call.clone()([x]), node.call([x]))


def test_unserializable_lambda_is_named_when_it_has_to_be_copied() -> None:
    secret = object()
    model = build(L.Lambda(lambda x: tf.math.cumprod(x, 1) if secret else x, name="odd"), (2,))
    node = trace_model(model)["odd"]
    with pytest.raises(ModelError, match="'odd'.*serialize"):
        node.call.clone()


# --- what is refused


def test_weights_that_are_not_finite_are_named() -> None:
    model = build(L.Dense(2, name="broken"), (3,))
    model.layers[-1].kernel.assign(np.full((3, 2), np.nan))
    with pytest.raises(ModelError, match="'broken'.*'kernel'"):
        trace_model(model)


def test_channels_first_is_refused_where_it_stays_float() -> None:
    with pytest.raises(ModelError, match="'c'.*channels_last"):
        trace_model(build(L.Conv3DTranspose(2, 3, data_format="channels_first", name="c"), (2, 4, 4, 4)))


def test_dynamic_dimensions_are_refused() -> None:
    with pytest.raises(ModelError, match="'free'.*only the batch.*input_shape"):
        x = keras.Input((None, 3), name="free")
        trace_model(keras.Model(x, L.Dense(2)(x)))


def test_dimensions_that_keras_lost_are_found_again() -> None:
    def function(x: Any) -> Any:
        x = L.EinsumDense("abc,cd->abd", output_shape=(None, 6))(x)
        return L.Flatten()(L.LayerNormalization()(x))

    graph = traced(build(function, (5, 4)))
    assert graph[graph.outputs[0]].shape == (None, 30)


def test_fixed_batch_is_made_free() -> None:
    x = keras.Input(batch_shape=(3, 4, 5))
    y = L.LayerNormalization()(keras.ops.reshape(x, (3, 20)))
    graph = traced(keras.Model(x, y))
    assert [n.shape for n in graph] == [(None, 4, 5), (None, 20), (None, 20)]


def test_mixing_samples_is_refused() -> None:
    with pytest.raises(ModelError, match="batch"):
        trace_model(build(lambda x: x[0], (3, 4)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keras.Sequential([L.Dense(2)]), "not built"),
        (Subclassed, "not built"),
        (lambda: L.Dense(2), "keras.Model"),
    ],
)
def test_models_that_are_not_models_yet(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        trace_model(make())


def test_untraceable_model_says_why() -> None:
    model = Untraceable()
    model(np.ones((1, 3), "float32"))
    with pytest.raises(ModelError, match="cannot be traced"):
        trace_model(model)


def test_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    check_backend()
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(BackendError, match="KERAS_BACKEND=tensorflow"):
        check_backend()


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(DATA.glob("models/*.keras")), ids=lambda p: p.stem)
def test_real_models(path: Path) -> None:
    traced(keras.saving.load_model(path, compile=False), tolerance=1e-4)
