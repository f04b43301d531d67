"""Which kernel computes a layer, what it costs, and that it computes the same."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kquant
from kquant.graph.ir import Node
from kquant.keras.model import extract
from kquant.targets.choice import FREE, choices, chosen, fastest, slow_layers, smallest
from kquant.targets.ethos_u.target import ETHOS_U
from kquant.targets.litert.flatbuffer import read_tensors
from kquant.targets.litert.target import LITERT
from kquant.targets.tflm.target import TFLM


def conv(h: int = 1, w: int = 1, depth: int = 8, groups: int = 1) -> Node:
    attrs = {"strides": (1, 1), "padding": "same", "dilation": (1, 1), "groups": groups}
    return Node(name="c", op="conv2d", attrs=attrs, weights={"kernel": np.zeros((h, w, depth, 4), np.float32)})


def network(strides: int = 1) -> tuple[keras.Model, np.ndarray]:
    """Pointwise, depthwise and 3x3 convolutions, as in a MobileNet."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((9, 9, 8))
    y = keras.layers.Conv2D(16, 1, activation="relu6", name="pointwise")(x)
    y = keras.layers.DepthwiseConv2D(3, padding="same", activation="relu", name="depthwise")(y)
    y = keras.layers.Conv2D(12, 1, strides=strides, padding="same", name="strided")(y)
    y = keras.layers.Conv2D(16, 3, name="conv")(y)
    y = keras.layers.Dense(5, name="head")(keras.layers.Flatten()(y))
    return keras.Model(inputs, y), np.random.default_rng(0).normal(size=(16, 9, 9, 8)).astype(np.float32)


def quantized(config: dict[str, Any], strides: int = 1) -> tuple[kquant.QuantizedModel, np.ndarray]:
    model, data = network(strides)
    return kquant.quantize_model(model, data, config, progress=False), data


def test_what_each_preference_takes() -> None:
    found = choices(LITERT, conv(), 2, 8)
    assert (smallest(found).kernel, smallest(found).container) == ("fully_connected", 2)
    assert (fastest(found).container, fastest(found).slowdown <= FREE) == (4, True)
    found = choices(LITERT, conv(3, 3), 4, 8)
    assert (smallest(found).kernel, smallest(found).container) == ("", 4)
    assert (fastest(found).kernel, fastest(found).container) == ("int8", 8)


@pytest.mark.parametrize("node", [conv(3, 1), conv(groups=2), conv(depth=6)], ids=["taps", "groups", "odd depth"])
def test_what_is_no_dense_layer_in_whole_bytes_is_written_as_a_convolution(node: Node) -> None:
    assert {c.kernel for c in choices(LITERT, node, 4, 8)} == {"", "int8"}


def test_other_containers_and_targets_have_no_choice() -> None:
    assert {c.kernel for c in choices(LITERT, conv(), 4, 16)} <= {"", "int8"}
    assert all(c.slowdown == 1 for c in choices(LITERT, conv(), 4, 16))
    for target in (TFLM, ETHOS_U):
        (only,) = choices(target, conv(), 4, 8)
        assert only.kernel == "" and only.slowdown == 1
        assert chosen(target, conv().with_attrs(kernel="fully_connected"), 4, 8) == only


@given(bits=st.integers(2, 8), taps=st.sampled_from([1, 3]), depth=st.sampled_from([3, 4, 6, 8]))
def test_preferences_are_ordered(bits: int, taps: int, depth: int) -> None:
    found = choices(LITERT, conv(taps, taps, depth), bits, 8)
    small, fast = smallest(found), fastest(found)
    assert small.container == min(c.container for c in found)
    assert fast.slowdown <= FREE * min(c.slowdown for c in found)
    assert small.container <= fast.container and all(c.container >= bits for c in found)


@pytest.mark.parametrize("prefer", ["bytes", "latency"])
@pytest.mark.parametrize(
    ("bits", "strides"), [(4, 2), *(pytest.param(b, s, marks=pytest.mark.slow) for b, s in ((2, 1), (3, 2), (4, 1)))]
)
def test_every_kernel_equals_its_simulation(bits: int, strides: int, prefer: str) -> None:
    qmodel, data = quantized(
        {"preset": f"w{bits}a8", "prefer": prefer, "rules": [{"name": "head", "weights": {"bits": 8}}]}, strides
    )
    file = kquant.export_tflite(qmodel)
    report = kquant.verify_tflite(qmodel, file.content, data)
    assert report.ok and report.reference_max_lsb == 0 and report.end_to_end[0].equal == 1
    assert file.op_counts["FULLY_CONNECTED"] == 3
    assert ("latency" in " ".join(file.notes)) == (prefer == "bytes")
    types = {name: t.type for name, t in read_tensors(file.content).items() if name.endswith("kernel")}
    few = {2: "INT2", 3: "INT4", 4: "INT4"}[bits]
    wanted = {"bytes": (few, "INT4", "INT4"), "latency": ("INT4", "INT8", "INT8")}[prefer]
    assert tuple(types[f"{n}/kernel"] for n in ("pointwise", "depthwise", "conv")) == wanted


def test_a_pointwise_layer_of_4_bits_equals_the_convolution_of_the_same_integers() -> None:
    """Bit for bit: XNNPACK rounds both alike."""
    model, data = network()
    config = {"preset": "w4a8", "prefer": "bytes"}
    packed = kquant.quantize_model(model, data, config, progress=False)
    layers = packed.quantized_layers
    as_int8 = kquant.quantize_model(model, data, {**config, "prefer": "latency"}, progress=False)
    for name in ("pointwise", "strided"):
        np.testing.assert_array_equal(layers[name].integers, as_int8.quantized_layers[name].integers)
    assert layers["pointwise"].node.attrs["kernel"] == "fully_connected"
    plain = packed.quantized_layers["pointwise"]
    x = kquant.TFLiteModel(kquant.export_tflite(packed).content).predict(data)[0]
    plain.node = plain.node.with_attrs(kernel="int8")
    file = kquant.export_tflite(packed)
    assert read_tensors(file.content)["pointwise/kernel"].type == "INT8" and file.op_counts["CONV_2D"] == 2
    np.testing.assert_array_equal(x, kquant.TFLiteModel(file.content).predict(data)[0])


@pytest.mark.slow
def test_by_default_little_is_spent_for_speed() -> None:
    sizes = {}
    for prefer in ("bytes", None, "latency"):
        qmodel, _ = quantized({"preset": "w4a8", "prefer": prefer})
        qgraph = extract(qmodel)
        sizes[prefer] = kquant.export_tflite(qmodel).bytes, len(list(slow_layers(qgraph, qmodel.target)))
    assert sizes["bytes"][0] <= sizes[None][0] <= sizes["latency"][0]
    assert sizes["bytes"][1] >= sizes[None][1] >= sizes["latency"][1] == 0


def test_the_choice_survives_saving(tmp_path: Any) -> None:
    qmodel, data = quantized({"preset": "w4a8"})
    qmodel.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert kquant.export_tflite(loaded).content == kquant.export_tflite(qmodel).content
    np.testing.assert_array_equal(loaded(data), qmodel(data))


def test_files_with_float_activations_have_no_variants() -> None:
    qmodel, _ = quantized({"preset": "w4a8", "prefer": "bytes"}, strides=2)
    for mode in ("float32", "dynamic_range", "weight_only"):
        assert kquant.export_tflite(qmodel, mode=mode).op_counts["FULLY_CONNECTED"] == 1


def test_an_unknown_preference_is_refused() -> None:
    with pytest.raises(kquant.ConfigError, match="bytes"):
        kquant.QuantConfig(prefer="speed")
