"""Tensor records against numpy on all data at once, and planted faults that show in them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kquant.diagnosis.analysis import channel_ranges, tensor_records
from kquant.diagnosis.metrics import sqnr_db
from kquant.diagnosis.records import TensorRecord
from kquant.diagnosis.samples import read_samples
from kquant.diagnosis.switches import Switches
from kquant.errors import CalibrationError
from kquant.graph.ops import evaluate
from kquant.graph.quantized import QuantizedGraph
from kquant.graph.transforms.equalize import equalize
from kquant.grids.grid import fake_quantize
from kquant.quantize.calibrate import quantize_graph
from kquant.quantize.plan import make_plan
from tests.support.faults import with_node, with_scale
from tests.support.toy import calibration, config, toy_data, toy_graph, toy_qgraph

X = toy_data(40, seed=3)


def records(qgraph: QuantizedGraph, x: np.ndarray = X) -> dict[str, TensorRecord]:
    return {f"{r.node}:{r.kind}": r for r in tensor_records(qgraph, x, progress=False)}


def test_every_number_is_that_of_all_data_at_once() -> None:
    qgraph = toy_qgraph("w4a4")
    found = records(qgraph)
    assert list(found) == list(Switches.of(qgraph).names)
    for name in ("in", "c1", "dw", "fc", "sm"):
        r, q = found[f"{name}:activations"], qgraph.activations[name]
        assert q is not None
        x = np.asarray(evaluate(qgraph.graph, [X], [name])[0])
        low, high = (float((b - q.zero_point) * q.scale) for b in (q.qmin, q.qmax))
        assert (r.low, r.high, r.bits) == (pytest.approx(low), pytest.approx(high), q.bits)
        assert (r.seen_low, r.seen_high) == (pytest.approx(x.min()), pytest.approx(x.max()))
        assert r.sqnr == pytest.approx(sqnr_db(x, fake_quantize(x, q)), abs=0.01)
        outside = np.mean((x < low - q.scale / 2) | (x > high + q.scale / 2))
        assert r.saturated == pytest.approx(outside, abs=2 / x.size)
        spans = np.ptp(x.reshape(-1, x.shape[-1]), axis=0)
        assert r.channel_ratio == pytest.approx(spans.max() / np.median(spans[spans > 0]), rel=1e-4)
        assert r.dead_channels == np.sum(spans == 0)
        assert len(r.counts) == 64 and len(r.edges) == 65 and sum(r.counts) == x.size
        expected, _ = np.histogram(x, 64, (x.min(), x.max()))
        assert np.abs(np.array(r.counts) - expected).sum() <= 0.01 * x.size  # values at the edges of bins


def test_weights() -> None:
    qgraph = toy_qgraph("w4a8")
    found = records(qgraph)
    for name, axis in (("c1", 3), ("dw", 2), ("fc", 1)):
        r, w, q = found[f"{name}:weights"], qgraph.graph[name].weights["kernel"], qgraph.weights[name]
        assert q is not None
        view = w.reshape(3, 3, -1) if name == "dw" else w
        assert r.sqnr == pytest.approx(sqnr_db(view, fake_quantize(view, q)))
        spans = np.abs(np.moveaxis(view, axis, 0).reshape(view.shape[axis], -1)).max(1)
        assert r.channel_ratio == pytest.approx(spans.max() / np.median(spans)) and r.dead_channels == 0
        assert sum(r.counts) == w.size and r.bits == 4
        assert (r.low, r.high) == (pytest.approx(-np.max(q.scale) * q.qmax), pytest.approx(np.max(q.scale) * q.qmax))


def test_an_outlier_channel_and_dead_channels_are_counted() -> None:
    def planted(n):  # type: ignore[no-untyped-def]
        kernel, bias = n.weights["kernel"].copy(), n.weights["bias"].copy()
        kernel[..., 0] *= 50
        kernel[..., 1], bias[1] = 0, 0
        kernel[..., 2], bias[2] = 1e-12, 1
        return n.with_weights(kernel=kernel, bias=bias)

    plan = make_plan(toy_graph(), config("w8a8-per_tensor"))
    graph = with_node(toy_qgraph(), "c1", planted).graph
    before = records(toy_qgraph("w8a8-per_tensor"))["c1:activations"]
    found = records(quantize_graph(replace(plan, graph=graph), calibration(toy_data()), progress=False))
    weights, outputs = found["c1:weights"], found["c1:activations"]
    assert weights.dead_channels == 2 and outputs.dead_channels == 2
    assert weights.channel_ratio > 20 and outputs.channel_ratio > 20 > before.channel_ratio


def test_a_bad_scale_shows_as_saturation() -> None:
    qgraph = toy_qgraph()
    good = records(qgraph)
    small = replace(qgraph, activations=with_scale(dict(qgraph.activations), ["dw"], 0.1))
    bad = records(small)
    assert good["dw:activations"].saturated < 0.001 and bad["dw:activations"].saturated > 0.1
    assert bad["dw:activations"].sqnr < 10 < good["dw:activations"].sqnr
    changed = [n for n in good if good[n] != bad[n] and good[n].sqnr != pytest.approx(bad[n].sqnr, abs=0.01)]
    assert changed == ["dw:activations"]  # every tensor stands alone, in the float network


def test_batches_change_nothing() -> None:
    qgraph = toy_qgraph()
    parts = tensor_records(qgraph, read_samples([X[:7], X[7:]], qgraph.graph), progress=False)
    for other, r in zip(parts, records(qgraph).values(), strict=True):
        assert (other.seen_low, other.seen_high) == pytest.approx((r.seen_low, r.seen_high), rel=1e-5)
        assert other.sqnr == pytest.approx(r.sqnr, abs=0.05)


def test_values_that_are_not_finite_are_refused() -> None:
    qgraph = with_node(toy_qgraph(), "dw", lambda n: n.with_weights(bias=n.weights["bias"] * np.float32(np.nan)))
    with pytest.raises(CalibrationError, match="'dw' hold NaN"):
        tensor_records(qgraph, X, progress=False)
    with pytest.raises(CalibrationError, match="empty"):
        tensor_records(toy_qgraph(), [], progress=False)


def test_channel_ranges_before_and_after_equalization() -> None:
    graph = with_node(
        toy_qgraph(), "c1", lambda n: n.with_weights(kernel=n.weights["kernel"] * 4.0 ** np.arange(8))
    ).graph
    after, _ = equalize(graph)
    found = {r.node: r for r in channel_ranges(graph, after)}
    assert list(found) == ["c1", "dw", "fc"]
    kernel = graph["c1"].weights["kernel"]
    expected = [np.quantile(kernel, q, axis=(0, 1, 2)) for q in (0, 0.25, 0.5, 0.75, 1)]
    np.testing.assert_allclose(found["c1"].before, np.transpose(expected), rtol=1e-6)
    assert [len(r.before) for r in found.values()] == [len(r.after) for r in found.values()] == [8, 8, 5]
    for r in found.values():
        np.testing.assert_allclose(
            [c[-1] for c in r.after],
            np.moveaxis(after[r.node].weights["kernel"], 1 if r.node == "fc" else -1 if r.node == "c1" else 2, 0)
            .reshape(len(r.after), -1)
            .max(1),
        )
