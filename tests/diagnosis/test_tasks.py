"""Metrics of masks and boxes against counts by hand."""

import pickle
from collections.abc import Sequence

import numpy as np
import pytest

import kquant

RNG = np.random.default_rng(3)


def test_mean_iou_is_the_mean_of_intersections_over_unions() -> None:
    labels, found = RNG.integers(0, 4, (2, 5, 9, 7))
    expected = [np.sum((labels == c) & (found == c)) / np.sum((labels == c) | (found == c)) for c in range(4)]
    assert kquant.mean_iou(4)(labels, [found]) == pytest.approx(100 * np.mean(expected), abs=1e-4)
    assert kquant.pixel_accuracy(4)(labels, [found]) == pytest.approx(100 * np.mean(labels == found))
    assert kquant.mean_iou(4)(labels, [labels]) == 100


def test_scores_by_class_are_the_masks_that_they_choose() -> None:
    labels, scores = RNG.integers(0, 3, (2, 6, 5)), RNG.normal(size=(2, 6, 5, 3))
    for metric in (kquant.mean_iou(3), kquant.pixel_accuracy(3)):
        assert metric(labels, [scores]) == metric(labels, [scores.argmax(-1)]) == metric(labels[..., None], [scores])


def test_void_is_not_scored_and_absent_classes_do_not_count() -> None:
    labels = np.array([[0, 0, 1, 9, -1, 1]])
    found = np.array([[0, 1, 1, 0, 1, 1]])
    assert kquant.mean_iou(4)(labels, [found]) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2, abs=1e-4)
    assert kquant.pixel_accuracy(4)(labels, [found]) == 75
    with pytest.raises(kquant.CalibrationError, match="No label is one of the 4"):
        kquant.mean_iou(4)(labels * 0 + 7, [found])


def test_masks_of_another_shape_are_refused() -> None:
    with pytest.raises(kquant.CalibrationError, match=r"Labels \(1, 4, 4\) do not fit"):
        kquant.mean_iou(3)(np.zeros((1, 4, 4), int), [np.zeros((1, 4, 5), int)])
    with pytest.raises(kquant.ConfigError, match="at least one"):
        kquant.mean_iou(0)


def as_they_are(outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Rows [k, 6] of which padding has a negative class."""
    return [rows[rows[:, 4] >= 0] for rows in outputs[0]]


LABELS = np.array(
    [
        [[0, 0, 10, 10, 0], [20, 20, 40, 30, 1]],
        [[5, 5, 15, 25, 0], [-1, -1, -1, -1, -1]],
    ],
    np.float32,
)


def answers(*rows: Sequence[float]) -> list[np.ndarray]:
    """Boxes of the first image, none in the second."""
    none = np.full((len(rows), 6), -1)
    return [np.stack([np.asarray(rows, np.float32), none])]


def test_mean_average_precision_of_known_answers() -> None:
    perfect = [np.concatenate([LABELS, np.full((2, 2, 1), 0.9, np.float32)], -1)]
    metric = kquant.mean_average_precision(2, as_they_are)
    assert metric(LABELS, perfect) == pytest.approx(100)
    # class 0: one of two found, so precision is 1 up to recall 0.5: 51 of COCO's 101 recalls; class 1: found
    half = answers((0, 0, 10, 10, 0, 0.9), (20, 20, 40, 30, 1, 0.9))
    assert metric(LABELS, half) == pytest.approx(100 * (51 / 101 + 1) / 2)
    # a better scored error in front of the right one halves the precision of class 1
    wrong = answers((0, 0, 10, 10, 0, 0.9), (20, 20, 40, 30, 1, 0.5), (60, 60, 70, 70, 1, 0.8))
    assert metric(LABELS, wrong) == pytest.approx(100 * (51 / 101 + 0.5) / 2)


def test_the_overlap_that_counts() -> None:
    labels = LABELS[:1]
    off = [np.array([[[0, 0, 10, 8, 0, 0.9], [20, 20, 40, 30, 1, 0.9]]], np.float32)]  # IoU 0.8 and 1
    assert kquant.mean_average_precision(2, as_they_are, iou=0.5)(labels, off) == pytest.approx(100)
    assert kquant.mean_average_precision(2, as_they_are, iou=0.9)(labels, off) == pytest.approx(50)
    # at 0.5, 0.55, ... 0.75 and 0.8: seven of ten thresholds
    assert kquant.mean_average_precision(2, as_they_are)(labels, off) == pytest.approx(100 * (0.7 + 1) / 2)
    with pytest.raises(kquant.ConfigError, match="iou"):
        kquant.mean_average_precision(2, as_they_are, iou=1.5)


def test_boxes_that_do_not_count_are_no_errors() -> None:
    labels = np.array([[[0, 0, 10, 10, 0, 0], [50, 50, 53, 53, 0, 1]]], np.float32)
    found = [np.array([[[50, 50, 53, 53, 0, 0.99], [0, 0, 10, 10, 0, 0.5]]], np.float32)]
    assert kquant.mean_average_precision(1, as_they_are)(labels, found) == pytest.approx(100)


def test_boxes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(kquant.CalibrationError, match="5 or 6"):
        kquant.mean_average_precision(2, as_they_are)(LABELS[..., :4], answers((0, 0, 1, 1, 0, 1)))
    with pytest.raises(kquant.CalibrationError, match="No label is a box"):
        kquant.mean_average_precision(2, as_they_are)(LABELS * 0 - 1, answers((0, 0, 1, 1, 0, 1)))


def test_metrics_of_tasks_can_be_sent_to_other_processes() -> None:
    labels, found = RNG.integers(0, 3, (2, 2, 6, 5))
    for metric in (kquant.mean_iou(3), kquant.pixel_accuracy(3)):
        assert pickle.loads(pickle.dumps(metric))(labels, [found]) == metric(labels, [found])
    metric = pickle.loads(pickle.dumps(kquant.mean_average_precision(2, as_they_are)))
    assert metric(LABELS, answers((0, 0, 10, 10, 0, 0.9), (20, 20, 40, 30, 1, 0.9))) == pytest.approx(75.25, abs=0.01)
