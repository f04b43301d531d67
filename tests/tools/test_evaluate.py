"""Scores of several models on one pass over the data."""

from __future__ import annotations

import numpy as np
import pytest

from kquant_tools import evaluate


def test_scores_are_counted_over_batches():
    truth, wrong = np.array([0, 1, 2, 0, 1]), np.array([0, 2, 2, 1, 1])
    models = {"a": lambda x: np.eye(3)[x[:, 0]], "b": lambda x: np.eye(3)[x[:, 1]]}
    batches = [(np.stack([truth, wrong], 1)[k : k + 3], truth[k : k + 3]) for k in (0, 3)]
    scores = evaluate.evaluate(models, batches)
    assert scores["a"].accuracy == 1 and scores["b"].accuracy == 3 / 5
    assert scores["b"].agrees["a"] == pytest.approx(3) and scores["a"].agrees == {}
    text = evaluate.format_scores(scores, {"a": 1000, "b": 10})
    assert "60.00" in text and "100.00" in text and "1,000" in text


def test_without_labels_only_agreement_is_known():
    scores = evaluate.evaluate({"a": lambda x: np.eye(3)[x]}, [np.array([0, 1])])
    assert scores["a"].accuracy is None and scores["a"].samples == 2
