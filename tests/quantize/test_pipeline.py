"""The pipeline: which steps are taken, in which order, and that every one of them reaches the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.config.quant_config import QuantConfig
from kquant.graph.ir import Graph
from kquant.graph.ops import evaluate, op_of, weight_of, weight_view
from kquant.graph.transforms import prepare_graph
from kquant.graph.transforms.absorb_bias import absorb_bias
from kquant.graph.transforms.equalize import equalize
from kquant.grids.grid import quantize
from kquant.keras.model import extract
from kquant.keras.report import layer_rows
from kquant.quantize.adaround import adaround
from kquant.quantize.analytic_correction import correct_biases_analytically
from kquant.quantize.bias_correction import correct_biases, round_kernel
from kquant.quantize.calibrate import quantize_graph, smallest_outputs, weight_grids
from kquant.quantize.data import CalibrationData
from kquant.quantize.pipeline import decide, quantize_after_training
from kquant.quantize.plan import make_plan
from kquant.quantize.pooling import prepare_pooling
from kquant.targets.litert.flatbuffer import read_tensors
from kquant.targets.litert.kernels import KERNELS
from tests.support import zoo
from tests.support.toy import calibration, config, toy_data, toy_graph

ALL = {"equalize", "absorb_bias", "adaround", "correct_bias"}
SWITCHES = ("equalize", "absorb_bias", "adaround", "correct_bias")
SHAPE = (10, 10, 3)


@cache
def mobile() -> keras.Model:
    """Convolutions with batch normalization, channels of very different sizes, and some that a ReLU never cuts."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input(SHAPE, name="image")
    for filters in (8, 12):
        x = layers.Conv2D(filters, 1 if filters == 12 else 3, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.ReLU(6.0)(layers.BatchNormalization()(layers.DepthwiseConv2D(3, use_bias=False)(x)))
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, layers.Dense(5, activation="softmax", name="fc")(x))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            size = layer.gamma.shape[0]
            layer.gamma.assign(np.exp(rng.normal(-0.5, 0.8, size)))
            layer.beta.assign(np.where(np.arange(size) % 4 == 0, 5 * np.asarray(layer.gamma), rng.normal(0, 0.5, size)))
    moments = keras.Model(inputs, [layer.input for layer in model.layers if "batch" in layer.name])
    for k, layer in enumerate(lay for lay in model.layers if "batch" in lay.name):  # statistics as training leaves them
        seen = moments.predict(images(128), verbose=0)[k]
        layer.moving_mean.assign(seen.mean((0, 1, 2)))
        layer.moving_variance.assign(seen.var((0, 1, 2)))
    return model


def images(samples: int = 48, seed: int = 1) -> np.ndarray:
    """Noise that is alike in neighbouring pixels."""
    x = np.random.default_rng(seed).normal(size=(samples, *SHAPE))
    return (0.5 * x + 0.5 * np.roll(x, 1, axis=1) + 0.5 * np.roll(x, 1, axis=2)).astype(np.float32)


def run(settings: Any, data: Any = "images", seed: int = 0) -> kquant.QuantizedModel:
    chosen = images() if isinstance(data, str) else data
    return kquant.quantize_model(mobile(), chosen, settings, seed=seed, progress=False)


def taken(qmodel: kquant.QuantizedModel) -> list[str]:
    return [s.name for s in qmodel.quantization.steps if s.taken]


def note(qmodel: kquant.QuantizedModel, name: str) -> str:
    return " | ".join(s.note for s in qmodel.quantization.steps if s.name == name)


def assert_same_weights(a: Graph, b: Graph) -> None:
    for node in a:
        for key, value in node.weights.items():
            np.testing.assert_array_equal(value, b[node.name].weights[key], err_msg=f"{node.name}/{key}")


def integers(content: bytes) -> dict[str, np.ndarray]:
    """The kernels of a file, as stored."""
    return {name: t.data for name, t in read_tensors(content).items() if name.endswith("/kernel")}


def assert_stored(graph: Graph, weights: Mapping[str, Any], content: bytes) -> None:
    """The file holds the integers of these kernels on these grids."""
    stored = integers(content)
    for name, grid in weights.items():
        key = weight_of(graph[name]).name
        expected = KERNELS[graph[name].op].layout.to_file(quantize(weight_view(graph[name]), grid))
        found = stored[f"{name}/{key}"].reshape(expected.shape)  # a convolution of one tap may be a dense layer there
        np.testing.assert_array_equal(found, expected, err_msg=name)


