"""Which grids learn and how, and which are one."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kquant.config.quant_config import QuantConfig
from kquant.config.specs import GRADIENTS, Training
from kquant.graph.ir import Graph, Node
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.keras.fake_quant import FakeQuant
from kquant.keras.model import QuantizedModel, extract
from kquant.keras.unit import weight_unit
from kquant.qat.learning import learning_of, zero_ranges
from kquant.qat.prepare import prepare_qat
from tests.support.quantizers import TQT, layer_table, outputs, weights


def prepared(model: keras.Model, config: Any = "w8a8", gradient: str = "lsq", **settings: Any) -> QuantizedModel:
    return prepare_qat(model, data(), config, training=Training(gradient=gradient, **settings), progress=False)


def data(samples: int = 32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(samples, 6, 6, 2)).astype(np.float32)


def many_ends() -> keras.Model:
    """A relu, a linear, a tanh and a softmax."""
    x = inputs = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="rectified")(x)
    x = layers.Conv2D(4, 3, name="linear")(x)
    x = layers.Activation("tanh", name="tanh")(x)
    x = layers.Conv2D(3, 1, name="head")(x)
    return keras.Model(inputs, layers.Softmax(name="probabilities")(layers.Flatten(name="flat")(x)))


def gradient_of(quantizers: dict[str, FakeQuant], name: str) -> str:
    """The gradient of the one tensor whose name starts so."""
    found = [q.gradient for key, q in quantizers.items() if key.split("/")[0] == name]
    assert found, (name, list(quantizers))
    return found[0]


KINDS = {  # of weights, of a grid that starts at zero, of any other
    "ste": ("ste", "ste", "ste"),
    "lsq": ("lsq", "lsq", "lsq"),
    "lsq+": ("lsq", "lsq", "lsq+"),
    "min_max": ("symmetric", "min_max", "min_max"),
    "tqt": ("tqt", "tqt", "tqt"),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_every_grid_learns_as_its_kind_permits(gradient):
    config = "w8a8" if gradient != "tqt" else TQT
    model = prepared(many_ends(), config, gradient)
    of_weights, at_zero, other = KINDS[gradient]
    assert {q.gradient for q in weights(model).values()} == {of_weights}
    found = outputs(model)
    assert gradient_of(found, "rectified") == at_zero
    assert gradient_of(found, "linear") == gradient_of(found, "head") == other
    learn = {name for name, q in found.items() if q.gradient != "ste"}
    graph = extract(model).graph
    fixed = {name for name in found if graph[name].op in ("input", "tanh", "softmax")}
    assert {graph[name].op for name in fixed} == {"input", "tanh", "softmax"}
    assert learn == (set() if gradient == "ste" else found.keys() - fixed)


@pytest.mark.parametrize("gradient", ["lsq", "lsq+", "min_max"])
def test_powers_of_two_learn_as_such_whatever_is_asked(gradient):
    model = prepared(many_ends(), TQT, gradient)
    assert {q.gradient for q in weights(model).values()} == {"tqt"}
    assert gradient_of(outputs(model), "linear") == "tqt"
    for q in [*weights(model).values(), *outputs(model).values()]:
        for v in q.learned.values():
            v.assign(v + 0.7)
        mantissa, _ = np.frexp(q.to_grid().scale)
        np.testing.assert_array_equal(mantissa, 0.5)


@pytest.mark.parametrize("gradient", ["lsq+", "min_max"])
def test_what_the_config_wants_symmetric_stays_so(gradient):
    for config in ({"preset": "w8a8", "activations": {"symmetric": True}}, "w8a16"):
        model = prepared(many_ends(), config, gradient)
        for q in [*weights(model).values(), *outputs(model).values()]:
            before = q.to_grid().zero_point
            for k, v in enumerate(q.learned.values()):
                v.assign(v + 0.5 - k)
            np.testing.assert_array_equal(q.to_grid().zero_point, before)


def test_the_elements_of_lsq_are_the_values_of_a_sample_that_one_scale_quantizes():
    model = prepared(many_ends(), "w8a8")
    assert weights(model)["linear"].elements == 3 * 3 * 4  # one scale per output channel
    assert outputs(model)["linear"].elements == 2 * 2 * 4
    per_tensor = prepared(many_ends(), "w8a8-per_tensor")
    assert weights(per_tensor)["linear"].elements == 3 * 3 * 4 * 4


def test_the_levels_of_lsq_are_those_above_zero_when_training_begins():
    model = prepared(many_ends(), "w4a8")
    assert {q.levels for q in weights(model).values()} == {7}
    for q in outputs(model).values():
        if q.gradient == "lsq":
            assert q.levels == q.qmax - int(q.to_grid().zero_point)


def test_the_rate_reaches_every_grid_that_learns():
    model = prepared(many_ends(), rate=0.25)
    assert {q.rate for q in [*weights(model).values(), *outputs(model).values()] if q.gradient != "ste"} == {0.25}


# --- what is one ------------------------------------------------------------------------------------------------------


def joined(constant: bool) -> keras.Model:
    x = inputs = keras.Input((6, 6, 2), name="image")
    a = layers.Conv2D(3, 3, name="a", activation="relu")(x)
    b = layers.Conv2D(3, 3, name="b")(x)
    if constant:
        return keras.Model(inputs, layers.Conv2D(2, 1, name="c")(keras.ops.maximum(b, np.float32([-0.1, 0.2, 0.0]))))
    return keras.Model(inputs, layers.Conv2D(2, 1, name="c")(layers.Concatenate(name="cat")([a, b])))


def assert_one_grid(a: FakeQuant, b: FakeQuant) -> None:
    assert a.scale is b.scale and a.zero_point is b.zero_point
    assert all(b.learned[name] is v for name, v in a.learned.items())


def test_inputs_of_a_concatenation_learn_one_grid():
    model = prepared(joined(constant=False), gradient="lsq+")
    quantizers = outputs(model)
    assert_one_grid(quantizers["a"], quantizers["b"])
    assert quantizers["a"].gradient != "ste"
    assert len({id(v) for v in model.trainable_variables}) == len(model.trainable_variables)
    quantizers["b"].learned["log_scale"].assign(0.4)
    grids = extract(model).activations
    assert grids["a"].scale == grids["b"].scale == grids["cat"].scale
    assert grids["c"].scale != grids["a"].scale


def test_a_constant_shares_the_grid_of_what_it_meets_which_stays():
    """The constant's values are given, so that the grid they share is too."""
    model = prepared(joined(constant=True))
    graph = extract(model).graph
    (constant,) = (n.name for n in graph if n.op == "const")
    (maximum,) = (n for n in graph if n.op == "maximum")
    (other,) = (i for i in maximum.inputs if i != constant)
    quantizers = outputs(model)
    assert_one_grid(quantizers[other], quantizers[constant])
    assert quantizers[other].gradient == "ste"


