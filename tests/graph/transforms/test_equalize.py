"""Equalization keeps the function, equalizes ranges, and resolves dead channels exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kquant
from kquant.config.quant_config import QuantConfig
from kquant.graph.ir import Graph
from kquant.graph.ops import evaluate
from kquant.graph.transforms import prepare_graph
from kquant.graph.transforms.dead_channels import DeadChannels
from kquant.graph.transforms.equalize import SPREAD, EqualizeReport, equalize
from kquant.graph.transforms.magnitudes import input_ranges, magnitudes, output_ranges
from kquant.grids.grid import Grid
from kquant.keras.model import QuantizedModel, insert
from kquant.quantize.calibrate import quantize_graph
from kquant.quantize.data import CalibrationData
from kquant.quantize.pipeline import record_of
from kquant.quantize.plan import make_plan
from kquant.targets.litert.clamps import Clamp, float_clamp, integer_clamp
from tests.support.random_models import random_data, random_model
from tests.support.tracing import assert_equal, build

L = keras.layers
IMAGE = (8, 8, 4)


def chain(*layers: Any) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        for layer in layers:
            x = layer(x)
        return x

    return function


def uneven(model: keras.Model, seed: int = 0) -> keras.Model:
    """The model with output channels of very different sizes."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if layer.weights and not isinstance(layer, L.PReLU):
            w = layer.weights[0]
            w.assign(w * np.exp(rng.normal(0, 1.5, w.shape[-1:])).astype("float32"))
    return model


def equalized(model: keras.Model, tolerance: float = 1e-5, **options: Any) -> tuple[Graph, EqualizeReport]:
    """The model's graph, equalized as in the paper: weights alone. Its function is checked."""
    graph, report = equalize(prepare_graph(model), **{"activations": 0.0} | options)
    assert_equal(graph, model, tolerance)
    return graph, report


def ranges(graph: Graph, report: EqualizeReport) -> list[tuple[np.ndarray, np.ndarray]]:
    """r1 and r2 of every region."""
    found = []
    for region in report.regions:
        r1, r2 = np.zeros(region.channels), np.zeros(region.channels)
        for name, index in region.sources.items():
            np.maximum.at(r1, index, output_ranges(magnitudes(graph[name])))
        for name, index in region.sinks.items():
            np.maximum.at(r2, index, input_ranges(magnitudes(graph[name])))
        found.append((r1, r2))
    return found


FIRST = [
    lambda: L.Conv2D(6, 3),
    lambda: L.Conv2D(6, 3, groups=2, strides=2, padding="same"),
    lambda: L.DepthwiseConv2D(3, depth_multiplier=2),
    lambda: L.Conv2DTranspose(5, 3, strides=2),
    lambda: L.Dense(6),
]
BETWEEN = [
    lambda: [L.ReLU()],
    lambda: [L.ReLU(6.0)],
    lambda: [],
    lambda: [L.LeakyReLU(0.1)],
    lambda: [L.PReLU()],
    lambda: [L.PReLU(shared_axes=[1, 2])],
    lambda: [L.ReLU(6.0), L.MaxPooling2D(2)],
    lambda: [L.MaxPooling2D(2, padding="same"), L.ReLU(6.0)],
    lambda: [L.AveragePooling2D(2, padding="same"), L.LeakyReLU(0.3)],
    lambda: [L.ReLU(), L.ZeroPadding2D(1)],
    lambda: [L.ReLU(), L.Cropping2D(1)],
    lambda: [L.ReLU(6.0), L.UpSampling2D(2, interpolation="bilinear")],
    lambda: [L.ReLU(), L.Permute((2, 1, 3))],
]
SECOND = [
    lambda: [L.DepthwiseConv2D(3, padding="same", depth_multiplier=2), L.ReLU(6.0), L.Conv2D(3, 1)],
    lambda: [L.Conv2D(4, 3, groups=1, padding="same", strides=2)],
    lambda: [L.Conv2DTranspose(3, 2)],
    lambda: [L.Flatten(), L.Dense(3)],
    lambda: [L.GlobalAveragePooling2D(), L.Dense(3)],
    lambda: [L.GlobalMaxPooling2D(), L.Dense(3)],
]