def assert_parity(qmodel: kquant.QuantizedModel) -> bytes:
    content = kquant.export_tflite(qmodel, allow_float=False).content
    report = kquant.verify_tflite(qmodel, content, images(32, seed=2))
    assert report.ok, f"{report}"
    return content


# --- which steps ------------------------------------------------------------------------------------------------------

DECISIONS = [
    ("w8a8", True, {"correct_bias"}),
    ("w8a8", False, {"absorb_bias", "correct_bias"}),
    ("w8a8-per_tensor", True, {"equalize", "correct_bias"}),
    ("w8a8-per_tensor", False, {"equalize", "absorb_bias", "correct_bias"}),
    ("w4a8", True, {"adaround"}),
    ("w4a8", False, {"absorb_bias", "correct_bias"}),
    ("w4a8-per_tensor", True, {"equalize", "adaround"}),
    ("w4a4", True, {"adaround"}),
    ("w8a16", True, {"correct_bias"}),
    ("w4", True, {"adaround"}),
    ("w4", False, {"correct_bias"}),
    ("w8", True, {"correct_bias"}),
    ("a8", True, set()),
    ("a8", False, {"absorb_bias"}),
    ({"preset": "w4a8", "adaround": False}, True, {"correct_bias"}),
    ({"preset": "w4a8", "adaround": False, "correct_bias": False}, True, set()),
    ({"preset": "w8a8-per_tensor", "equalize": False, "correct_bias": False}, True, set()),
    ({"adaround": True, "correct_bias": True}, True, {"adaround"}),
    ({"adaround": {"solver": "gram"}}, True, {"adaround"}),
    ({"equalize": True, "absorb_bias": True, "correct_bias": True}, True, ALL - {"adaround"}),
    ({"rules": [{"position": "last", "weights": {"bits": 4}}]}, True, {"adaround"}),
    ({"rules": [{"position": "first", "weights": {"per_channel": False}}]}, True, {"equalize", "correct_bias"}),
    ({"rules": [{"name": ".*", "float": True}]}, True, set()),
    ({"preset": "w4a8", "rules": [{"name": ".*", "float": True}], "inputs": {"range": [-1, 1]}}, False, set()),
]


def given(has_data: bool) -> CalibrationData | None:
    return calibration(toy_data()) if has_data else None


@pytest.mark.parametrize(("settings", "has_data", "steps"), DECISIONS)
def test_a_step_is_taken_where_it_helps_or_is_asked_for(settings, has_data, steps):
    chosen = QuantConfig.load(settings)
    reasons = decide(make_plan(toy_graph(), chosen), chosen, given(has_data))
    assert set(reasons) == ALL
    assert {n for n, why in reasons.items() if not why} == steps


def test_every_step_that_is_left_out_has_its_reason():
    def why(name: str, settings: Any, has_data: bool = True) -> str:
        chosen = QuantConfig.load(settings)
        return decide(make_plan(toy_graph(), chosen), chosen, given(has_data))[name]

    assert why("equalize", "w8a8") == "every channel has a scale of its own"
    assert why("equalize", {"preset": "w8a8-per_tensor", "equalize": False}) == "switched off"
    assert why("equalize", "a8") == why("correct_bias", "a8") == "no weights are quantized"
    assert why("absorb_bias", "w8a8") == "activation ranges come from data"
    assert why("absorb_bias", "w8", False) == "no activation range is estimated"
    assert why("adaround", "w8a8") == "8 bits round well enough"
    assert why("adaround", "w4a8", False) == "it needs data"
    assert why("correct_bias", "w4a8") == "AdaRound sets the biases too"


def test_what_can_be_read_once_is_not_read_for_eight_bits_alone():
    def why(settings: Any) -> str:
        chosen = QuantConfig.load(settings)
        data = CalibrationData((x for x in [toy_data()]), [("in", toy_data().shape, "float32")])
        return decide(make_plan(toy_graph(), chosen), chosen, data)["correct_bias"]

    assert why("w8a8") == "the data can be read once only"
    assert why("w8a8-per_tensor") == why({"correct_bias": True}) == ""


def test_adaround_without_data_is_refused():
    with pytest.raises(kquant.ConfigError, match="pass calibration_data, or remove it"):
        run({"preset": "w4a8", "adaround": True}, None)


# --- the order of the steps, and what each does -----------------------------------------------------------------------


