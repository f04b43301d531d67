"""Searches of a small network: budgets hold in real files, results do not depend on how they were computed."""

from __future__ import annotations

import json
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import kquant
from kquant.budget.evaluate import Workbench
from kquant.budget.result import SearchResult
from kquant.diagnosis.experiments import FileModel
from kquant.diagnosis.metrics import class_indices
from kquant_tools import search as app
from tests.support.apps import run_app


@pytest.fixture(scope="module")
def trained() -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """Classes of images that differ in small patterns; "fragile" carries all of them in small differences."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 240)
    patterns = rng.normal(size=(4, 6, 6, 2))
    x = (patterns[y] + 0.5 * rng.normal(size=(240, 6, 6, 2))).astype(np.float32)
    inputs = keras.Input((6, 6, 2))
    z = keras.layers.Conv2D(16, 3, activation="relu", name="first")(inputs)
    z = keras.layers.Conv2D(16, 1, activation="relu", name="middle")(z)
    z = keras.layers.Conv2D(16, 3, activation="relu", name="wide")(z)
    z = keras.layers.Dense(4, name="head")(keras.layers.Flatten()(z))
    model = keras.Model(inputs, z)
    model.compile(keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=6, batch_size=32, verbose=0)
    return model, x[:120], y[:120]


def limits_of(model: keras.Model, x: np.ndarray) -> list[int]:
    """Bytes of the uniform files of 4 and 8 bits."""
    configs = [{"preset": p, "prefer": "bytes"} for p in ("w4a8", "w8a8")]
    return [kquant.export_tflite(kquant.quantize_model(model, x[:32], c, progress=False)).bytes for c in configs]


@pytest.fixture(scope="module")
def halfway(trained: Any) -> int:
    low, high = limits_of(trained[0], trained[1])
    return (low + high) // 2


@pytest.fixture(scope="module")
def found(trained: Any, halfway: int) -> SearchResult:
    model, x, _ = trained
    return kquant.search(model, x, max_bytes=halfway, progress=False)


def same(a: SearchResult, b: SearchResult) -> bool:
    return a.config == b.config and a.best == b.best and a.evaluations == b.evaluations


class Dying(Executor):
    """Its second worker is gone when it should answer."""

    def __init__(self) -> None:
        self.calls = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.calls += 1
        if self.calls == 2:
            future.set_exception(OSError("worker is gone"))
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def test_the_file_of_the_config_is_within_the_budget(trained: Any, halfway: int, found: SearchResult) -> None:
    model, x, _ = trained
    again = kquant.export_tflite(kquant.quantize_model(model, x, found.config, progress=False))
    assert again.bytes == found.best.bytes <= halfway
    assert all(e.bytes <= halfway for e in found.evaluations)
    assert {e.name for e in found.evaluations} >= {"milp"} and found.config.prefer == "bytes"


def test_it_is_not_worse_than_the_uniform_config_that_fits(found: SearchResult) -> None:
    assert found.best.distance == min(e.distance for e in found.evaluations)
    assert found.best in found.front and found.layers[0].alone[4] > found.layers[0].alone[8]


@pytest.mark.slow
def test_the_same_result_by_threads_by_workers_that_die_and_again(
    trained: Any, halfway: int, found: SearchResult
) -> None:
    model, x, _ = trained
    with ThreadPoolExecutor(2) as pool:
        for executor in (pool, Dying()):
            assert same(kquant.search(model, x, max_bytes=halfway, executor=executor, progress=False), found)


@pytest.mark.slow
def test_a_stopped_search_goes_on(
    trained: Any, halfway: int, found: SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, _ = trained
    state, score, calls = tmp_path / "state.json", Workbench.score, []

    def stopped(self: Workbench, config: Any) -> Any:
        calls.append(config)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, config)

    monkeypatch.setattr(Workbench, "score", stopped)
    with pytest.raises(KeyboardInterrupt):
        kquant.search(model, x, max_bytes=halfway, progress=False, resume=state)
    assert len(json.loads(state.read_text())["results"]) == 1
    assert same(kquant.search(model, x, max_bytes=halfway, progress=False, resume=state), found)
    assert len(calls) == 1 + len(found.evaluations)
    with pytest.raises(kquant.ConfigError, match="another model"):
        kquant.search(model, x + 1, max_bytes=halfway, progress=False, resume=state)


@pytest.mark.slow
def test_the_smallest_file_within_a_drop(trained: Any) -> None:
    model, x, y = trained
    result = kquant.search(model, (x, y), "accuracy", max_drop=5.0, progress=False)
    assert result.best.score >= result.float_score - 5.0
    assert result.best.bytes < limits_of(model, x)[1]
    assert all(e.score < result.float_score - 5.0 for e in result.evaluations if e.bytes < result.best.bytes)
    with pytest.raises(kquant.ConfigError, match="max_drop=0 cannot be kept"):
        kquant.search(model, x, impossible, max_drop=0.0, progress=False)


def impossible(model: Any) -> float:
    """A metric that no file keeps."""
    return float(not isinstance(model, FileModel))


@pytest.mark.slow
def test_a_function_as_the_metric_chooses(trained: Any, halfway: int) -> None:
    model, x, y = trained

    def accuracy(m: keras.Model) -> float:
        outputs = m.predict(x[:60], verbose=0)
        return float(np.mean(np.argmax(outputs, -1) == class_indices(y[:60], outputs)))

    result = kquant.search(model, x, accuracy, max_bytes=halfway, solver="greedy", progress=False)
    assert result.best.score == max(e.score for e in result.evaluations) and result.float_score == accuracy(model)


@pytest.mark.slow
def test_latency_from_a_table_of_another_device(trained: Any) -> None:
    """A device on which int4 convolutions take forever: 8 bits stay where those would be."""
    model, x, _ = trained

    class Table(kquant.LatencyTable):
        def of(self, op: Any) -> float:
            return 1.0 if any(t is not None and t.type == "INT4" for t in op.inputs) and op.code == "CONV_2D" else 1e-3

        def total(self, content: bytes) -> float:
            from kquant.targets.litert.reader import read

            return sum(self.of(op) for op in read(content).operators)

    table = Table(device="slow", seconds={})
    result = kquant.search(model, x, max_bytes=10**9, max_latency=0.5, latencies=table, progress=False)
    bits = {layer.layer: layer.bits for layer in result.layers}
    assert bits["first"] == bits["wide"] == 8 and result.best.costs["max_latency"] < 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs a budget"),
        ({"max_bytes": 10}, "cannot be reached"),
        ({"max_bytes": -1}, "positive"),
        ({"max_drop": -1.0}, "at least 0"),
        ({"max_bytes": 10**6, "solver": "milpp"}, "did you mean 'milp'"),
        ({"max_bytes": 10**6, "effort": 0}, "effort"),
        ({"max_flash": 10**6}, "tells neither"),
        ({"max_latency": 1.0, "target": "tflm"}, "no latency"),
    ],
)
def test_what_cannot_be_searched_is_refused(trained: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(kquant.ConfigError, match=said):
        kquant.search(trained[0], trained[1], progress=False, **options)


def test_models_and_data_that_do_not_do(trained: Any) -> None:
    model, x, _ = trained
    with pytest.raises(kquant.CalibrationError, match="at least 6 samples"):
        kquant.search(model, x[:4], max_bytes=10**6, progress=False)
    with pytest.raises(kquant.ModelError, match="already quantized"):
        kquant.search(kquant.quantize_model(model, x[:8], progress=False), x, max_bytes=10**6)


def test_text_json_and_page(found: SearchResult, tmp_path: Path) -> None:
    values = json.loads(found.to_json())
    assert kquant.QuantConfig.from_dict(values["config"]) == found.config
    assert values["best"]["distance"] == found.best.distance and len(values["front"]) == len(found.front)
    assert "distance to float" in str(found)
    found.save_html(tmp_path / "s.html")
    page = (tmp_path / "s.html").read_text()
    assert "middle" in page and page.count('class="bar"') >= 4 * len(found.layers)


@pytest.mark.slow
def test_the_app(trained: Any, halfway: int, found: SearchResult, tmp_path: Path, capsys: Any) -> None:
    model, x, _ = trained
    model.save(tmp_path / "m.keras")
    np.save(tmp_path / "x.npy", x)
    paths = {"found": tmp_path / "c.yaml", "json": tmp_path / "s.json", "html": tmp_path / "s.html"}
    options = {"model": tmp_path / "m.keras", "data": tmp_path / "x.npy", "max_bytes": halfway, "progress": False}
    assert run_app(app, **options, **paths) == 0
    assert "milp within" in capsys.readouterr().out and all(p.exists() for p in paths.values())
    assert kquant.QuantConfig.load(paths["found"]).rules == found.config.rules


@pytest.mark.slow
def test_the_same_result_on_a_cluster_of_processes(trained: Any, halfway: int, found: SearchResult) -> None:
    distributed = pytest.importorskip("distributed", reason="distributed is not installed: pip install .[dev]")
    model, x, _ = trained
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            result = kquant.search(model, x, max_bytes=halfway, executor=client.get_executor(), progress=False)
    assert same(result, found)
