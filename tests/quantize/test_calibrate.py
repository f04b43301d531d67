"""Grids from streamed data: against numpy, whatever the cutting into batches."""

import tracemalloc

import keras
import numpy as np
import pytest

from kquant import TFLiteModel, export_tflite, quantize_model, verify_tflite
from kquant.config.specs import QuantSpec
from kquant.errors import CalibrationError
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import evaluate
from kquant.grids.grid import Grid, dequantize, grid_from_range, quantize_bias
from kquant.grids.observers import Histogram, MinMax, Rows
from kquant.keras.model import extract
from kquant.quantize.calibrate import activation_ranges, make_grids, observe, place, quantize_graph, weight_grids
from kquant.quantize.data import CalibrationData
from kquant.quantize.plan import make_plan
from tests.support.toy import calibration, config, toy_data, toy_graph

MIN_MAX = {"bits": 8, "symmetric": False, "method": "min_max"}
SPECS = [("x", (None, 8, 8, 3), "float32")]


def grids(name="w8a8", batch_size=16, **changes):
    return quantize_graph(make_plan(toy_graph(), config(name, **changes)), calibration(toy_data(), batch_size), False)


@pytest.mark.parametrize("method", ["min_max", "mse", "percentile"])  # and cross_entropy, of the logits
def test_the_cutting_into_batches_changes_nothing(method):
    activations = {**MIN_MAX, "method": method}
    expected = grids(activations=activations).activations
    for batch_size in (1, 7, 64):
        found = grids(batch_size=batch_size, activations=activations).activations
        for name, q in expected.items():
            np.testing.assert_allclose(found[name].scale, q.scale, rtol=1e-5)
            assert found[name].zero_point == q.zero_point


def test_min_max_is_that_of_the_float_graph():
    plan, x = make_plan(toy_graph(), config(activations=MIN_MAX, logits=None)), toy_data()
    found = quantize_graph(plan, calibration(x), progress=False).activations
    for leader, (name, *others) in plan.observed.items():
        assert not others
        value = np.asarray(evaluate(plan.graph, [x], [name])[0])
        expected = grid_from_range(value.min(), value.max(), plan.activations[leader])
        np.testing.assert_allclose(found[leader].scale, expected.scale, rtol=1e-6)
        assert found[leader].zero_point == expected.zero_point


def two_sinks() -> Graph:
    """One tensor in two concatenations with others of other ranges: all of it is on one grid."""
    shape = (None, 4)
    nodes = [Node(name=n, op="input", shape=shape, origin=n, origin_type="InputLayer") for n in ("a", "b")]
    c = Node(name="c", op="const", shape=(4,), weights={"value": np.float32([-9, 0, 1, 2])}, origin="m")
    m = Node(name="m", op="maximum", inputs=("a", "c"), shape=shape, origin="m", origin_type="Maximum")
    n = Node(name="n", op="minimum", inputs=("m", "b"), shape=shape, origin="n", origin_type="Minimum")
    nodes = [*nodes, c, m, n]
    return Graph({v.name: v for v in nodes}, ("a", "b"), ("n",), ("a", "b"), ("y",))


def test_a_shared_grid_is_the_hull_of_what_is_observed():
    plan = make_plan(two_sinks(), config(activations=MIN_MAX))
    observers = {}
    for k, names in enumerate(plan.observed.values()):
        for j, name in enumerate(n for n in names if plan.graph[n].op != "const"):
            observers[name] = MinMax(name)
            observers[name].update(np.float32([-1.0 - k - j, 2.0 + 3 * k - j]))
    found = make_grids(plan, weight_grids(plan), activation_ranges(plan, observers)).activations
    for leader, names in plan.observed.items():
        seen = [(float(observers[n].low), float(observers[n].high)) for n in names if n in observers]
        seen += [(-9.0, 2.0) for n in names if plan.graph[n].op == "const"]
        low, high = min(s[0] for s in seen), max(s[1] for s in seen)
        expected = grid_from_range(low, high, plan.activations[leader])
        assert found[leader].scale == expected.scale and found[leader].zero_point == expected.zero_point
    for name, leader in plan.groups.items():
        assert found[name] is found[leader]


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize("low, high, edge", [(0.0, 3.0, "upper"), (-1.0, 3.0, "lower"), (-2.0, 0.0, "lower")])
def test_small_grids_lie_at_the_edge_that_saturation_clamps(bits, low, high, edge):
    q = grid_from_range(low, high, QuantSpec(bits=bits, symmetric=False))
    p = place(q)
    assert p.qmax - p.qmin == 2**bits - 1
    assert p.qmax == 127 if edge == "upper" else p.qmin == -128
    values = [dequantize(np.arange(g.qmin, g.qmax + 1), g) for g in (q, p)]
    np.testing.assert_array_equal(*values)  # the very same numbers


