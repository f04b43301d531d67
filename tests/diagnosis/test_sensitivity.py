"""Sensitivity: what the switches say, whoever runs it; planted faults first; interrupted work is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from experiments.debug_tables import rank_twice
from kquant.diagnosis import sensitivity as module
from kquant.diagnosis.metrics import Metric, make_metric, sqnr_db
from kquant.diagnosis.records import Sensitivity
from kquant.diagnosis.samples import predict, read_samples
from kquant.diagnosis.sensitivity import bits_sensitivity, fingerprint, sensitivity
from kquant.diagnosis.switches import Switches
from kquant.errors import ConfigError
from kquant.graph.quantized import QuantizedGraph
from tests.support.faults import with_node, with_scale
from tests.support.toy import calibration, toy_data, toy_graph, toy_qgraph

X = toy_data(48, seed=7)


@cache
def toy(name: str = "w4a8") -> tuple[Switches, Metric]:
    """The toy network with random labels' accuracy: a score that reacts to every quantizer, if not sensibly."""
    switches = Switches.of(toy_qgraph(name))
    return switches, make_metric("kl", read_samples(X, switches.qgraph.graph), switches.model)


def measured(switches: Switches, metric: Metric, **options: Any) -> dict[str, Sensitivity]:
    found = sensitivity(switches, metric, progress=False, **options)
    return {f"{r.node}:{r.kind}": r for r in found}


def switched_on(model: keras.Model) -> int:
    """How many quantizers of a model are on."""
    return sum(bool(v.numpy()) for v in model.variables if v.name == "on")


@cache
def whole() -> dict[str, Sensitivity]:
    return measured(*toy())


@pytest.mark.slow
def test_records_are_what_the_switches_give() -> None:
    switches, metric = toy()
    found = whole()
    assert set(found) == set(switches.names)
    assert [r.alone_on for r in found.values()] == sorted(r.alone_on for r in found.values())
    for name in ("c1:weights", "add:activations"):
        switches.switch([name])
        outputs = predict(switches.model, metric.samples)
        assert found[name].alone_on == metric(switches.model)
        assert found[name].sqnr == pytest.approx(sqnr_db(metric.reference[0], outputs[0]))
        switches.switch([n for n in switches.names if n != name])
        assert found[name].alone_off == metric(switches.model)
        assert (found[name].bits, found[name].op) == ((4, "conv2d") if name == "c1:weights" else (8, "add"))
    switches.switch(())
    assert np.array_equal(predict(switches.model, metric.samples)[0], metric.reference[0])
    assert {r.kind for r in list(found.values())[:3]} == {"weights"}  # 4 bits hurt more than 8


def stretched(q: QuantizedGraph) -> QuantizedGraph:
    return replace(q, activations=with_scale(dict(q.activations), ["add"], 60))


def saturating(q: QuantizedGraph) -> QuantizedGraph:
    return replace(q, activations=with_scale(dict(q.activations), ["c1"], 0.01))


def coarse_logits(q: QuantizedGraph) -> QuantizedGraph:
    grid = q.activations["fc"]
    assert grid is not None
    return replace(q, activations={**q.activations, "fc": replace(grid, qmin=-1, qmax=1, zero_point=np.int32(0))})


def outlier_weight(q: QuantizedGraph) -> QuantizedGraph:
    graph = with_node(q, "dw", lambda n: n.with_weights(kernel=n.weights["kernel"])).graph
    return QuantizedGraph(graph, q.activations, with_scale(dict(q.weights), ["dw"], 12))


@pytest.mark.parametrize(
    "fault, name",
    [
        (stretched, "add:activations"),
        (outlier_weight, "dw:weights"),
        pytest.param(saturating, "c1:activations", marks=pytest.mark.slow),
        pytest.param(coarse_logits, "fc:activations", marks=pytest.mark.slow),
    ],
)
def test_a_planted_fault_is_the_worst_alone_on_and_the_best_alone_off(fault: Callable, name: str) -> None:
    switches = Switches.of(fault(toy_qgraph()))
    found = measured(switches, make_metric("kl", read_samples(X, switches.qgraph.graph), switches.model))
    assert next(iter(found)) == name
    assert min(found.values(), key=lambda r: r.sqnr) is found[name]
    assert max(found.values(), key=lambda r: r.alone_off or -np.inf) is found[name]


def spawned() -> Executor:
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


@pytest.mark.parametrize(
    "make", [lambda: ThreadPoolExecutor(2), pytest.param(spawned, marks=pytest.mark.slow)], ids=["threads", "processes"]
)
def test_the_executor_changes_nothing(make: Callable[[], Executor]) -> None:
    with make() as executor:
        found = measured(*toy(), executor=executor)
    assert list(found) == list(whole())
    for name, r in whole().items():
        other = (found[name].alone_on, found[name].alone_off, found[name].sqnr)
        assert other == pytest.approx((r.alone_on, r.alone_off, r.sqnr), rel=1e-4, abs=1e-7)


