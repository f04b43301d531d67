"""Models quantized for Arm Ethos-U: int8 tensors, constant shapes, and nothing left to the CPU."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import kquant
from experiments import zoo
from kquant.graph.ir import Node
from kquant.targets.ethos_u.target import ACCELERATORS, ETHOS_U
from kquant.targets.ethos_u.vela import compile_file
from kquant.targets.litert.flatbuffer import read_tensors, summary
from kquant.targets.target import get_target

pytest.importorskip("ethosu.vela", reason="Vela is not installed: pip install .[ethos-u]")


def quantized(preset: str, target: str = "ethos_u") -> tuple[kquant.QuantizedModel, np.ndarray]:
    """A network with a transposed convolution, whose output shape is computed where the batch may be resized."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 3))
    y = keras.layers.Conv2D(8, 3, strides=2, activation="relu", name="conv")(x)
    y = keras.layers.Conv2DTranspose(4, 3, strides=2, name="up")(y)
    y = keras.layers.Dense(5, name="dense")(keras.layers.Flatten()(y))
    data = np.random.default_rng(0).normal(0, 2, (24, 8, 8, 3)).astype(np.float32)
    config = {"preset": preset, "target": target}
    return kquant.quantize_model(keras.Model(inputs, y), data, config, progress=False), data


def test_the_target_goes_by_its_name() -> None:
    assert get_target("ethos_u") is ETHOS_U and ETHOS_U.weight_container(Node(name="n", op="conv2d"), 4, 8) == 8


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w8a16"])
def test_the_contract_holds_and_both_accelerators_run_all(preset: str) -> None:
    model, data = quantized(preset)
    report = kquant.verify_tflite(model, kquant.export_tflite(model).content, data)
    assert report.ok, report
    assert report.runtime == "Vela and LiteRT" and report.reference_max_lsb == report.op_by_op_max_lsb == 0
    assert [e.reference_equal for e in report.end_to_end] == [1.0]
    assert [f.device for f in report.footprints] == list(ACCELERATORS)
    assert all(f.memory > 0 and f.flash > 0 and f.cycles and not f.left_out for f in report.footprints)


def test_files_have_int8_weights_and_constant_shapes() -> None:
    ours, theirs = (kquant.export_tflite(quantized("w4a8", t)[0]).content for t in ("ethos_u", "litert"))
    assert "INT4" not in summary(ours).constant_bytes and "INT4" in summary(theirs).constant_bytes
    assert "SHAPE" not in summary(ours).op_counts and "SHAPE" in summary(theirs).op_counts
    mine, packed = read_tensors(ours), read_tensors(theirs)
    for name in ("conv/kernel", "up/kernel", "dense/kernel"):
        np.testing.assert_array_equal(mine[name].data, packed[name].data)
    levels = compile_file(ours).flash, compile_file(kquant.export_tflite(quantized("w8a8")[0]).content).flash
    assert levels[0] < 0.8 * levels[1]  # the compiler encodes 16 levels in fewer bits than 256


def test_a_batch_runs_in_steps_of_one() -> None:
    model, data = quantized("w8a8")
    runner = kquant.TFLiteModel(kquant.export_tflite(model).content, "reference")
    together = runner.predict(data)[0]
    np.testing.assert_array_equal(together, np.concatenate([runner.predict(x[None])[0] for x in data]))


def test_float_layers_break_the_contract_and_are_named() -> None:
    x = keras.Input((4, 4, 3))
    y = keras.layers.LayerNormalization(rms_scaling=True, name="norm")(keras.layers.Conv2D(4, 3)(x))
    data = np.random.default_rng(0).normal(size=(8, 4, 4, 3)).astype(np.float32)
    config = {"preset": "w8a8", "target": "ethos_u"}
    model = kquant.quantize_model(keras.Model(x, y), data, config, progress=False)
    report = kquant.verify_tflite(model, kquant.export_tflite(model).content, data)
    assert not report.ok and all(f.left_out for f in report.footprints)
    assert "not on ethos-u55-128: " in str(report) and "norm" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.MODELS)
def test_real_models(name: str) -> None:
    """w4a8, without the steps that choose other integers and take time; the file computes what LiteRT's does."""
    off = {"adaround": False, "correct_bias": False}
    files = []
    for target in ("litert", "ethos_u"):
        config = {"preset": "w4a8", "target": target, **off}
        qmodel = kquant.quantize_model(zoo.load_model(name), zoo.calibration(name), config, progress=False)
        files.append(kquant.export_tflite(qmodel).content)
    for accelerator in ACCELERATORS:
        assert compile_file(files[1], accelerator).cpu_operators == ()
    x = next(iter(zoo.record(name).evaluation(20)))[0]
    litert, ethos_u = (kquant.TFLiteModel(f, "builtin").predict(x)[0] for f in files)
    np.testing.assert_array_equal(litert, ethos_u)