def test_grids_of_8_bits_or_more_stay():
    for q in (
        Grid(np.float32(0.1), np.int32(3), -128, 127),
        Grid(np.float32(0.1), np.int32(0), -127, 127),
        Grid(np.float32(0.1), np.int32(0), -32767, 32767),
    ):
        assert place(q) is q


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_large_bias_of_a_dead_channel_fits_32_bits(per_channel):
    graph = toy_graph()
    kernel, bias = graph["c1"].weights["kernel"].copy(), graph["c1"].weights["bias"].copy()
    kernel[..., 3] *= 1e-12
    bias[3] = 5.0
    nodes = [n.with_weights(kernel=kernel, bias=bias) if n.name == "c1" else n for n in graph]
    name = "w8a8" if per_channel else "w8a8-per_tensor"
    q = quantize_graph(make_plan(graph.rebuild(nodes), config(name)), calibration(toy_data()), False)
    s_x, s_w = q.activations["in"].scale, q.weights["c1"].scale
    stored = quantize_bias(bias, s_x, s_w)
    assert np.abs(stored).max() < 2**31 - 1
    np.testing.assert_allclose(stored * (s_x * s_w), bias, atol=1e-3)
    others = grids(name).weights["c1"].scale
    if per_channel:  # the neighbours' grids do not change
        np.testing.assert_array_equal(np.delete(s_w, 3), np.delete(others, 3))


def test_weight_grids_cover_the_weights_or_lower_their_error():
    graph = toy_graph()
    for name, method in (("min_max", "min_max"), ("mse", "mse")):
        weights = {"bits": 4, "symmetric": True, "per_channel": True, "method": method}
        q = grids(weights=weights).weights["c1"]
        assert q.scale.shape == (8,) and q.axis == 3 and q.bits == 4, name
        largest = np.abs(graph["c1"].weights["kernel"]).max((0, 1, 2))
        if method == "min_max":
            np.testing.assert_allclose(q.scale * q.qmax, largest, rtol=1e-6)
        else:
            assert (q.scale * q.qmax <= largest * 1.001).all() and (q.scale * q.qmax < 0.99 * largest).any()


def test_observers_are_as_light_as_the_method_permits():
    for method, kind in (("min_max", MinMax), ("mse", Histogram), ("cross_entropy", Rows)):
        settings = {"activations": {**MIN_MAX, "method": method}, "inputs": {**MIN_MAX}, "logits": None}
        plan = make_plan(toy_graph(), config(**settings))
        found = observe(plan, calibration(toy_data(8)), progress=False)
        assert set(found) == {n for names in plan.observed.values() for n in names}
        assert {type(o) for n, o in found.items() if n != "in"} == {kind}


def methods(graph=None, **changes):
    """Range method of every tensor that is observed."""
    plan = make_plan(graph or toy_graph(), config(**changes))
    return {n: plan.activations[n].method for names in plan.observed.values() for n in names}


def logits_graph(*tail: Node) -> Graph:
    """The toy graph with other nodes behind its dense layer; the last one is the output."""
    nodes = [n for n in toy_graph() if n.op != "softmax"] + list(tail)
    return Graph({n.name: n for n in nodes}, ("in",), (nodes[-1].name,), ("x",), ("y",))


def follow(name: str, op: str, source: str, shape=(None, 5), **attrs) -> Node:
    return Node(name=name, op=op, inputs=(source,), shape=shape, origin=name, origin_type=op, attrs=attrs)


def test_the_logits_have_a_method_of_their_own():
    others = {"c1", "dw", "cat", "mean"}
    assert methods() == {"in": "min_max", **dict.fromkeys(others, "mse"), "fc": "cross_entropy"}
    assert methods(logits="mse")["fc"] == "mse" and methods(logits=None)["fc"] == "mse"
    assert type(observe(make_plan(toy_graph(), config()), calibration(toy_data(8)), False)["fc"]) is Rows


