"""The workflow on models whose answer is known, its rules of noise, and its cost."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import keras
import numpy as np
import pytest
import yaml

import kquant
from experiments import zoo
from kquant.diagnosis.case import majority
from kquant.diagnosis.diagnose import diagnose
from kquant.diagnosis.experiments import FileModel, Laboratory, Measured, right_per_sample, standard_error
from kquant.diagnosis.findings import inner_range, of_tensors, other_domain
from kquant.diagnosis.metrics import make_metric
from kquant.diagnosis.records import Diagnosis, Sensitivity, TensorRecord
from kquant.diagnosis.samples import predict, read_samples
from kquant.diagnosis.trials import TRIALS, more_bits
from kquant.graph.transforms import prepare_graph
from tests.support.digits_chain import DIGITS, OFF, PER_TENSOR, TEST, chain, wide_depthwise


@cache
def wide() -> Diagnosis:
    """One scale per tensor for depthwise channels of ranges 1 to 1000, everything off."""
    model = wide_depthwise()
    return diagnose(
        model, TEST, config=PER_TENSOR, calibration_data=DIGITS.calibration, sensitivity=True, progress=False
    )


@cache
def lab(metric: str = "accuracy") -> Laboratory:
    samples = read_samples(TEST, prepare_graph(chain()))
    return Laboratory(chain(), make_metric(metric, samples, chain()), samples.first(64), progress=False)


# --- the workflow -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wide_channels_are_blamed_on_weights_and_cured() -> None:
    d = wide()
    assert d.culprit == "weights"
    assert d.float_score - d.quantized_score > 3
    assert d.findings[0].kind == "wide_channels" and d.findings[0].nodes[0] in ("dw", "pw")
    assert "dw" in d.findings[0].nodes
    stages = {s.name: s for s in d.stages}
    assert stages["weights only"].score + 3 < stages["activations only"].score  # type: ignore[operator]
    assert stages["equalize"].ok
    assert "per channel, on another target" in stages and "per channel" not in stages
    assert any("One scale per channel" in a for a in d.advice)
    assert {s.kind for s in d.sensitivity} == {"weights"}  # activations are innocent
    assert not any(name.startswith("ranges by") for name in stages)


@pytest.mark.slow
def test_a_step_of_the_pipeline_stays_where_it_costs_no_more_than_noise() -> None:
    d = wide()
    stage = next(s for s in d.stages if s.name == "bias correction")
    assert stage.verdict.endswith("within noise.") and d.recommendation is not None
    assert d.recommendation["correct_bias"] is True and d.recommendation["equalize"] is True


@pytest.mark.slow
def test_the_recommended_config_reaches_what_is_said() -> None:
    d = wide()
    assert d.recommendation is not None and d.recommendation["equalize"] is True
    config = yaml.safe_load(yaml.safe_dump(dict(d.recommendation)))  # as a file has it
    model = kquant.quantize_model(wide_depthwise(), DIGITS.calibration, config, progress=False)
    outputs = kquant.TFLiteModel(kquant.export_tflite(model).content).predict(TEST[0])[0]
    assert d.recommended_score == pytest.approx(100 * np.mean(outputs.argmax(-1) == TEST[1]))
    assert d.recommended_score > d.float_score - 1


def test_a_diagnosis_is_a_record(tmp_path: Any) -> None:
    d = wide()
    assert Diagnosis.from_json(d.to_json()) == d
    assert "culprit: weights" in str(d) and "equalize: true" in str(d)
    assert d.samples == 300 and d.seconds > 0 and d.model == "chain"
    assert [c.node for c in d.channels] == ["conv", "dw", "pw", "logits"]
    before, after = (np.abs(side).max(1) for side in (d.channels[1].before, d.channels[1].after))
    assert before.max() / before.min() > 20 > after.max() / after.min()


def test_without_labels_and_calibration_data() -> None:
    d = diagnose(chain(), TEST[0][:64], sensitivity=False, progress=False)
    assert d.metric == "agreement with float (%)" and d.float_score == 100
    assert d.culprit == "none" and "64 of the evaluation samples" in d.advice[0]
    assert "not known" in d.stages[0].verdict


def half_accuracy(model: Any) -> float:
    return 0.5 * float(np.mean(np.argmax(model.predict(TEST[0], verbose=0), -1) == TEST[1]))


@pytest.mark.slow
def test_a_function_is_called_with_keras_models_only() -> None:
    seen = []

    def metric(model: Any) -> float:
        seen.append(type(model).__name__)
        assert isinstance(model, keras.Model)
        return half_accuracy(model)

    d = diagnose(
        wide_depthwise(), TEST[0][:50], metric, PER_TENSOR, calibration_data=DIGITS.calibration, sensitivity=False,
        progress=False,
    )  # fmt: skip
    labelled = wide()
    assert d.metric == "metric"
    assert d.float_score == pytest.approx(labelled.float_score / 200)
    assert d.target_score == pytest.approx(labelled.target_score / 200)  # type: ignore[operator]
    assert d.recommended_score == pytest.approx(labelled.recommended_score / 200)  # type: ignore[operator]
    assert {"QuantizedModel", "FileModel"} <= set(seen)
    assert d.culprit == "weights"


@pytest.mark.slow
def test_executor_and_checkpoint_give_the_same(tmp_path: Any) -> None:
    path = tmp_path / "sensitivity.json"
    options: dict[str, Any] = {"config": PER_TENSOR, "calibration_data": DIGITS.calibration, "progress": False}
    with ThreadPoolExecutor(2) as executor:
        d = diagnose(wide_depthwise(), TEST, checkpoint=path, executor=executor, **options)
    assert path.exists() and d.sensitivity == wide().sensitivity
    assert d.stages == wide().stages and d.findings == wide().findings  # and every run gives the same


def test_a_quantized_model_is_refused() -> None:
    model = kquant.quantize_model(chain(), DIGITS.calibration, progress=False)
    with pytest.raises(kquant.ModelError, match="quantized=..."):
        diagnose(model, TEST)


# --- noise --------------------------------------------------------------------------------------------------------


def test_the_error_of_a_difference_is_the_binomial_one_of_what_differs() -> None:
    rng = np.random.default_rng(0)
    a, b = (Measured(0.0, rng.random(10_000) < p) for p in (0.9, 0.85))
    a, b = (Measured(100 * float(np.mean(m.right)), m.right.astype(float)) for m in (a, b))  # type: ignore[union-attr]
    gains, losses = np.sum(a.right < b.right), np.sum(a.right > b.right)
    variance = gains + losses - (gains - losses) ** 2 / 10_000
    assert standard_error(a, b) == pytest.approx(100 * np.sqrt(variance) / 10_000)
    assert standard_error(a, a) == 0
    # independent samples: the sum of both binomial variances
    assert standard_error(a, b) == pytest.approx(100 * np.sqrt((0.9 * 0.1 + 0.85 * 0.15) / 10_000), rel=0.03)


@pytest.mark.parametrize(("flips", "counts"), [((3, 0), False), ((12, 0), True), ((12, 9), False), ((30, 8), True)])
def test_what_counts_as_worse(flips: tuple[int, int], counts: bool) -> None:
    """(lost, won) of 300 samples: beyond half a point and twice sqrt(lost + won - (lost - won)^2 / n)."""
    lost, won = flips
    right = np.array([1.0] * 200 + [0.0] * 100)
    other = right.copy()
    other[:lost], other[200 : 200 + won] = 0, 1
    a, b = (Measured(100 * r.mean(), r) for r in (right, other))
    assert lab().worse(a, b) == counts
    assert not lab().worse(b, a)


def test_other_metrics_have_a_floor() -> None:
    sqnr = lab("sqnr")
    assert not sqnr.worse(Measured(200.0), Measured(31.0))  # more than 30 dB is of no use
    assert sqnr.worse(Measured(200.0), Measured(25.0))
    assert lab("sqnr").drop(Measured(28.0), Measured(25.0)) == pytest.approx(3)


def test_scores_are_the_mean_of_what_is_right() -> None:
    for name in ("accuracy", "agreement"):
        here = lab(name)
        outputs = predict(chain(), here.metric.samples)
        outputs[0] = outputs[0] + np.random.default_rng(0).normal(size=outputs[0].shape)
        right = right_per_sample(here.metric, outputs[0])
        assert right is not None and right.shape == (300,)
        assert here.metric.of_outputs(outputs) == pytest.approx(100 * right.mean())
    assert right_per_sample(lab("kl").metric, outputs[0]) is None
    assert majority(lab().metric) == pytest.approx(np.bincount(TEST[1]).max() / 300)


def test_a_file_as_a_model() -> None:
    content = kquant.export_tflite(kquant.quantize_model(chain(), DIGITS.calibration, progress=False)).content
    model = FileModel(content, prepare_graph(chain()))
    expected = kquant.TFLiteModel(content).predict(TEST[0][:40])[0]
    np.testing.assert_array_equal(model.predict(TEST[0][:40], verbose=0), expected)
    np.testing.assert_array_equal(np.asarray(model(TEST[0][:3])), expected[:3])


# --- rules and trials ---------------------------------------------------------------------------------------------


def record(values: Any, low: float, high: float, **changes: Any) -> TensorRecord:
    values = np.asarray(values, np.float64)
    counts, edges = np.histogram(values, 1000)
    facts: dict[str, Any] = {
        "node": "a", "layer": "a", "op": "conv2d", "kind": "activations", "bits": 8, "low": low, "high": high,
        "seen_low": float(values.min()), "seen_high": float(values.max()), "sqnr": 30.0, "channel_ratio": 1.0,
        "saturated": float(np.mean((values < low) | (values > high))), "dead_channels": 0,
        "counts": tuple(int(c) for c in counts), "edges": tuple(float(e) for e in edges), **changes,
    }  # fmt: skip
    return TensorRecord(**facts)


def test_inner_range_of_a_uniform_tensor_is_99_percent_of_it() -> None:
    assert inner_range(record(np.linspace(0, 1, 100_001), 0, 1)) == pytest.approx(0.99, abs=0.003)


def test_outliers_saturation_and_neither() -> None:
    values = np.random.default_rng(0).normal(size=10_000)
    far = np.append(values, 100.0)
    cases = [(record(values, -4, 4), []), (record(far, -4, 100), ["outliers"]), (record(values, -1, 1), ["saturation"])]
    for tensor, expected in cases:
        assert [f.kind for f in of_tensors([tensor], ("activations",), ())] == expected
        assert of_tensors([tensor], ("weights",), ()) == []
        assert of_tensors([tensor], ("activations",), (), [tensor.op]) == []
    weights = record(values, -4, 4, kind="weights", channel_ratio=50.0)
    (found,) = of_tensors([weights], ("weights",), ("a",))
    assert found.kind == "wide_channels" and "50 times" in found.text
    assert of_tensors([weights], ("weights",), ()) == []  # one scale per channel: nothing to suffer from


def test_another_domain_is_told_from_chance() -> None:
    seen = {f"n{k}": (0.0, 1.0) for k in range(5)}
    one = seen | {"n2": (-1.0, 2.0)}
    assert other_domain(seen, one, ["n0"]) == ((), "")  # one tensor of five, and not the input
    nodes, text = other_domain(seen, one, ["n2"])
    assert nodes == ("n2",) and "[0, 1]" in text and "[-1, 2]" in text
    narrow = dict.fromkeys(seen, (0.0, 0.3))
    assert set(other_domain(seen, narrow, ["n9"])[0]) == set(seen)
    assert other_domain(seen, dict.fromkeys(seen, (0.0, 1.5)), ["n0"])[0] == ()


def alone(layer: str, kind: str, bits: int, op: str = "conv2d") -> Sensitivity:
    return Sensitivity(node=layer, layer=layer, op=op, kind=kind, bits=bits, alone_on=0.0, alone_off=None, sqnr=0.0)


def test_more_bits_for_the_worst_layers() -> None:
    config = kquant.QuantConfig.load("w4a8")
    ranked = [
        alone("a.b", "weights", 4), alone("s", "activations", 8, "softmax"), alone("c", "weights", 8),
        alone("d", "activations", 8), alone("a.b", "activations", 8),
    ]  # fmt: skip
    one, two = (more_bits(config, ranked, k) for k in (1, 2))
    assert one is not None and two is not None
    assert [r.to_dict() for r in one.rules] == [
        {"name": r"^a\.b$", "weights": {"bits": 8}, "activations": {"bits": 16}}
    ]
    assert [r.name for r in two.rules] == [r"^a\.b$", "^d$"]
    assert more_bits(config, ranked, 3) is None


@pytest.mark.parametrize("trial", TRIALS, ids=lambda t: t.name)
def test_a_trial_changes_the_config_and_then_has_nothing_left(trial: Any) -> None:
    config = kquant.QuantConfig.load(
        {"preset": "w8a8-per_tensor", **OFF, "logits": None, "weights": {"method": "min_max"}}
    )
    if trial.name == "per channel":
        config = kquant.QuantConfig.load({"preset": "w8a8", "weights": {"per_channel": False}})
    if trial.name == "8 bits for the outputs":
        config = kquant.QuantConfig.load({"preset": "w8a8", "activations": {"bits": 4}})
    inputs = keras.Input((4,))
    graph = prepare_graph(keras.Model(inputs, keras.layers.Dense(3, "softmax")(inputs)))
    assert trial.applies(config, {}, graph)
    changed = trial.change(config)
    assert changed != config
    taken = {"equalize": changed.equalize, "correct_bias": changed.correct_bias, "adaround": changed.adaround}
    assert not trial.applies(changed, taken, graph)


# --- real models --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mobilenet_v1_per_tensor_with_everything_off() -> None:
    name, samples = "mobilenet_v1", 300
    model, calibration = zoo.load_model(name), zoo.calibration(name)
    evaluation = zoo.MODELS[name].evaluation(samples)
    d = diagnose(model, evaluation, config=PER_TENSOR, calibration_data=calibration, sensitivity=False, progress=False)
    assert d.culprit == "weights"
    found = {f.kind: f.nodes for f in d.findings}
    assert found["wide_channels"][0].startswith("conv_dw") and len(found["wide_channels"]) > 5
    assert {n for n in found["dead_channels"] if n.startswith("conv_dw")}
    assert d.recommendation is not None and d.recommended_score is not None
    whole = kquant.quantize_model(model, calibration, "w8a8-per_tensor", progress=False)
    pipeline, _ = zoo.top1(kquant.export_tflite(whole).content, evaluation)
    assert d.recommended_score >= pipeline - 0.3


@pytest.mark.slow
def test_resnet20_with_report_takes_less_than_three_minutes(tmp_path: Any) -> None:
    """Of one core: the time of this process, whatever runs beside it."""
    model, started = zoo.load_model("resnet20"), time.process_time()
    d = diagnose(
        model, zoo.MODELS["resnet20"].evaluation(500), calibration_data=zoo.calibration("resnet20"), progress=False
    )
    d.save_html(tmp_path / "report.html")
    assert time.process_time() - started < 180
    assert d.culprit == "none"
    assert {(s.node, s.kind) for s in d.sensitivity} == {(t.node, t.kind) for t in d.tensors}  # each quantizer
    assert [t.node for t in d.target] == [n.name for n in prepare_graph(model)]  # each operation


# --- executors ----------------------------------------------------------------------------------------------------


def transitions(dask_worker: Any) -> int:
    """How many changes of a task's state a worker has seen."""
    return len(dask_worker.state.log)


@pytest.mark.slow
def test_a_dask_cluster_gives_the_same_report() -> None:
    """Two worker processes of a local cluster, by its `concurrent.futures` executor."""
    distributed = pytest.importorskip("distributed", reason="needs dask's distributed (extra dev)")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        client.get_executor(pure=False) as executor,
    ):
        d = diagnose(
            wide_depthwise(),
            TEST,
            config=PER_TENSOR,
            calibration_data=DIGITS.calibration,
            progress=False,
            executor=executor,
        )
        work = client.run(transitions)
    assert len(work) == 2 and all(work.values())  # both took part
    assert replace(d, seconds=0.0) == replace(wide(), seconds=0.0)