def assert_equal_ranges(graph: Graph, report: EqualizeReport) -> None:
    assert report.converged and report.regions
    for r1, r2 in ranges(graph, report):
        np.testing.assert_allclose(r1, r2, rtol=5e-3)


@pytest.mark.parametrize("k", range(len(BETWEEN)))
def test_function_is_kept_and_ranges_become_equal(k: int) -> None:
    first, between, second = FIRST[k % len(FIRST)], BETWEEN[k], SECOND[k % len(SECOND)]
    model = uneven(build(chain(first(), *between(), *second()), IMAGE))
    graph, report = equalized(model)
    assert_equal_ranges(graph, report)
    _, report = equalized(model, activations=1.0)
    assert report.converged and report.regions


@pytest.mark.parametrize("start", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (10, 20, 30))])
def test_random_graphs_keep_their_function(start: int) -> None:
    regions = 0
    for seed in range(start, start + 10):
        model = uneven(random_model(seed), seed)
        graph = prepare_graph(model)
        x = random_data(seed, model, samples=4)
        want = evaluate(graph, x)
        for options in ({}, {"activations": 0.0, "across_joins": True}):
            scaled, report = equalize(graph, **options)
            regions += len(report.regions)
            for a, b in zip(want, evaluate(scaled, x), strict=True):
                atol = 2e-5 * max(np.abs(a).max(), 1e-3)
                np.testing.assert_allclose(b, a, rtol=0, atol=atol, err_msg=f"seed {seed}, {options}")
    assert regions > 10


@pytest.mark.parametrize("second", SECOND)
def test_every_kind_of_reader(second: Any) -> None:
    graph, report = equalized(uneven(build(chain(L.Conv2D(6, 3), L.ReLU(6.0), *second()), IMAGE)))
    assert_equal_ranges(graph, report)


def test_scale_is_the_papers() -> None:
    model = uneven(build(chain(L.Dense(5, name="a"), L.ReLU(6.0), L.Dense(3, name="b")), (4,)))
    r1 = np.abs(model.get_layer("a").kernel.numpy()).max(0)
    r2 = np.abs(model.get_layer("b").kernel.numpy()).max(1)
    graph, report = equalized(model)
    scale = np.sqrt(r1 * r2) / r2
    np.testing.assert_allclose(report.scales["a"], scale, rtol=1e-6)
    np.testing.assert_allclose(graph["a"].weights["bias"], model.get_layer("a").bias / scale, rtol=1e-6)
    lo, caps = graph["a"].attrs["clip"]
    assert lo == 0
    np.testing.assert_allclose(caps, 6 / scale, rtol=1e-6)


@pytest.mark.parametrize("cap", [None, 6.0])
def test_activations_count_as_one_more_row_of_weights(cap: float | None) -> None:
    """At rest max(r1, m reach) = r2, where m makes the geometric means of r1 and the reach equal."""
    layers = [L.Dense(8, name="a"), L.BatchNormalization(), L.ReLU(cap), L.Dense(3, name="b")]
    graph, report = equalized(uneven(build(chain(*layers), (4,))), activations=1.0, tolerance=1e-5)
    ((r1, r2),) = ranges(graph, report)
    reach = np.abs(graph["a"].stats["mean"]) + SPREAD * graph["a"].stats["std"]
    if cap is not None:
        reach = np.minimum(reach, graph["a"].attrs["clip"][1])
    m = np.exp(np.log(r1).mean() - np.log(reach).mean())
    assert report.converged and (m * reach > 1.1 * r1).any()
    np.testing.assert_allclose(np.maximum(r1, m * reach), r2, rtol=5e-3)