def shared_layer(calls: int = 2) -> keras.Model:
    x = inputs = keras.Input((6, 6, 2), name="image")
    conv = layers.Conv2D(2, 3, padding="same", activation="relu", name="shared")
    for _ in range(calls):
        x = conv(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))


def test_calls_of_one_layer_have_one_weight_with_one_grid():
    model = prepared(shared_layer())
    first, second = (layer for layer in layer_table(model).values() if layer.node.origin == "shared")
    assert first.variables_by_name["kernel"] is second.variables_by_name["kernel"]
    assert first.variables_by_name["bias"] is second.variables_by_name["bias"]
    assert_one_grid(first.weight_quantizer, second.weight_quantizer)
    assert first.output_quantizer.scale is not second.output_quantizer.scale  # each has an output of its own
    assert len(model.trainable_variables) == 4 + 2 + 3  # two layers; grids of two weights and three outputs


def test_gradients_of_calls_of_one_layer_add_up():
    user, x = shared_layer(), data(4)
    model = prepared(user)
    kernel = next(layer for layer in layer_table(model).values() if layer.node.origin == "shared").variables_by_name
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=True) ** 2)
    together = tape.gradient(loss, kernel["kernel"].value)
    alone = prepared(user)
    apart = [layer for layer in layer_table(alone).values() if layer.node.origin == "shared"]
    untied = keras.Variable(apart[1].variables_by_name["kernel"].numpy())
    apart[1].variables_by_name = {**apart[1].variables_by_name, "kernel": untied}
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(alone(x, training=True) ** 2)
    parts = tape.gradient(loss, [apart[0].variables_by_name["kernel"].value, untied.value])
    assert all(np.abs(p).max() > 0 for p in parts)
    np.testing.assert_allclose(together, parts[0] + parts[1], rtol=1e-3, atol=1e-4 * np.abs(together).max())


def test_layers_that_are_equal_by_chance_stay_apart():
    x = inputs = keras.Input((6, 6, 2))
    a, b = (layers.Conv2D(2, 3, name=name) for name in "ab")
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(a(x) + b(x))))
    b.set_weights(a.get_weights())
    table = layer_table(prepared(model))
    assert table["a"].variables_by_name["kernel"] is not table["b"].variables_by_name["kernel"]


# --- units of weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "shape", "channels"),
    [
        ("conv2d", (3, 3, 4, 5), (1, 1, 1, 5)),
        ("depthwise_conv2d", (3, 3, 4, 2), (1, 1, 4, 2)),
        ("conv2d_transpose", (3, 3, 5, 4), (1, 1, 5, 1)),
        ("dense", (36, 5), (1, 5)),
    ],
)
def test_units_give_every_channel_the_deviation_of_a_fresh_one(op, shape, channels):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape) * np.exp2(rng.uniform(-3, 3, channels))
    unit = weight_unit(op, weight.astype(np.float32))
    assert unit.shape == channels and (np.log2(unit) == np.rint(np.log2(unit))).all()
    axes = tuple(k for k, n in enumerate(channels) if n == 1 and shape[k] > 1)
    fan_in = np.prod([shape[k] for k in axes])
    ratio = np.sqrt(np.square(weight / unit).mean(axes) / (2 / fan_in))
    assert (np.abs(np.log2(ratio)) <= 0.5 + 1e-6).all()
    np.testing.assert_array_equal(weight_unit(op, (8 * weight).astype(np.float32)), 8 * unit)