def test_a_rule_or_data_free_ranges_come_before_the_method_of_the_logits():
    rule = {"name": "^fc$", "activations": {"method": "percentile"}}
    assert methods(rules=[rule])["fc"] == "percentile"
    assert methods(rules=[{"name": "^fc$", "activations": {"bits": 4}}])["fc"] == "cross_entropy"
    assert "fc" not in methods(rules=[{"name": "^fc$", "activations": {"range": [-8, 8]}}])
    assert set(methods(activations={"method": "batch_norm"}).values()) == {"batch_norm"}


def test_logits_are_found_through_reshapes_and_only_in_front_of_a_final_softmax():
    wide = (None, 1, 5)
    reshaped = logits_graph(
        follow("r1", "reshape", "fc", wide), follow("sm", "softmax", "r1", wide), follow("r2", "reshape", "sm")
    )
    assert methods(reshaped)["fc"] == "cross_entropy"
    assert methods(logits_graph())["fc"] == "mse"  # raw logits: a rule can
    attention = logits_graph(follow("sm", "softmax", "fc"), follow("l", "logistic", "sm"))
    assert methods(attention)["fc"] == "mse"
    split = (None, 5, 1)  # each row of the softmax is no row of the dense layer
    other_axis = logits_graph(follow("r", "reshape", "fc", split), follow("sm", "softmax", "r", split))
    assert methods(other_axis)["fc"] == "mse"
    graph = toy_graph()
    both = Graph(dict(graph.nodes), ("in",), ("sm", "fc"), ("x",), ("y", "z"))
    assert methods(both)["fc"] == "mse"  # the logits are an output too


def test_a_fixed_range_needs_no_data():
    changes = {"activations": {"range": [-4, 4]}, "inputs": {"range": [-1, 1], "bits": 8}}
    plan = make_plan(toy_graph(), config(**changes))
    assert not plan.observed
    found = quantize_graph(plan, None).activations
    for name, (low, high) in (("in", (-1, 1)), ("c1", (-4, 4)), ("cat", (-4, 4)), ("fc", (-4, 4))):
        expected = grid_from_range(low, high, QuantSpec())
        assert (found[name].scale, found[name].zero_point) == (expected.scale, expected.zero_point)
    assert float(found["sm"].scale) == 1 / 256  # what the kernel insists on stays


def test_a_fixed_range_is_that_of_its_tensor_alone():
    plain = grids().activations
    found = grids(inputs={"range": [-1, 1]}).activations
    assert found["in"].scale == grid_from_range(-1, 1, QuantSpec()).scale
    for name in set(plain) - {"in"}:
        np.testing.assert_array_equal(found[name].scale, plain[name].scale)
    small = grids("w8a8", activations={"range": [0, 3], "bits": 4}).activations["c1"]
    assert (small.qmin, small.qmax) == (112, 127)  # placed as an observed one is


def test_a_group_covers_fixed_and_observed_ranges():
    rules = [{"name": "^m$", "activations": {"range": [-20, 1]}}]
    plan = make_plan(two_sinks(), config(activations=MIN_MAX, rules=rules))
    observers = {n: MinMax(n) for names in plan.observed.values() for n in names if plan.graph[n].op != "const"}
    for observer in observers.values():
        observer.update(np.float32([-1, 2]))
    found = make_grids(plan, weight_grids(plan), activation_ranges(plan, observers)).activations["m"]
    assert "m" not in observers
    assert dequantize(np.asarray(found.qmin), found) <= -19.9


def test_a_tensor_of_which_nothing_is_known_is_named():
    plan = make_plan(toy_graph(), config(activations={"method": "batch_norm"}, inputs={"range": [-1, 1]}))
    assert not observe(plan, calibration(toy_data(8)), False)
    with pytest.raises(CalibrationError, match="'c1'.*batch_norm.*range"):
        quantize_graph(plan, None)


@pytest.mark.parametrize("method", ["min_max", "mse"])
def test_memory_does_not_grow_with_the_number_of_batches(method):
    plan = make_plan(toy_graph(), config(activations={**MIN_MAX, "method": method}))

    def peak(batches):
        stream = (toy_data(64, seed=k) for k in range(batches))  # 49 kB each
        data = CalibrationData(stream, SPECS)
        tracemalloc.start()
        observe(plan, data, progress=False)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(2)  # imports and caches
    few, many = peak(5), peak(50)
    assert many < few + 500_000  # the data alone would take 2.2 MB more, the activations 60 MB