def test_without_batch_normalization_weights_count_alone() -> None:
    model = uneven(build(chain(L.Dense(8, name="a"), L.ReLU(), L.Dense(3, name="b")), (4,)))
    scales = [equalized(model, activations=factor)[1].scales["a"] for factor in (1.0, 0.0)]
    np.testing.assert_array_equal(*scales)


def test_no_activation_stands_out_as_with_weights_alone() -> None:
    layers = [L.Conv2D(16, 3, name="a"), L.BatchNormalization(), L.ReLU(), L.Conv2D(8, 1), L.ReLU()]
    model = uneven(build(chain(*layers), IMAGE))
    largest = {}
    for activations in (1.0, 0.0):
        stats = equalized(model, activations=activations)[0]["a"].stats
        reach = np.abs(stats["mean"]) + SPREAD * stats["std"]
        largest[activations] = np.max(reach) / np.exp(np.mean(np.log(reach)))
    assert largest[1.0] < 0.85 * largest[0.0]


def test_statistics_are_scaled_along() -> None:
    model = build(chain(L.Conv2D(6, 3, name="c"), L.BatchNormalization(name="bn"), L.ReLU(), L.Conv2D(3, 1)), IMAGE)
    graph, report = equalized(model)
    layer, scale = model.get_layer("bn"), report.scales["c"]
    np.testing.assert_allclose(graph["c"].stats["mean"], layer.beta / scale, rtol=1e-5)
    np.testing.assert_allclose(graph["c"].stats["std"], np.abs(layer.gamma) / scale, rtol=1e-5)


def test_again_changes_nothing() -> None:
    layers = [L.Conv2D(6, 3), L.ReLU(6.0), L.DepthwiseConv2D(3), L.ReLU(6.0), L.Conv2D(5, 1), L.ReLU(), L.Conv2D(2, 1)]
    model = uneven(build(chain(*layers), IMAGE))
    kill(model.layers[1], [0, 3], [-1.0, 2.0])
    graph, _ = equalized(model)
    _, report = equalize(graph, activations=0.0)
    assert report.dead == DeadChannels(kept=report.dead.kept)
    for scale in report.scales.values():
        np.testing.assert_allclose(scale, 1, atol=5e-3)


def test_again_changes_nothing_with_activations_either() -> None:
    """Where batch normalization tells their reach, which follows every scale exactly."""
    norm = L.BatchNormalization
    layers = [L.Conv2D(6, 3), norm(), L.ReLU(6.0), L.DepthwiseConv2D(3), norm(), L.ReLU(), L.Conv2D(5, 1), L.ReLU()]
    graph, _ = equalized(uneven(build(chain(*layers), IMAGE)), activations=1.0)
    for scale in equalize(graph)[1].scales.values():
        np.testing.assert_allclose(scale, 1, atol=5e-3)


def test_input_graph_is_not_modified() -> None:
    graph = prepare_graph(uneven(build(chain(L.Conv2D(6, 3), L.ReLU(6.0), L.Conv2D(3, 1)), IMAGE)))
    before = {n.name: {k: w.copy() for k, w in n.weights.items()} for n in graph}
    equalize(graph)
    for name, weights in before.items():
        for key, w in weights.items():
            np.testing.assert_array_equal(graph[name].weights[key], w)


def residual(x: Any) -> Any:
    y = L.ReLU(6.0)(L.Conv2D(4, 3, padding="same", name="a")(x))
    z = L.Conv2D(4, 3, padding="same", name="c")(L.ReLU(6.0)(L.Conv2D(5, 1, name="b")(y)))
    return L.Conv2D(3, 1, name="d")(L.ReLU(6.0)(L.Add()([y, z])))


def test_stops_at_residual_joins() -> None:
    _, report = equalized(uneven(build(residual, IMAGE)))
    assert [r.name for r in report.regions] == ["b"]
    assert {"a", "c", "d"} == set(report.stops)
    assert "output" in report.stops["d"] and "add" in report.stops["a"]