def test_units_of_dead_channels_are_bounded():
    weight = np.float32([[0.5, 1e-20, 0.0], [-0.5, 0.0, 0.0]])
    unit = weight_unit("dense", weight)[0]
    assert unit[1] == unit[2] == unit[0] * 2.0**-6
    np.testing.assert_array_equal(weight_unit("dense", np.zeros((2, 3), np.float32)), np.ones((1, 3)))


def test_weights_in_units_are_the_users_bit_for_bit(tmp_path):
    user = many_ends()
    user.get_layer("linear").kernel.assign(user.get_layer("linear").kernel * [1e-3, 1.0, 30.0, 0.0])
    model = prepared(user, {"preset": "w8a8", "correct_bias": False})
    model.save(tmp_path / "model.keras")
    for one in (model, keras.saving.load_model(tmp_path / "model.keras")):
        for name in ("rectified", "linear", "head"):
            layer = one.get_layer(name)
            assert layer.unit is not None and not layer.unit.trainable
            np.testing.assert_array_equal(extract(one).graph[name].weights["kernel"], user.get_layer(name).kernel)
            np.testing.assert_array_equal(
                layer.variables_by_name["kernel"] * layer.unit, layer.trained_weights()["kernel"]
            )


def test_weights_may_train_as_they_are():
    user = many_ends()
    model = prepared(user, relative_weights=False)
    assert all(layer.unit is None for layer in layer_table(model).values())
    np.testing.assert_array_equal(
        model.get_layer("linear").variables_by_name["kernel"], user.get_layer("linear").kernel
    )


@pytest.mark.parametrize("optimizer", [pytest.param("adam", marks=pytest.mark.slow), "sgd"])
def test_training_does_not_depend_on_the_range_of_the_input(optimizer):
    """Images of 0 to 256 with a first layer of 1/256 its size: without units, Adam's first step ruins that layer."""
    curves = []
    for factor in (1.0, 256.0):
        keras.utils.set_random_seed(5)
        user, x = many_ends(), np.abs(data(64))
        first = user.get_layer("rectified")
        first.kernel.assign(first.kernel / factor)
        model = prepare_qat(user, x * factor, "w8a8", progress=False)
        model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=False)
        model.optimizer.learning_rate = 0.01
        curves.append([model.train_on_batch(x * factor, np.arange(64) % 3) for _ in range(10)])
    assert curves[0][-1] < curves[0][0]
    np.testing.assert_allclose(*curves, rtol=1e-5)


# --- ranges of zero width --------------------------------------------------------------------------------------------


def one_layer(weight: float, scale: float, zero_point: int, op: str = "dense") -> QuantizedGraph:
    graph = Graph(
        {
            "x": Node(name="x", op="input", shape=(None, 4)),
            "y": Node(
                **{"name": "y", "op": op, "inputs": ("x",), "shape": (None, 3), "origin": "mine"},
                weights={"kernel": np.full((4, 3), weight, np.float32), "bias": np.zeros(3, np.float32)},
            ),
        },
        *(("x",), ("y",), ("x",), ("y",), "one"),
    )
    given = Grid(np.float32(1.0), np.int32(-128), -128, 127)  # an image of 0 to 255: a scale of 1 by right
    grid = Grid(np.float32(scale), np.int32(zero_point), -128, 127)
    kernel = Grid(np.ones(3, np.float32), np.zeros(3, np.int32), -127, 127, 1)
    return QuantizedGraph(graph, {"x": given, "y": grid}, {"y": kernel})


@pytest.mark.parametrize(
    ("qgraph", "changes", "found"),
    [
        (one_layer(0.5, 0.1, -128), {}, []),
        (one_layer(0.0, 0.1, -128), {}, ["mine"]),
        (one_layer(0.5, 1.0, -128), {}, ["mine"]),
        (one_layer(0.5, 1.0, -10), {}, []),
        (one_layer(0.5, 1.0, -128), {"rules": [{"name": "mine", "activations": {"range": [0, 255]}}]}, []),
    ],
    ids=["as it should be", "weights", "output", "a scale of 1 around zero", "a range that was given"],
)
def test_ranges_of_zero_width_are_found(qgraph, changes, found):
    assert zero_ranges(qgraph, QuantConfig.load({"preset": "w8a8", **changes})) == found


def test_learning_of_a_graph_names_nodes():
    learning = learning_of(one_layer(0.5, 0.1, 3), QuantConfig.load("w8a8"), Training(gradient="lsq+"))
    assert dict(learning.weights["y"]) == {"gradient": "lsq", "rate": 1.0, "elements": 4, "levels": 127}
    assert dict(learning.grids["y"]) == {"gradient": "lsq+", "rate": 1.0, "elements": 3, "levels": 124}
    assert dict(learning.grids["x"]) == {}
    assert learning.tied_weights == learning.tied_grids == ()
