"""Graph -> Keras model -> graph is the identity, and the model is independent of what it was made from."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kquant
from kquant.errors import ModelError
from kquant.graph.ops import evaluate
from kquant.graph.quantized import QuantizedGraph
from kquant.graph.transforms import prepare_graph
from kquant.keras.layer import QuantizedLayer
from kquant.keras.model import QuantizedModel, extract, insert
from kquant.quantize.calibrate import quantize_graph
from kquant.quantize.data import CalibrationData
from kquant.quantize.plan import make_plan
from models import digits_cnn
from tests.support import zoo
from tests.support.graphs import chain, quantized
from tests.support.odd import Odd
from tests.support.operations import GRAPHS
from tests.support.same import assert_same
from tests.support.toy import asked, config, toy_data, toy_qgraph


@pytest.mark.parametrize("name", ["w8a8", "w4a8-per_tensor", "w4a4", "w8a16", "w8"])
def test_extract_inverts_insert(name):
    qgraph = toy_qgraph(name)
    assert_same(qgraph, extract(insert(qgraph, asked(config(name).target))))


@pytest.mark.parametrize("name", ["add_const", "minimum_const", "prelu", "concat", "transposed_same", "affine_rank3"])
def test_constants_and_odd_weights_survive(name):
    graph = GRAPHS[name]()
    x = [np.random.default_rng(k).normal(size=(2, *graph[n].shape[1:])).astype("float32") for k, n in enumerate(graph.inputs)]  # fmt: skip # noqa: E501
    qgraph = quantized(graph, x)
    assert_same(qgraph, extract(insert(qgraph, asked("litert"))))


def test_a_layer_that_stays_float_is_fenced_and_survives():
    qgraph = toy_qgraph(rules=[{"name": "^dw$", "float": True}])
    assert qgraph.activations["dw"] is None
    found = extract(insert(qgraph, asked("litert")))
    assert_same(qgraph, found)
    assert found.graph["dw"].weights["kernel"].shape == (3, 3, 8, 1)


def attention_model() -> keras.Model:
    keras.utils.set_random_seed(3)
    x = inputs = keras.Input((6, 4), name="tokens")
    x = layers.Dense(4, name="before")(x)
    x = Odd(name="mixed")(x)
    x = layers.LayerNormalization(name="norm")(x)
    return keras.Model(inputs, layers.Dense(2, name="after")(x), name="small_attention")


def test_float_layers_are_copies_with_the_same_weights():
    model = attention_model()
    x = np.random.default_rng(0).normal(size=(16, 6, 4)).astype(np.float32)
    graph = prepare_graph(model)
    data = CalibrationData(x, [("tokens", (None, 6, 4), "float32")])
    qgraph = quantize_graph(make_plan(graph, config()), data, progress=False)
    found = extract(insert(qgraph, asked("litert")))
    assert_same(qgraph, found)
    floats = [n.name for n in graph if n.op == "float"]
    assert floats
    for name in floats:
        ours, theirs = found.graph[name].call.operation, graph[name].call.operation
        assert ours is not theirs
        for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(evaluate(found.graph, [x])[0], model(x), atol=1e-5)  # each call in its place


def test_nothing_is_shared_with_the_users_model():
    model = attention_model()
    x = np.random.default_rng(0).normal(size=(16, 6, 4)).astype(np.float32)
    expected, names = model(x).numpy(), [v.path for v in model.variables]
    qmodel = kquant.quantize_model(model, x, progress=False)
    before = qmodel(x).numpy()
    assert not {id(v) for v in model.variables} & {id(v) for v in qmodel.variables}
    for v in qmodel.variables:
        v.assign(v + 0.5)
    np.testing.assert_array_equal(model(x).numpy(), expected)
    assert [v.path for v in model.variables] == names
    for v in model.variables:
        v.assign(v * 0)
    again = kquant.quantize_model(attention_model(), x, progress=False)
    np.testing.assert_array_equal(again(x).numpy(), before)


def test_extract_reads_the_variables_as_they_stand():
    model = insert(toy_qgraph(), asked("litert"))
    layer = model.get_layer("fc")
    layer.variables_by_name["bias"].assign(np.float32([1, 2, 3, 4, 5]))
    layer.output_quantizer.scale.assign(0.125)
    layer.output_quantizer.zero_point.assign(2.6)  # as training leaves it: the nearest integer counts
    found = extract(model)
    np.testing.assert_array_equal(found.graph["fc"].weights["bias"], [1, 2, 3, 4, 5])
    assert found.activations["fc"].scale == 0.125 and found.activations["fc"].zero_point == 3


def test_a_shared_grid_is_read_from_its_source():
    model = insert(toy_qgraph(), asked("litert"))
    model.get_layer("add").output_quantizer.scale.assign(0.75)
    found = extract(model).activations
    assert {float(found[n].scale) for n in ("add", "cat", "pool")} == {0.75}


def test_the_containers_of_shared_grids_are_known():
    """A resize has no grid of its own, and its arithmetic differs between int8 and int16."""
    graph = GRAPHS["bilinear"]()
    x = np.random.default_rng(0).normal(size=(2, *graph["x"].shape[1:])).astype(np.float32)
    for bits in (8, 16):
        model = insert(quantized(graph, [x], bits=bits, container=bits), asked("litert"))
        assert model.get_layer("resize").activation_bits == bits
        copy = QuantizedModel.from_config(model.get_config())
        assert copy.get_layer("resize").activation_bits == bits


def test_integer_inputs_and_inputs_that_are_outputs():
    graph = chain((5,), dtype="int32")
    qgraph = QuantizedGraph(graph, {"x": None}, {})
    model = insert(qgraph, asked("litert"))
    assert not any(isinstance(layer, QuantizedLayer) for layer in model.layers)
    assert_same(qgraph, extract(model))


def test_other_models_are_refused():
    with pytest.raises(ModelError, match="small_attention.*quantize_model"):
        extract(attention_model())


# --- switches ---------------------------------------------------------------------------------------------------------


def switched(model: QuantizedModel, on: bool) -> QuantizedModel:
    """The same model, all of its quantizers on or off."""
    for variable in model.variables:
        if variable.name == "on":
            variable.assign(on)
    return model


def test_all_off_is_the_float_graph():
    """Up to float32 rounding: oneDNN fuses the operations of the two graphs in different ways."""
    qgraph, x = toy_qgraph(), toy_data(20, seed=5)
    model = switched(insert(qgraph, asked("litert"), switchable=True), False)
    expected = tf.function(lambda v: evaluate(qgraph.graph, [v]), autograph=False)(x)[0]
    for found in (model.predict(x, verbose=0), model(x)):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["w8a8", "w8a16"])
def test_all_on_is_the_simulation_up_to_roundings(name):
    qgraph, target = toy_qgraph(name), config(name).target
    x, nodes = toy_data(60, seed=5), ["c1", "dw", "add", "dw/requantize", "cat", "pool"]
    model, simulation = insert(qgraph, asked(target), switchable=True), insert(qgraph, asked(target))
    for node, found, expected in zip(nodes, model.inner(nodes)([x]), simulation.inner(nodes)([x]), strict=True):
        off = np.rint((found - expected) / float(qgraph.activations[node].scale))
        assert np.mean(off == 0) > 0.85 and np.abs(off).max() <= 3
    output = np.rint((model.predict(x, verbose=0) - simulation.predict(x, verbose=0)) * 256)
    assert np.mean(output == 0) > 0.5 and (name != "w8a8" or np.mean(output == 0) > 0.9)


@pytest.mark.slow
def test_all_on_decides_as_the_simulation_does():
    digits = digits_cnn.load_split()
    qmodel = kquant.quantize_model(keras.saving.load_model(digits_cnn.PATH), digits.calibration, "w8a8", progress=False)
    model = insert(extract(qmodel), qmodel.quantization, switchable=True)
    found, expected = (m.predict(digits.x_test, verbose=0) for m in (model, qmodel))
    assert np.mean(found.argmax(-1) == expected.argmax(-1)) >= 0.99
    step = extract(model).activations[extract(model).graph.outputs[0]].scale
    assert np.mean(np.abs(found - expected) < step / 2) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["upsampling", "fire_and_pool", "dict_inputs_and_outputs", "lstm", "text_average"])
def test_switchable_models_of_all_kinds(name):
    """Float layers, resizing, pools on a shared grid, tables: float when off, near the simulation when on."""
    user = zoo.build(name)
    x = zoo.inputs(user)
    qmodel = kquant.quantize_model(user, x, {"correct_bias": False}, progress=False)  # weights as they are
    qgraph = extract(qmodel)
    model = switched(insert(qgraph, qmodel.quantization, switchable=True), False)
    found, expected = (keras.tree.flatten(m.predict(x, verbose=0)) for m in (model, user))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())
    found, expected = (keras.tree.flatten(m.predict(x, verbose=0)) for m in (switched(model, True), qmodel))
    for output, ours, theirs in zip(qgraph.graph.outputs, found, expected, strict=True):
        q = qgraph.activations[output]
        step = float(q.scale) if q is not None else 0.02 * np.abs(theirs).max()
        assert np.mean(np.abs(ours - theirs) < 0.5 * step) > 0.6 and np.abs(ours - theirs).max() < 4 * step


@pytest.mark.parametrize("name", ["pad_value", "avg_pool_same", "bilinear"])
def test_what_lies_between_steps_is_rounded_as_the_kernels_do_where_its_grid_is_on(name):
    graph = GRAPHS[name]()
    x = np.random.default_rng(0).normal(size=(2, *graph["x"].shape[1:])).astype(np.float32)
    qgraph = quantized(graph, [x])
    model, simulation = insert(qgraph, asked("litert"), switchable=True), insert(qgraph, asked("litert"))
    np.testing.assert_array_equal(model(x), simulation(x))
    np.testing.assert_allclose(switched(model, False)(x), evaluate(graph, [x])[0], atol=1e-6)


def test_weights_that_are_on_are_the_integers_that_were_decided():
    qgraph, x = toy_qgraph(), toy_data(4)
    decided = {**qgraph.integers, "c1": np.roll(qgraph.integers["c1"], 1, 0)}
    qgraph = QuantizedGraph(qgraph.graph, qgraph.activations, qgraph.weights, decided)
    model = switched(insert(qgraph, asked("litert"), switchable=True), False)
    model.get_layer("c1").weight_quantizer.on.assign(True)
    kernel = decided["c1"] * qgraph.weights["c1"].scale
    nodes = (n.with_weights(kernel=kernel) if n.name == "c1" else n for n in qgraph.graph)
    expected = evaluate(qgraph.graph.rebuild(nodes), [x], ["c1"])[0]
    np.testing.assert_allclose(model.inner(["c1"])([x]), expected, atol=1e-5)


def test_a_switchable_model_is_a_quantized_model(tmp_path):
    """It evaluates as it is switched, is read back, and saves with its state."""
    qgraph, x, y = toy_qgraph("w4a4"), toy_data(16), np.zeros((16, 5), np.float32)
    model = insert(qgraph, asked("litert"), switchable=True)
    model.compile(loss="mse")
    losses = []
    for on in (True, False):
        losses.append(switched(model, on).evaluate(x, y, verbose=0))
        assert losses[-1] == pytest.approx(float(np.mean(np.square(model(x)))), rel=1e-4)
    assert losses[0] != losses[1]
    assert_same(qgraph, extract(model))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras", compile=False)
    np.testing.assert_array_equal(loaded(x), model(x))
    np.testing.assert_array_equal(switched(loaded, True)(x), switched(model, True)(x))
    assert_same(qgraph, extract(loaded))


# --- structure and names of the outputs -------------------------------------------------------------------------------


def nested_outputs() -> keras.Model:
    keras.utils.set_random_seed(5)
    x = inputs = keras.Input((6,), name="x")
    hidden = layers.Dense(8, activation="relu", name="hidden")(x)
    label = layers.Dense(3, activation="softmax", name="label_head")(hidden)
    box = layers.Dense(4, name="box_head")(hidden)
    return keras.Model(inputs, {"label": label, "box": box, "extra": [hidden, (box, inputs)]}, name="nested")


def test_outputs_keep_their_structure_and_names_through_saving_and_extraction(tmp_path):
    model, x = nested_outputs(), np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    quantized = kquant.quantize_model(model, x, progress=False)
    quantized.save(tmp_path / "q.keras")
    loaded = keras.saving.load_model(tmp_path / "q.keras")
    again = insert(extract(loaded), loaded.quantization)
    expected, real = quantized.predict(x, verbose=0), model.predict(x, verbose=0)
    keras.tree.assert_same_structure(expected, real)
    for found in (loaded, again):
        assert list(found.output_names) == list(model.output_names)
        outputs = keras.tree.flatten(found.predict(x, verbose=0))
        for a, b in zip(outputs, keras.tree.flatten(expected), strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(keras.tree.flatten(expected), keras.tree.flatten(real), strict=True):
        assert np.mean(np.square(a - b)) < 1e-2 * np.mean(np.square(b))


def test_a_tensor_twice_an_inner_one_and_the_input_among_the_outputs():
    keras.utils.set_random_seed(6)
    inputs = keras.Input((6,), name="x")
    hidden = layers.Dense(5, activation="relu", name="hidden")(inputs)
    y = layers.Softmax(name="scores")(layers.Dense(3, name="logits")(hidden))
    model = keras.Model(inputs, [y, hidden, y, inputs])
    x = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    quantized = kquant.quantize_model(model, x, progress=False)
    assert list(quantized.output_names) == list(model.output_names) == ["scores", "hidden", "scores", "x"]
    file = kquant.export_tflite(quantized).content
    assert kquant.verify_tflite(quantized, file, x).ok
    for a, b in zip(kquant.TFLiteModel(file).predict(x), quantized.predict(x, verbose=0), strict=True):
        np.testing.assert_array_equal(a, b)