@pytest.mark.parametrize("data", [True, False])
def test_the_steps_are_reported_in_order(data, tmp_path):
    everything = {"preset": "w8a8-per_tensor", "equalize": True, "absorb_bias": True}
    qmodel = run(everything, "images" if data else None)
    rows = qmodel.quantization.steps
    assert list(dict.fromkeys(r.name for r in rows)) == [*SWITCHES, "activation ranges"]
    assert [r.name for r in rows if not r.taken] == ["adaround"]
    assert all(r.note and f"{r.name} " in qmodel.report and r.note in qmodel.report for r in rows)
    assert "regions in" in note(qmodel, "equalize") and "channels of" in note(qmodel, "absorb_bias")
    assert ("empirical, 5 layers" if data else "analytic, 5 layers") in note(qmodel, "correct_bias")
    ranges = "from the data: min_max of 1 tensors, mse of 5" if data else "without data: batch_norm of"
    assert ranges in note(qmodel, "activation ranges")
    assert data or "'image' is estimated to be within" in note(qmodel, "activation ranges")
    qmodel.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.report == qmodel.report and loaded.quantization.steps == rows


def test_the_report_of_adaround():
    qmodel = run({"preset": "w4a8-per_tensor", "adaround": {"solver": "descent"}})
    assert taken(qmodel) == ["equalize", "kernels", "adaround", "activation ranges"]
    solver, count, gain = note(qmodel, "adaround").split(", ")
    assert solver == "descent" and count == "5 layers" and 0 < float(gain.split()[0]) < 1
    assert note(qmodel, "correct_bias") == "AdaRound sets the biases too"


def test_the_pipeline_is_its_steps_one_after_the_other():
    settings = config("w8a8-per_tensor", absorb_bias=True)
    graph, data = prepare_graph(mobile()), calibration(images())
    graph, _ = equalize(graph)
    lows = smallest_outputs(graph, [n.name for n in graph if op_of(n).linear], data, False)
    graph, _ = absorb_bias(graph, lows=lows)
    plan = make_plan(graph, settings)
    corrected, _ = correct_biases(plan.graph, weight_grids(plan), data, progress=False)
    found = extract(run(settings)).graph
    assert_same_weights(corrected, found)


def test_the_data_free_pipeline_is_its_steps_one_after_the_other():
    settings = config("w8a8-per_tensor")
    graph, report = equalize(prepare_graph(mobile()))
    assert report.regions
    graph, absorption = absorb_bias(graph)
    assert any(c.any() for c in absorption.absorbed.values())
    plan = make_plan(graph, settings)
    corrected, _ = correct_biases_analytically(plan.graph, weight_grids(plan))
    assert_same_weights(corrected, extract(run(settings, None)).graph)


def test_without_a_step_it_is_the_plain_quantization():
    settings = config("w8a8", correct_bias=False)
    qgraph, quantization, _ = quantize_after_training(toy_graph(), settings, calibration(toy_data()), progress=False)
    graph, _ = prepare_pooling(toy_graph(), settings, calibration(toy_data()), progress=False)
    plain = quantize_graph(make_plan(graph, settings), calibration(toy_data()), progress=False)
    assert [s.name for s in quantization.steps if s.taken] == ["pooling", "activation ranges"]
    assert_same_weights(plain.graph, qgraph.graph)
    for name, grid in plain.activations.items():
        np.testing.assert_array_equal(grid.scale, qgraph.activations[name].scale)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_the_model_and_nothing_else_does(name):
    off = dict.fromkeys(SWITCHES, False)
    base = {"preset": "w4a8-per_tensor", **off}
    plain, other = run(base), run({**base, name: True})
    always = {"kernels", "activation ranges"}
    assert set(taken(plain)) == always and set(taken(other)) == {name, *always}
    contents = [kquant.export_tflite(m).content for m in (plain, other)]
    assert contents[0] != contents[1]


def test_the_same_settings_give_the_same_file():
    contents = [kquant.export_tflite(run("w4a8-per_tensor")).content for _ in range(2)]
    assert contents[0] == contents[1]


def test_correction_without_quantized_weights_does_nothing():
    qmodel = run({"preset": "a8", "correct_bias": True, "equalize": True})
    assert note(qmodel, "correct_bias") == "empirical, 0 layers"


