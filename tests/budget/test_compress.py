"""Compression within a drop, or within bytes: what is promised holds for the file."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import kquant
from kquant.budget.compress import LEAST, _Attempt, _searched, size_of
from kquant.quantize.record import Step
from kquant.targets.target import get_target
from models import digits_cnn


def model_of(size: Any, score: Any) -> Any:
    """Attempts whose size and score are functions of the divergence."""
    return lambda d: _Attempt(divergence=d, model=None, size=int(size(d)), score=score(d))  # type: ignore[arg-type]


@pytest.mark.parametrize("drop", [0.5, 2.0, 5.0])
def test_the_largest_divergence_within_the_drop_is_found(drop: float) -> None:
    found, tried = _searched(model_of(lambda d: 1000 / d, lambda d: 90 - 10 * d), 90.0, drop, None, "m", False)
    assert found.score >= 90 - drop and 0.8 * drop / 10 < found.divergence <= drop / 10 and tried == 7


@pytest.mark.parametrize("limit", [1000, 3000, 30000])
def test_the_best_score_within_bytes_is_found(limit: int) -> None:
    found, _ = _searched(model_of(lambda d: 1000 / d, lambda d: 90 - 10 * d), 90.0, None, limit, "m", False)
    assert found.size <= limit and found.divergence < 1.25 * 1000 / limit


def test_a_network_that_bears_everything_gets_the_most() -> None:
    found, _ = _searched(model_of(lambda d: 1000 / d, lambda d: 90.0), 90.0, 0.0, None, "m", False)
    assert found.divergence > 1.7


def test_a_network_that_is_small_enough_is_tried_once() -> None:
    found, tried = _searched(model_of(lambda d: 10, lambda d: 90.0), 90.0, None, 100, "m", False)
    assert tried == 1 and found.divergence == pytest.approx(LEAST)


@pytest.mark.parametrize("budget", [{"max_drop": 0.1, "max_bytes": 500}, {"max_drop": 0.0001, "max_bytes": None}])
def test_what_cannot_be_kept_is_said_with_numbers(budget: dict[str, Any]) -> None:
    with pytest.raises(kquant.ConfigError, match=r"90 in float.*smallest file has"):
        _searched(model_of(lambda d: 1000 / d, lambda d: 90 - 10 * d), 90.0, metric="m", progress=False, **budget)


@pytest.mark.parametrize(
    "arguments, match", [({}, "max_drop or max_bytes"), ({"max_drop": -1}, "at least 0"), ({"max_bytes": "x"}, "'x'")]
)
def test_budgets_are_checked(arguments: Any, match: str) -> None:
    model = keras.saving.load_model(digits_cnn.PATH)
    with pytest.raises(kquant.ConfigError, match=match):
        kquant.compress(model, digits_cnn.load_split().calibration, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["litert", "tflm", "ethos_u"])
def test_the_digits_within_a_drop(target: str) -> None:
    """Far smaller than 8 bits, and as good on digits that no step has seen."""
    digits = digits_cnn.load_split()
    model = keras.saving.load_model(digits_cnn.PATH)
    before = [w.numpy() for w in model.weights]
    data = (digits.x_train[:300], digits.y_train[:300])
    small = kquant.compress(model, data, max_drop=1.0, target=target, progress=False)
    assert all(np.array_equal(a, w) for a, w in zip(before, model.weights, strict=True))
    plain = kquant.quantize_model(model, digits.x_train[:200], {"preset": "w8a8", "target": target}, progress=False)
    size = size_of(get_target(target))
    contents = [kquant.export_tflite(q).content for q in (small, plain)]
    sizes = [size(q, c) for q, c in zip((small, plain), contents, strict=True)]
    assert sizes[0] < 0.75 * sizes[1]
    scores = [np.mean(kquant.TFLiteModel(c).predict(digits.x_test)[0].argmax(-1) == digits.y_test) for c in contents]
    assert scores[0] >= scores[1] - 0.02
    (said,) = [s for s in small.quantization.steps if s.name == "compress"]
    assert isinstance(said, Step) and f"{sizes[0]:,} bytes" in said.note and said.note in small.report
    assert kquant.verify_tflite(small, contents[0], digits.x_test[:64]).ok


@pytest.mark.slow
def test_training_between_makes_it_smaller_or_as_small() -> None:
    digits = digits_cnn.load_split()
    model = keras.saving.load_model(digits_cnn.PATH)
    data = (digits.x_train[:300], digits.y_train[:300])
    trained = kquant.compress(
        model, data, max_bytes=6500, training_data=digits.x_train[:128], learning_rate=1e-3, progress=False
    )
    content = kquant.export_tflite(trained).content
    assert len(kquant.pack_tflite(content)) <= 6500
    assert np.mean(kquant.TFLiteModel(content).predict(digits.x_test)[0].argmax(-1) == digits.y_test) > 0.9


@pytest.mark.slow
def test_a_metric_may_be_a_function_of_a_keras_model() -> None:
    digits = digits_cnn.load_split()
    model = keras.saving.load_model(digits_cnn.PATH)

    def accuracy(m: keras.Model) -> float:
        return float(np.mean(m.predict(digits.x_train[:60], verbose=0).argmax(-1) == digits.y_train[:60]))

    small = kquant.compress(model, digits.x_train[:120], accuracy, max_bytes=9000, progress=False)
    assert "accuracy 1 of 1 in float" in small.report