def test_a_generator_is_enough():
    batches = np.split(toy_data(), 4)
    plan = make_plan(toy_graph(), config())
    found = quantize_graph(plan, CalibrationData(iter(batches), SPECS), progress=False).activations
    expected = grids().activations
    for name, q in expected.items():
        assert found[name].scale == q.scale and found[name].zero_point == q.zero_point


def test_a_tensor_that_is_not_finite_is_named():
    graph = toy_graph()
    bias = np.full(8, 3e38, np.float32)
    nodes = [n.with_weights(bias=bias) if n.name in ("c1", "dw") else n for n in graph]
    nodes = [n.with_(attrs={k: v for k, v in n.attrs.items() if k != "clip"}) for n in nodes]
    with pytest.raises(CalibrationError, match="add|cat|dw"):
        quantize_graph(make_plan(graph.rebuild(nodes), config(activations=MIN_MAX)), calibration(toy_data(4)), False)


def test_power_of_two_scales_stay_so():
    q = grids(activations={"bits": 8, "symmetric": True, "method": "mse", "power_of_two": True})
    scales = np.array([g.scale for g in q.activations.values()])
    np.testing.assert_array_equal(np.log2(scales), np.rint(np.log2(scales)))


def _model(function, *shapes):
    inputs = [keras.Input(s) for s in shapes]
    return keras.Model(inputs, function(*inputs))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: keras.layers.LayerNormalization()(x[:, :, :1]) + y,  # of one channel: zero less zero, and epsilon
        lambda x, y: (x - x) + 1e-4 * y,
        lambda x, y: x + 0.0 * y,
        lambda x, y: (x + 1e-5 * y) - x,  # finer than what either tells
    ],
)
@pytest.mark.parametrize("preset", ["w8a8", pytest.param("w8a16", marks=pytest.mark.slow)])
def test_sums_have_steps_that_kernels_take(function, preset):
    """A zero has the scale of what is around it; LiteRT aborts where a sum is 2^14 times finer than an operand."""
    data = [np.random.default_rng(k).normal(size=(32, 3, 3)).astype(np.float32) for k in range(2)]
    qmodel = quantize_model(_model(function, (3, 3), (3, 3)), data, preset, progress=False)
    qgraph = extract(qmodel)
    for node in qgraph.graph:
        if node.op in ("add", "sub"):
            scales = [float(qgraph.activations[i].scale) for i in node.inputs]
            assert max(scales) <= 128.001 * float(qgraph.activations[node.name].scale), node
    assert verify_tflite(qmodel, export_tflite(qmodel).content, data).ok


def test_a_zero_beside_a_tensor_costs_it_nothing():
    """w8a16: the sum keeps the 16 bits of x, though its other operand has no range."""
    data = [np.random.default_rng(0).normal(size=(32, 3, 3)).astype(np.float32), np.zeros((32, 3, 3), np.float32)]
    model = _model(lambda x, y: x + keras.layers.ReLU()(y), (3, 3), (3, 3))
    qmodel = quantize_model(model, data, "w8a16", progress=False)
    found = TFLiteModel(export_tflite(qmodel).content).predict(data)[0]
    np.testing.assert_allclose(found, data[0], rtol=0, atol=1.1 * np.abs(data[0]).max() / 32767)


@pytest.mark.parametrize("function", ["tanh", "sigmoid"])
@pytest.mark.parametrize("reach", [8.0, 8.005, 16.0])
def test_curves_of_16_bits_read_scales_on_which_all_kernels_agree(function, reach):
    """LiteRT's builds compute them differently within a thousandth of 2^-12."""
    x = keras.Input((40,))
    model = keras.Model(x, keras.layers.Activation(function)(keras.layers.Dense(30, name="dense")(x)))
    rule = {"name": "dense", "activations": {"range": (-reach, reach)}}
    data = 4 * np.random.default_rng(0).normal(size=(64, 40)).astype(np.float32)
    qmodel = quantize_model(model, data, {"preset": "w8a16", "rules": [rule]}, progress=False)
    (scale,) = (float(q.scale) for n, q in extract(qmodel).activations.items() if n == "dense" and q is not None)
    assert abs(np.log2(scale) - round(np.log2(scale))) >= 1e-3
    assert scale == pytest.approx(reach / 32767, rel=2e-3)
    report = verify_tflite(qmodel, export_tflite(qmodel).content, data)
    assert report.ok, report
    assert max(row.max_lsb for row in report.end_to_end) <= 1