@pytest.mark.parametrize("preset", ["w4a8", "w8a8-per_tensor", "w4a8-per_tensor"])
def test_the_automatic_choice_is_better_than_none(preset):
    x = images(64, seed=3)
    graph = prepare_graph(mobile())
    (logits,) = (n.name for n in graph if n.op == "dense")
    want = evaluate(graph, [x], [logits])[0]

    def error(settings: Any) -> float:
        q, *_ = quantize_after_training(graph, config(**settings), calibration(images(128)), progress=False)
        # rounded weights, float activations: the part that the steps are about
        rounded = q.graph.rebuild(
            n if q.weights.get(n.name) is None else round_kernel(n, q.weights[n.name]) for n in q.graph
        )
        return float(np.mean(np.square(evaluate(rounded, [x], [logits])[0] - want)))

    assert error({"name": preset}) < 0.7 * error({"name": preset, **dict.fromkeys(SWITCHES, False)})


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["descent", "stochastic"])
def test_the_integers_of_adaround_are_those_of_the_file(solver):
    settings = config("w4a8", adaround={"solver": solver, "iterations": 50, "scales": [0.9, 1.0]})
    plan = make_plan(prepare_graph(mobile()), settings)
    weights = {n: q for n, q in weight_grids(plan).items() if op_of(plan.graph[n]).matrix}
    graph, rows = adaround(plan.graph, weights, calibration(images()), settings.adaround, progress=False)
    assert np.mean([r.changed for r in rows]) > 0.01
    qmodel = run(settings)
    assert_stored(graph, {r.node: r.grid for r in rows}, assert_parity(qmodel))
    assert note(qmodel, "adaround").startswith(f"{solver}, 5 layers")
    assert qmodel.quantization.config == settings


@pytest.mark.slow
def test_corrected_weights_are_rounded_to_nearest_in_the_file():
    settings = config("w8a8-per_tensor")
    graph, _ = equalize(prepare_graph(mobile()))
    content = assert_parity(run(settings))
    assert_stored(graph, weight_grids(make_plan(graph, settings)), content)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ("w8a8", None),
        ("w4a8", None),
        ("w8a8-per_tensor", None),
        ({"preset": "w8a8", "absorb_bias": True}, "images"),
        ({"preset": "w8a8-per_tensor", "absorb_bias": True}, "images"),
        ({"preset": "w4a8", "equalize": True, "absorb_bias": True}, "images"),
    ],
)
def test_parity(settings, data):
    assert_parity(run(settings, data))


# --- without data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["w8a8", "w8a8-per_tensor"])
def test_without_data_the_outputs_are_those_of_the_float_model(preset):
    x, qmodel = images(256, seed=4), run(preset, None)
    want, got = mobile().predict(x, verbose=0), qmodel.predict(x, verbose=0)
    assert np.abs(got - want).max() < 0.08 and np.abs(got - want).mean() < 0.012
    ranges = {r["node"]: r["range"] for r in layer_rows(qmodel.quantization, extract(qmodel))}
    low, high = ranges["image"]
    assert low < 0 < high and 0.5 < (high - low) / (images().max() - images().min()) < 2


DATA_FREE = {  # batch normalization behind the first convolution of colour images, an embedding, or bytes as input
    *("sequential", "shared_submodel"),
    *("composite_layer", "text_cnn", "detector", "same_output_twice", "linear_and_activated_output"),
}
FAST = ("sequential", "text_cnn", "same_output_twice")
NEED_DATA = {"unet": 1, "preactivation": 3, "dict_inputs_and_outputs": 4}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in sorted(DATA_FREE)]
)
def test_architectures_that_need_no_data(name):
    model = zoo.build(name)
    qmodel = kquant.quantize_model(model, config="w8a8-per_tensor", progress=False)
    assert taken(qmodel)[:3] == ["equalize", "absorb_bias", "correct_bias"]
    report = kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, zoo.inputs(model))
    assert report.ok, f"{name}\n{report}"


@pytest.mark.parametrize("name", NEED_DATA)
def test_architectures_that_need_data_are_told_for_which_tensors(name):
    with pytest.raises(kquant.CalibrationError) as error:
        kquant.quantize_model(zoo.build(name), progress=False)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("Without calibration data, ") and lines[0].split()[3] == str(NEED_DATA[name])
    tensors = [line for line in lines if line.startswith("  '")]
    assert len(tensors) == NEED_DATA[name]
    assert all("nothing is known of the input '" in t or "has no rule for moments" in t for t in tensors)
    assert lines[-1].startswith("Pass calibration_data") and 'inputs={"range": [low, high]}' in lines[-1]