def test_across_residual_joins_all_branches_take_one_scale() -> None:
    graph, report = equalized(uneven(build(residual, IMAGE)), across_joins=True)
    joined = report.regions[0]
    assert list(joined.sources) == ["a", "c"] and list(joined.sinks) == ["b", "d"]
    assert_equal_ranges(graph, report)


@pytest.mark.parametrize(
    "end",
    [
        lambda x: L.Conv2D(3, 1)(L.Activation("tanh")(x)),
        lambda x: L.Conv2D(3, 1)(L.Activation("swish")(x)),
        lambda x: (x, L.Conv2D(3, 1)(x)),
        lambda x: L.Conv2D(3, 1)(L.Concatenate()([x, x])),
        lambda x: L.Conv2D(3, 1)(keras.ops.pad(x, [[0, 0], [0, 0], [0, 0], [1, 1]])),
        lambda x: L.Conv2D(3, 1)(keras.ops.pad(x, [[0, 0], [1, 1], [0, 0], [0, 0]], constant_values=1.0)),
        lambda x: L.Conv2D(3, 1)(keras.ops.clip(x, -1.0, 1.0)),
        lambda x: L.Conv2D(3, 1)(keras.ops.mean(x, axis=-1, keepdims=True)),
        lambda x: L.Conv2D(3, 1)(L.Permute((3, 1, 2))(x)),
    ],
)
def test_stops_where_channels_mix_or_scales_do_not_pass(end: Any) -> None:
    _, report = equalized(uneven(build(lambda x: end(L.Conv2D(4, 3, name="a")(x)), IMAGE)))
    assert "a" in report.stops and not report.regions


def test_all_readers_of_a_shared_tensor_are_scaled() -> None:
    def function(x: Any) -> Any:
        y = L.ReLU(6.0)(L.Conv2D(4, 3, name="a")(x))
        return L.Conv2D(3, 1)(y), L.Dense(2)(L.GlobalAveragePooling2D()(y))

    graph, report = equalized(uneven(build(function, IMAGE)))
    assert len(report.regions) == 1 and len(report.regions[0].sinks) == 2
    assert_equal_ranges(graph, report)


def kill(layer: Any, channels: list[int], bias: list[float]) -> None:
    """Make output channels constant."""
    kernel, b = (w.numpy() for w in layer.weights)
    kernel[..., channels] = 0
    b[channels] = bias
    layer.set_weights([kernel, b])


def dead_model(padding: str, *between: Any) -> keras.Model:
    """conv - depthwise - conv whose first layer has a zero (0), a constant (1) and a capped constant (2)."""
    depthwise = L.DepthwiseConv2D(3, padding=padding, name="dw")
    model = build(
        chain(L.Conv2D(6, 3, name="c"), L.ReLU(6.0), *between, depthwise, L.ReLU(), L.Conv2D(3, 1, name="e")), IMAGE
    )
    kill(model.get_layer("c"), [0, 1, 2], [-0.5, 1.5, 9.0])
    kernel, bias = depthwise.get_weights()
    kernel[:, :, :3] *= 50
    bias[:] = np.abs(bias)
    depthwise.set_weights([kernel, bias])
    return model


def test_dead_channels_without_padding_are_gone() -> None:
    graph, report = equalized(dead_model("valid"), tolerance=2e-5)
    # six input channels: the depthwise channels that read constants are constant in turn
    assert report.dead.zero >= 1 and report.dead.zero + report.dead.absorbed == 6 and report.dead.kept == 0
    for name, channels in (("c", 3), ("dw", 3)):
        assert not output_ranges(magnitudes(graph[name]))[:channels].any()
        assert not graph[name].weights["bias"][:channels].any()
    assert not input_ranges(magnitudes(graph["e"]))[:3].any()