def test_a_users_function_gets_the_switched_model() -> None:
    switches, metric = toy()
    calls = []

    def count(m: Any) -> float:
        calls.append(1)
        return float(switched_on(m))

    found = measured(switches, make_metric(count, metric.samples, switches.model))
    assert len(calls) == 2 * len(switches.names)
    assert {(r.alone_on, r.alone_off) for r in found.values()} == {(1.0, len(switches.names) - 1.0)}
    for name, r in whole().items():
        assert found[name].sqnr == r.sqnr


class Interrupting:
    """A metric that is interrupted at its third call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Any) -> float:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return float(switched_on(model))


@pytest.mark.slow
def test_interrupted_work_is_resumed(tmp_path: Path) -> None:
    switches, metric = toy()
    path, function = tmp_path / "sensitivity.json", Interrupting()
    own = make_metric(function, metric.samples, switches.model)
    with pytest.raises(KeyboardInterrupt):
        measured(switches, own, checkpoint=path)
    assert len(json.loads(path.read_text())["results"]) == 2
    found = measured(switches, own, checkpoint=path)
    assert function.calls == 2 * len(switches.names) + 1  # nothing was measured twice
    assert found == measured(switches, own, checkpoint=path) and function.calls == 2 * len(switches.names) + 1
    assert not list(tmp_path.glob("*.part"))
    assert measured(switches, own) == found


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    switches, metric = toy()
    path = tmp_path / "c.json"
    measured(switches, metric, checkpoint=path, names=["c1:weights"], alone_off=False)
    with pytest.raises(ConfigError, match="of another model, grid, metric or data"):
        measured(switches, make_metric("sqnr", metric.samples, switches.model), checkpoint=path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        measured(switches, metric, checkpoint=path)


def test_the_fingerprint_tells_weights_grids_and_data_apart() -> None:
    switches, metric = toy()
    qgraph = switches.qgraph
    weights = with_node(qgraph, "fc", lambda n: n.with_weights(bias=n.weights["bias"] + np.float32(1e-6)))
    grids = replace(qgraph, activations=with_scale(dict(qgraph.activations), ["c1"], 1.001))
    data = replace(metric, samples=read_samples(X[:-1], qgraph.graph))
    prints = [fingerprint(q, metric) for q in (qgraph, weights, grids)] + [fingerprint(qgraph, data)]
    assert len(set(prints)) == 4 and fingerprint(qgraph, metric) == prints[0]


def test_budget_and_choice() -> None:
    switches, metric = toy()
    assert measured(switches, metric, budget=0.0) == {}
    some = measured(switches, metric, names=["fc:weights", "c1:activations"], alone_off=False)
    assert set(some) == {"fc:weights", "c1:activations"}
    assert all(r.alone_off is None and r.alone_on == whole()[n].alone_on for n, r in some.items())
    with pytest.raises(ConfigError, match="'fc:weight'"):
        sensitivity(switches, metric, names=["fc:weight"], progress=False)


def test_a_function_that_cannot_be_pickled_names_the_remedy() -> None:
    switches, metric = toy()
    workload = module.Workload(switches, make_metric(lambda m: 0.0, metric.samples, switches.model))
    with pytest.raises(ConfigError, match="top level of a module"):
        workload.__reduce__()


@pytest.mark.slow
def test_more_bits_cost_less() -> None:
    _, metric = toy()
    table = bits_sensitivity(toy_graph(), calibration(toy_data()), metric, (3, 8), progress=False)
    three, eight = ({f"{r.node}:{r.kind}": r for r in table[bits]} for bits in (3, 8))
    assert set(three) == set(eight)
    assert all(three[n].sqnr < eight[n].sqnr for n in three if three[n].bits < eight[n].bits)
    assert {r.bits for n, r in three.items() if n != "in:activations" and not n.startswith("sm")} == {3}
    sixteen = bits_sensitivity(toy_graph(), calibration(toy_data()), metric, (16,), progress=False)[16]
    assert {r.kind for r in sixteen} == {"activations"} and {r.bits for r in sixteen} == {16}


@pytest.mark.slow
def test_resnet20() -> None:
    """The ranking of two disjoint halves is the same, and one direction costs less than that many simulations."""
    found = rank_twice("resnet20", "w4a8", 256)
    assert max(found.passes) < 1.3 * (len(found.names[0]) + 2)
    assert found.spearman >= 0.8
