"""Models quantized for TensorFlow Lite Micro: what is simulated is what it runs, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import keras
import numpy as np
import pytest

import kquant
from experiments import zoo
from experiments.targets import compare_on_micro
from kquant.targets.litert.flatbuffer import read_tensors
from kquant.targets.target import get_target, register_target
from kquant.targets.tflm.target import MICRO, TFLM
from tests.support.random_models import random_data, random_model

pytest.importorskip("tflite_micro", reason="tflite-micro is not installed: pip install .[tflm]")
PRESETS = ("w8a8", "w8a8-per_tensor", "w4a8", "w8a16", "w4a4")


def small() -> tuple[keras.Model, np.ndarray]:
    """A convolution that a RELU6 of its own follows, a depthwise one, and a dense layer."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 3))
    y = keras.layers.Conv2D(8, 3, padding="same", name="conv")(x)
    y = keras.layers.Add()([y, keras.layers.Conv2D(8, 1, name="skip")(x)])
    y = keras.layers.ReLU(6.0)(y)
    y = keras.layers.DepthwiseConv2D(3, strides=2, activation="relu", name="depthwise")(y)
    y = keras.layers.Dense(5, name="dense")(keras.layers.GlobalAveragePooling2D()(y))
    return keras.Model(inputs, y), np.random.default_rng(0).normal(0, 2, (40, 8, 8, 3)).astype(np.float32)


def quantized(preset: str, target: str = "tflm") -> tuple[kquant.QuantizedModel, np.ndarray]:
    model, data = small()
    return kquant.quantize_model(model, data, {"preset": preset, "target": target}, progress=False), data


def test_the_target_goes_by_its_name() -> None:
    assert get_target("tflm") is TFLM and kquant.QuantConfig.load({"preset": "w8a8", "target": "tflm"}).target == "tflm"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_simulation_is_the_interpreter_at_every_tensor(preset: str) -> None:
    model, data = quantized(preset)
    report = kquant.verify_tflite(model, kquant.export_tflite(model).content, data)
    assert report.ok, report
    assert report.kernels == "tflite-micro" and report.runtime == "TensorFlow Lite Micro"
    assert report.reference_max_lsb == report.op_by_op_max_lsb == 0
    (end,) = report.end_to_end
    assert end.equal == end.reference_equal == 1.0 and end.samples == 20
    (footprint,) = report.footprints
    assert footprint.memory > 0 and footprint.flash == report.bytes and footprint.cycles is None
    assert "tflite-micro: " in str(report)


@pytest.mark.slow
def test_int4_only_where_the_kernels_take_it() -> None:
    types = {t: read_tensors(kquant.export_tflite(quantized("w4a8", t)[0]).content) for t in ("litert", "tflm")}
    found = {t: [v[f"{n}/kernel"].type for n in ("conv", "depthwise", "dense")] for t, v in types.items()}
    assert found == {"litert": ["INT4", "INT4", "INT4"], "tflm": ["INT4", "INT4", "INT8"]}
    for name, tensor in types["litert"].items():
        if tensor.data is not None and tensor.scale.size:
            np.testing.assert_array_equal(tensor.data, types["tflm"][name].data, err_msg=name)
    wide = read_tensors(kquant.export_tflite(quantized("w4a16")[0]).content)
    assert {wide[f"{n}/kernel"].type for n in ("conv", "depthwise", "dense")} == {"INT8"}


def test_a_file_that_the_interpreter_refuses_is_an_error() -> None:
    model, data = quantized("w4a8")
    other = kquant.export_tflite(quantized("w4a8", "litert")[0]).content
    with pytest.raises(kquant.ExportError, match=r"FULLY_CONNECTED \(making 'dense'\)"):
        kquant.verify_tflite(model, other, data)


def test_operations_that_it_lacks_are_named() -> None:
    x = keras.Input((4, 4, 3))
    model = keras.Model(x, keras.layers.Conv2D(4, 3, activation="gelu", name="curved")(x))
    data = np.zeros((2, 4, 4, 3), np.float32)
    with pytest.raises(kquant.ExportError, match="curved.*tflm has no operator for 'gelu'.*another target"):
        kquant.export_tflite(kquant.quantize_model(model, data, {"preset": "w8a8", "target": "tflm"}, progress=False))
    y = keras.ops.power(keras.ops.abs(keras.layers.Conv2D(2, 1)(x)), 1.5)
    model = keras.Model(x, y)  # integers are tables; float asks for an operator
    kquant.export_tflite(kquant.quantize_model(model, data, {"preset": "w8a8", "target": "tflm"}, progress=False))
    with pytest.raises(kquant.ExportError, match="operator POW, which tflm does not have"):
        kquant.export_tflite(kquant.quantize_model(model, data, {"preset": "w8a16", "target": "tflm"}, progress=False))


def test_without_the_package_litert_stands_in() -> None:
    missing = register_target(replace(TFLM, name="absent", runtime=replace(MICRO, module="not_installed_here")))
    model, data = quantized("w8a8", missing.name)
    report = kquant.verify_tflite(model, kquant.export_tflite(model).content, data, samples=20)
    assert report.runtime == "LiteRT" and report.kernels == "reference" and not report.footprints
    assert report.ok and "kquant[tflm]" in report.notes[0] and report.notes[0] in str(report)


@pytest.mark.slow
@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("start", range(0, 30, 10))
def test_random_models(start: int) -> None:
    for seed in range(start, start + 10):
        model, preset = random_model(seed), PRESETS[seed % len(PRESETS)]
        data = random_data(seed, model)
        qmodel = kquant.quantize_model(model, data, {"preset": preset, "target": "tflm"}, progress=False)
        nodes = [layer.node for layer in qmodel.layers if hasattr(layer, "node")]
        lacks = {"gelu", "top_k"} | ({"function"} if "a16" in preset else set())  # see above; some functions in float
        if any(node.op in lacks or len(node.shape) > 4 for node in nodes):  # its slices have at most 4 axes
            continue
        report = kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, data, samples=5)
        assert report.ok and report.op_by_op_max_lsb == 0, f"seed {seed}, {preset}\n{report}"


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.MODELS)
def test_real_models(name: str) -> None:
    """w4a8, without the steps that choose other integers and take time."""
    off = {"adaround": False, "correct_bias": False}
    config = {"preset": "w4a8", "target": "tflm", **off}
    qmodel = kquant.quantize_model(zoo.load_model(name), zoo.calibration(name), config, progress=False)
    compare_on_micro(kquant.export_tflite(qmodel).content, name)