@pytest.mark.parametrize("between", [[], [L.ZeroPadding2D(1)]])
def test_constants_read_through_padding_are_kept_and_their_readers_shrink(between: Any) -> None:
    model = dead_model("valid" if between else "same", *between)
    graph, report = equalized(model, tolerance=2e-5)
    assert (report.dead.zero, report.dead.absorbed, report.dead.kept) == (1, 1, 2)
    weights = input_ranges(magnitudes(graph["dw"]))
    before = input_ranges(magnitudes(prepare_graph(model)["dw"]))
    assert weights[0] == 0 and np.all(weights[1:3] < before[1:3])
    unchanged, _ = equalized(model, tolerance=2e-5, dead_channels=False)
    assert input_ranges(magnitudes(unchanged["dw"]))[0] > 10


def test_channels_that_nobody_reads_are_zero_back_to_the_first_layer() -> None:
    model = build(chain(L.Conv2D(6, 3, name="c"), L.ReLU(), L.DepthwiseConv2D(3, name="dw"), L.Conv2D(3, 1)), IMAGE)
    kernel, bias = model.layers[-1].get_weights()
    kernel[:, :, 2] = 0
    model.layers[-1].set_weights([kernel, bias])
    graph, report = equalized(model)
    assert report.dead == DeadChannels(unread=2, zero=0)
    for name in ("c", "dw"):
        assert output_ranges(magnitudes(graph[name]))[2] == 0 and graph[name].weights["bias"][2] == 0


def test_weights_negligible_beside_their_bias_count_as_dead() -> None:
    model = build(chain(L.Conv2D(6, 3, name="c"), L.BatchNormalization(name="bn"), L.ReLU(), L.Conv2D(3, 1)), IMAGE)
    kernel, bias = model.get_layer("c").get_weights()
    kernel[..., 1] *= 1e-13
    bias[1] = 0
    model.get_layer("c").set_weights([kernel, bias])
    norm = model.get_layer("bn")
    norm.beta.assign(np.full(6, 0.5))
    norm.moving_mean.assign(np.zeros(6))
    graph, report = equalized(model)
    assert report.dead == DeadChannels(flushed=1, absorbed=1, unread=1)
    assert graph["c"].stats["std"][1] == 0


def test_tiny_and_huge_weights_stay_finite() -> None:
    model = build(chain(L.Dense(4, name="a"), L.ReLU(), L.Dense(3, name="b")), (4,))
    kernel = model.get_layer("a").kernel
    kernel.assign(kernel * np.array([1e-18, 1e18, 1.0, 1e-3], np.float32))
    graph, report = equalized(model)
    assert all(np.isfinite(w).all() for n in graph for w in n.weights.values())
    assert report.converged


Q8 = Grid(np.float32(0.1), np.int32(-128), -128, 127)
FUSED = ("NONE", "RELU", "RELU6")


@pytest.mark.parametrize(
    ("caps", "clamp"),
    [
        ([1.0, 3.0], Clamp("RELU", None, (-118, -98))),
        ([1.0, 300.0], Clamp("RELU", None, (-118, 127))),
        ([25.5, 300.0], Clamp("RELU")),  # the grid ends at 25.5
        ([6.0, 6.0], Clamp("RELU6")),
        ([6.01, 5.99], Clamp("RELU6")),  # the same integer
        ([3.0, 3.0], Clamp("RELU", None, -98)),
    ],
)
def test_cheapest_clamp_for_caps(caps: list[float], clamp: Clamp) -> None:
    assert integer_clamp(Q8, (0.0, caps), FUSED) == clamp
    assert float_clamp((0.0, caps), FUSED) == Clamp("RELU", None, tuple(caps))


@settings(max_examples=100, deadline=None)
@given(
    caps=st.lists(st.floats(0.01, 40.0), min_size=1, max_size=5),
    offset=st.integers(0, 15),
    low=st.sampled_from([0.0, None]),
    bits=st.sampled_from([4, 8]),
)
def test_caps_bound_every_channel_as_its_own_cap_would(
    caps: list[float], offset: int, low: float | None, bits: int
) -> None:
    zero = -128 + offset
    q = Grid(np.float32(0.1), np.int32(zero), -128, -128 + 2**bits - 1)
    clamp = integer_clamp(q, (low, caps), FUSED)
    x = np.arange(-400, 400)[:, None]
    y = np.clip(x, -128, 127)
    y = y if clamp.fused == "NONE" else np.maximum(y, zero)
    y = np.minimum(y, min(zero + 60, 127)) if clamp.fused == "RELU6" else y
    y = y if clamp.lower is None else np.maximum(y, clamp.lower)
    y = y if clamp.upper is None else np.minimum(y, clamp.upper)
    floor = -128 if low is None else zero
    top = np.minimum(zero + np.rint(np.float32(caps) / np.float32(0.1)), q.qmax)
    np.testing.assert_array_equal(np.broadcast_to(y, (len(x), len(caps))), np.clip(x, floor, np.maximum(top, floor)))