def test_many_unknown_tensors_are_not_all_listed():
    x = inputs = keras.Input((4,))
    for _ in range(12):
        x = layers.Dense(4)(x)
    with pytest.raises(kquant.CalibrationError, match=r"(?s)13 of 13 .*\.\.\. and 5 more\n"):
        kquant.quantize_model(keras.Model(inputs, x), progress=False)


@pytest.mark.parametrize(
    ("layer", "channels"), [(lambda: layers.Conv2D(3, 3), 2), (lambda: layers.Dense(4, activation="relu"), 16)]
)
def test_a_fixed_input_range_is_enough_for_one_layer(layer, channels):
    inputs = keras.Input((6, 6, channels))
    model = keras.Model(inputs, layer()(inputs))
    x = np.random.default_rng(0).uniform(-1, 3, (64, 6, 6, channels)).astype(np.float32)
    with pytest.raises(kquant.CalibrationError, match="inputs="):
        kquant.quantize_model(model, progress=False)
    qmodel = kquant.quantize_model(model, config={"inputs": {"range": [-1, 3]}}, progress=False)
    want, got = model.predict(x, verbose=0), qmodel.predict(x, verbose=0)
    at_input, at_output = (np.asarray(row["range"]) for row in layer_rows(qmodel.quantization, extract(qmodel)))
    np.testing.assert_allclose(at_input, [-1, 3], atol=0.02)
    assert np.mean(np.abs(got - want) > 0.015 * np.ptp(want)) < 0.002  # few values are clipped,
    assert np.ptp(at_output) < 2 * np.ptp(want)  # and no whole bit is wasted
    # a range tells no mean
    assert note(qmodel, "correct_bias").startswith("analytic, 0 layers; not ")
    assert kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, x).ok


# --- behaviour as a function ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "data"), [("w4a8-per_tensor", "images"), ("w8a8-per_tensor", None)])
def test_the_users_model_and_data_are_not_modified(preset, data):
    before = [w.numpy().copy() for w in mobile().weights]
    x = images()
    run({"preset": preset, "absorb_bias": True}, x if data else None)
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(before, mobile().weights, strict=True))
    np.testing.assert_array_equal(x, images())


def test_graph_and_config_are_not_modified():
    graph, settings = toy_graph(), config("w4a8-per_tensor", absorb_bias=True)
    copy = replace(settings)
    quantize_after_training(graph, settings, calibration(toy_data()), progress=False)
    assert settings == copy
    assert_same_weights(graph, toy_graph())


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["w4a8", "w8a8-per_tensor"])
def test_the_same_seed_gives_the_same_file(preset):
    settings = {"preset": preset} | ({"adaround": {"positions": 8}} if preset == "w4a8" else {})
    files = [kquant.export_tflite(run(settings, seed=s)).content for s in (1, 1, 2)]
    assert files[0] == files[1]
    assert (files[0] != files[2]) == (preset == "w4a8")  # only the positions of AdaRound are drawn
    assert run(settings, seed=3).quantization.seed == 3


def batches(size: int = 16) -> Any:
    x = images()
    return (x[k : k + size] for k in range(0, len(x), size))


@pytest.mark.parametrize(
    "settings", [{"absorb_bias": True}, *(pytest.param(p, marks=pytest.mark.slow) for p in ("w4a8", "w8a8-per_tensor"))]
)
def test_a_generator_cannot_be_read_by_several_steps(settings):
    with pytest.raises(kquant.CalibrationError, match="(?s)generator.*Pass the function that creates"):
        run(settings, batches())
    assert np.isfinite(run(settings, batches).predict(images(2), verbose=0)).all()


@pytest.mark.parametrize("preset", ["w8a8", "w8", {"preset": "w8", "correct_bias": True}])
def test_a_generator_is_enough_for_one_pass(preset):
    run(preset, batches())


@pytest.mark.parametrize("size", [7, pytest.param(1, marks=pytest.mark.slow), pytest.param(48, marks=pytest.mark.slow)])
def test_the_cutting_into_batches_changes_next_to_nothing(size):
    def kernels(cut: int) -> dict[str, np.ndarray]:
        return integers(kquant.export_tflite(run("w8a8-per_tensor", [*batches(cut)])).content)

    a, b = kernels(16), kernels(size)
    assert all(np.array_equal(a[k], b[k]) for k in a)
