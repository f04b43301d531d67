"""Bounded masks: the softmax computes what it did, scores keep their range, and what is no mask is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from keras import layers as L
from keras import ops as K

from kquant.graph.ops import clip_of, evaluate
from kquant.graph.tracing.trace import trace_model
from kquant.graph.transforms.bound_masks import Seen, bound_masks, masked_scores, unbounded_masks
from kquant.graph.transforms.prepare import prepare_graph
from tests.support.tracing import build

T = 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, T, T)).astype(np.float32)
MASK = (np.arange(T)[None, None] < np.asarray([5, 3, 4, 1])[:, None, None]).astype(np.float32)
FUTURE = np.triu(np.full((T, T), -1e9, np.float32), 1)


def twice(x: Any, m: Any) -> Any:
    return K.softmax(x + FUTURE + (1 - m) * -1e9)


MASKED = {
    "affine": lambda x, m: K.softmax(x + (1 - m) * -1e9),
    "constant": lambda x, m: K.softmax(x + FUTURE) + 0.0 * m,
    "both": twice,
    "infinite": lambda x, m: K.softmax(K.where(m > 0.5, x, -float("inf"))),
    "transposed": lambda x, m: L.Softmax(axis=1)(x + K.transpose((1 - m) * -1e4, (0, 2, 1))),
}


@pytest.mark.parametrize("name", MASKED)
def test_the_softmax_computes_what_it_did(name: str) -> None:
    graph = prepare_graph(build(MASKED[name], (T, T), (1, T)))
    (site,) = masked_scores(graph)
    x = [X, MASK]
    scores = np.asarray(evaluate(graph, x, [site.scores])[0])
    want = np.asarray(evaluate(graph, x)[0])
    seen = Seen(float(scores.min()), float(scores.max()), float(scores.min()))
    bounded = bound_masks(graph, {site.reader: seen})
    np.testing.assert_allclose(evaluate(bounded, x)[0], want, atol=2e-5)
    sums = np.asarray(evaluate(bounded, x, [site.sums[-1]])[0])
    assert sums.min() == np.float32(seen.floor) and sums.max() <= scores.max()
    assert clip_of(bounded[site.sums[-1]])[0] == seen.floor
    np.testing.assert_allclose(evaluate(bound_masks(graph), x)[0], want, atol=2e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, m: K.softmax(x + m * -3.0),
        lambda x, m: x + (1 - m) * -1e9,
        lambda x, m: K.softmax(x + 1e6 * m),
        lambda x, m: K.softmax(x) + (1 - m) * -1e9,
    ],
)
def test_what_is_no_mask_is_left_alone(function: Any) -> None:
    graph = prepare_graph(build(function, (T, T), (1, T)))
    assert not masked_scores(graph) and bound_masks(graph).nodes.keys() == graph.nodes.keys()


def test_a_large_mask_that_something_else_reads_is_found() -> None:
    graph = prepare_graph(build(lambda x, m: x + (1 - m) * -1e9, (T, T), (1, T)))
    assert list(unbounded_masks(graph)) == list(graph.outputs)
    for function in (
        lambda x, m: K.softmax(x + (1 - m) * -1e9),
        lambda x, m: x + m * -3.0,
        lambda x, m: x - 1e7,
        lambda x, m: K.log(x) + m,
    ):
        graph = prepare_graph(build(function, (T, T), (1, T)))
        assert not list(unbounded_masks(bound_masks(graph)))


def test_a_mask_that_two_read_serves_both() -> None:
    def function(x: Any, m: Any) -> Any:
        bias = (1 - m) * -1e9
        return K.softmax(x + bias) + K.softmax(20.0 * x + bias)

    graph = prepare_graph(build(function, (T, T), (1, T)))
    first, second = masked_scores(graph)
    seen = {first.reader: Seen(-3.0, 3.0, -3.0), second.reader: Seen(-60.0, 60.0, -60.0)}
    bounded = bound_masks(graph, seen)
    np.testing.assert_allclose(evaluate(bounded, [X, MASK])[0], evaluate(graph, [X, MASK])[0], atol=1e-4)


def test_a_mask_and_numbers_that_layers_add_in_one_are_parted() -> None:
    """As T5 has them: the bias of the positions and the mask, for every layer."""
    positions = RNG.normal(size=(T, T)).astype(np.float32)

    def function(x: Any, m: Any) -> Any:
        both = (1 - m) * -1e9 + positions
        return K.softmax(x + both) + K.softmax(both + 2.0 * x)

    model = build(function, (T, T), (1, T))
    graph = prepare_graph(model)
    assert len(masked_scores(graph)) == 2 and not list(unbounded_masks(bound_masks(graph)))
    np.testing.assert_allclose(evaluate(bound_masks(graph), [X, MASK])[0], model([X, MASK]), atol=2e-5)
    kept = prepare_graph(build(lambda x, m: [function(x, m), (1 - m) * -1e9 + positions], (T, T), (1, T)))
    assert list(unbounded_masks(kept))  # what is an output stays


@pytest.mark.parametrize("function", [lambda x: K.max(x, axis=-1), lambda x: K.amax(x, 1)])
def test_in_front_of_a_maximum_the_smallest_that_is_seen_is_enough(function: Any) -> None:
    graph = prepare_graph(build(lambda x, m: function(x + (1 - m) * -1e9), (T, T), (1, T)))
    (site,) = masked_scores(graph)
    scores, mask = X, np.maximum(MASK, 0)
    mask[3] = 1  # without a row of hidden keys alone
    visible = scores[np.broadcast_to(mask, scores.shape) == 1]
    seen = Seen(float(visible.min()), float(scores.max()), float(visible.min()), of_largest=True)
    bounded = bound_masks(graph, {site.reader: seen})
    found, want = (np.asarray(evaluate(g, [scores, mask])[0]) for g in (bounded, graph))
    np.testing.assert_array_equal(found[want > -1e8], want[want > -1e8])
    assert clip_of(bounded[site.sums[-1]])[0] == visible.min() == seen.floor


def test_sums_of_sums_take_no_time() -> None:
    """Each is read twice by the next: the paths through them are more than could be followed."""

    def function(x: Any) -> Any:
        for _ in range(60):
            x = x + K.reshape(K.reshape(x, (-1, T * T)), (-1, T, T))
        return K.softmax(x)

    assert not list(unbounded_masks(trace_model(build(function, (T, T)))))