def quantized(model: keras.Model, x: np.ndarray, config: Any) -> QuantizedModel:
    """The equalized model, quantized."""
    graph, _ = equalize(prepare_graph(model))
    config = QuantConfig.load(config)
    plan = make_plan(graph, config)
    data = CalibrationData(x, [(graph.input_names[0], graph[graph.inputs[0]].shape, "float32")], batch_size=32)
    return insert(quantize_graph(plan, data, progress=False), record_of(plan, config, 0, []))


@pytest.mark.parametrize(
    "config", ["w8a8-per_tensor", *(pytest.param(c, marks=pytest.mark.slow) for c in ("w4a4", "w8a16"))]
)
def test_caps_per_channel_run_on_the_target_as_simulated(config: str, tmp_path: Any) -> None:
    layers = [
        *(L.Conv2D(6, 3), L.ReLU(6.0), L.DepthwiseConv2D(3, padding="same"), L.ReLU(6.0), L.Conv2D(5, 1)),
        *(L.MaxPooling2D(2), L.ReLU(6.0), L.Conv2D(8, 1), L.LeakyReLU(0.2), L.Flatten(), L.Dense(3)),
    ]
    model = uneven(build(chain(*layers), IMAGE))
    x = np.random.default_rng(3).normal(0, 2, (48, *IMAGE)).astype(np.float32)
    qmodel = quantized(model, x, config)
    qmodel.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    report = kquant.export_tflite(loaded, allow_float=False)
    assert report.op_counts["MINIMUM"] >= 3
    parity = kquant.verify_tflite(loaded, report.content, x, samples=16, tensor_samples=8)
    assert parity.ok, f"{parity}"
    if config != "w8a16":
        assert parity.end_to_end[0].equal == 1.0, f"{parity}"


def test_caps_above_the_grid_cost_no_operator() -> None:
    model = uneven(build(chain(L.Conv2D(6, 3), L.ReLU(6.0), L.Conv2D(5, 1)), IMAGE))
    x = np.random.default_rng(3).normal(0, 0.02, (48, *IMAGE)).astype(np.float32)  # far from the caps
    model.layers[1].bias.assign(np.full(6, 0.1))
    counts = kquant.export_tflite(quantized(model, x, "w8a8-per_tensor")).op_counts
    assert counts["CONV_2D"] == 2 and "MINIMUM" not in counts


@pytest.mark.slow
def test_w8_per_tensor_loses_less() -> None:
    layers = [
        L.Conv2D(8, 3),
        L.ReLU(6.0),
        L.DepthwiseConv2D(3),
        L.ReLU(6.0),
        L.Conv2D(8, 1),
        L.ReLU(6.0),
        L.Conv2D(4, 1),
    ]
    model = uneven(build(chain(*layers), IMAGE), seed=1)
    x = np.random.default_rng(3).normal(0, 2, (64, *IMAGE)).astype(np.float32)
    config = {"preset": "w8a8-per_tensor", "weights": {"method": "min_max"}}
    want = model.predict(x, verbose=0)
    off = {"equalize": False, "correct_bias": False}
    plain = kquant.quantize_model(model, x, {**config, **off}, progress=False).predict(x, verbose=0)
    better = quantized(model, x, config).predict(x, verbose=0)
    assert np.mean((better - want) ** 2) < 0.3 * np.mean((plain - want) ** 2)
