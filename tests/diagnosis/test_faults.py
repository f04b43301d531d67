"""Planted faults: each is found, blamed on what was planted, and named."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import kquant
from kquant.diagnosis.diagnose import diagnose
from kquant.diagnosis.records import Diagnosis
from kquant.keras.model import extract
from kquant.targets.litert.writer import write_tflite
from tests.support.digits_chain import DIGITS, TEST, chain, features, outlying_channel, with_readout
from tests.support.faults import with_node


def diagnosed(model: keras.Model | None = None, **options: Any) -> Diagnosis:
    options = {"calibration_data": DIGITS.calibration, "sensitivity": False, "progress": False, **options}
    return diagnose(model or chain(), TEST, **options)


def kinds(d: Diagnosis) -> dict[str, tuple[str, ...]]:
    return {f.kind: f.nodes for f in d.findings}


@pytest.mark.slow
def test_an_activation_with_outliers() -> None:
    d = diagnosed(outlying_channel())
    assert d.float_score > 80 and d.float_score - d.quantized_score > 5
    assert d.culprit == "activations"
    assert kinds(d)["outliers"][0] == "dw"
    assert "dw" in d.verdict
    assert d.recommended_score is not None and d.recommended_score > d.float_score - 2
    assert {s.name: s.ok for s in d.stages}["weights only"]


@pytest.mark.slow
def test_a_layer_with_a_bad_scale() -> None:
    quantized = kquant.quantize_model(chain(), DIGITS.calibration, progress=False)
    layer = next(v for v in quantized.layers if getattr(v, "node", None) and v.node.name == "dw")
    quantizer = layer.output_quantizer
    grid = quantizer.to_grid()
    quantizer.assign(type(grid)(np.float32(grid.scale * 60), grid.zero_point, grid.qmin, grid.qmax, grid.axis))
    d = diagnosed(quantized=quantized)
    assert d.culprit == "activations"
    assert kinds(d)["bad_scale"] == ("dw",)
    assert "60 times" in d.findings[0].text
    assert d.recommendation == kquant.QuantConfig.load("w8a8").to_dict()  # as it was meant
    assert d.recommended_score == pytest.approx(d.float_score, abs=1)


@pytest.mark.slow
@pytest.mark.parametrize("sensitivity", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_logits_with_too_few_bits(sensitivity: bool) -> None:
    config = {"preset": "w8a8", "rules": [{"name": "^logits$", "activations": {"bits": 2}}]}
    d = diagnosed(config=config, sensitivity=sensitivity)
    assert d.culprit == "activations"
    assert d.findings[0].kind == "logits" and d.findings[0].nodes == ("logits",)
    assert "2 bits" in d.findings[0].text
    assert d.recommended_score == pytest.approx(d.float_score, abs=1)
    if sensitivity:
        assert (d.sensitivity[0].node, d.sensitivity[0].kind) == ("logits", "activations")


def test_channels_swapped_between_simulation_and_file() -> None:
    quantized = kquant.quantize_model(chain(), DIGITS.calibration, progress=False)
    swapped = with_node(extract(quantized), "pw", lambda n: n.with_weights(kernel=n.weights["kernel"][..., ::-1]))
    content, _ = write_tflite(swapped, target=quantized.target)
    d = diagnosed(quantized=quantized, tflite=content)
    assert d.culprit == "target"
    assert d.target_score is not None and d.target_score < d.quantized_score - 5
    assert kinds(d)["file_differs"][0] == "pw"
    assert "pw" in d.verdict and d.recommendation is None


@pytest.mark.slow
def test_calibration_data_from_elsewhere() -> None:
    """Scaled to 0..1 twice."""
    d = diagnosed(calibration_data=DIGITS.calibration / 16)
    assert d.culprit == "activations"
    assert d.findings[0].kind == "calibration_domain" and d.findings[0].nodes[0] == "image"
    assert "[0, 0.0625]" in d.verdict and "[0, 1]" in d.verdict
    assert d.recommendation is None and "Calibrate with samples" in d.advice[0]
    stages = {s.name: s for s in d.stages}
    assert stages["calibrated on evaluation data"].score == pytest.approx(d.float_score, abs=1)
    assert "ranges by mse" not in stages  # nothing was tried that cannot help


def test_a_float_model_that_does_not_work() -> None:
    model = with_readout(features())
    weights, bias = model.get_layer("logits").get_weights()
    model.get_layer("logits").set_weights([np.random.default_rng(0).permutation(weights), bias])
    d = diagnosed(model)
    assert d.culprit == "float model" and "float model" in d.verdict
    assert [s.name for s in d.stages] == ["float model"] and not d.stages[0].ok
    assert d.recommendation is None


@pytest.mark.slow
def test_a_quantized_model_of_another_float_model() -> None:
    other = with_readout(features())
    kernel, bias = other.get_layer("pw").get_weights()
    other.get_layer("pw").set_weights([kernel * 1.01, bias])
    d = diagnosed(quantized=kquant.quantize_model(other, DIGITS.calibration, progress=False))
    assert d.culprit == "simulation"
    assert [s.ok for s in d.stages if s.name == "FP32 check"] == [False]


def test_nothing_planted_nothing_found() -> None:
    d = diagnosed()
    assert (d.culprit, d.findings, d.recommendation, d.advice) == ("none", (), None, ())
    assert d.verdict.startswith("Nothing is wrong")
