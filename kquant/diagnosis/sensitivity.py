"""How much each quantizer costs: alone on, and alone off.

Every measurement sets the `Switches` of one model and runs the samples through it once. They are
independent of each other, so any `concurrent.futures.Executor` can run them, and a file can hold what is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import keras
import numpy as np
from tqdm.auto import tqdm

from kquant.config.quant_config import QuantConfig
from kquant.config.specs import QuantSpec
from kquant.diagnosis.metrics import Metric
from kquant.diagnosis.records import Sensitivity
from kquant.diagnosis.samples import predict
from kquant.diagnosis.switches import Switches
from kquant.errors import ConfigError
from kquant.graph.ir import Graph
from kquant.graph.quantized import QuantizedGraph
from kquant.quantize.calibrate import quantize_graph
from kquant.quantize.data import CalibrationData
from kquant.quantize.plan import make_plan
from kquant.targets.target import get_target

ALONE_ON, ALONE_OFF = "alone on", "alone off"
Result = tuple[float, float]  # score, SQNR of the output in dB


@dataclass(frozen=True)
class Task:
    """One measurement: one quantizer on or off, all others the other way."""

    name: str
    direction: str

    @property
    def key(self) -> str:
        """Its name in a checkpoint."""
        return f"{self.direction}: {self.name}"

    def on(self, names: Sequence[str]) -> set[str]:
        """The quantizers that are on."""
        return {self.name} if self.direction == ALONE_ON else set(names) - {self.name}


class Workload:
    """A model with switches and a metric: what a worker needs for any task.

    Threads share it; pickled for another process it is the path of a file that it writes once, so the workers
    need to see this machine's folder for temporary files (TMPDIR). Every thread has a model of its own.

    Args:
        switches: those of the calling thread's model.
        metric: what is measured.
    """

    def __init__(self, switches: Switches, metric: Metric) -> None:
        self.switches, self.metric = switches, metric
        self._local = threading.local()
        self._local.switches = switches
        self._folder: Any = None

    def measure(self, task: Task) -> Result:
        """Score and SQNR: from one pass, unless the metric is a user's function, which makes its own."""
        switches = getattr(self._local, "switches", None)
        if switches is None:
            switches = self._local.switches = Switches.of(self.switches.qgraph, self.switches.target)
        switches.switch(task.on(switches.names))
        model = switches.model
        outputs = predict(model, self.metric.samples)
        score = self.metric.of_run(model, outputs)
        return score, self.metric.sqnr(outputs)

    @cached_property
    def path(self) -> str:
        """A folder with the model, and the metric, pickled."""
        try:
            metric = pickle.dumps(self.metric)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"The metric {self.metric.name!r} cannot be sent to another process: {error}. Define it at the top "
                "level of a module, or use threads."
            ) from error
        self._folder = tempfile.TemporaryDirectory(prefix="kquant-")
        folder = Path(self._folder.name)
        self.switches.model.save(folder / "model.keras")
        (folder / "metric.pickle").write_bytes(metric)
        return str(folder)

    def close(self) -> None:
        """Delete the file, if one was written."""
        if self._folder is not None:
            self._folder.cleanup()

    def __reduce__(self) -> Any:
        return _read_workload, (self.path,)


@lru_cache(maxsize=1)
def _read_workload(path: str) -> Workload:
    """The workload of a folder; a worker reads it once for all of its tasks."""
    model = keras.saving.load_model(Path(path) / "model.keras", compile=False)
    return Workload(Switches(model), pickle.loads((Path(path) / "metric.pickle").read_bytes()))


def _measure(workload: Workload, task: Task) -> Result:
    return workload.measure(task)


def sensitivity(
    switches: Switches,
    metric: Metric,
    *,
    names: Sequence[str] | None = None,
    alone_off: bool = True,
    progress: bool = True,
    executor: Executor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    budget: float | None = None,
) -> list[Sensitivity]:
    """Measure every quantizer alone on and, if wanted, alone off.

    Costs one pass over the metric's samples for each quantizer and direction; bound the samples with
    `read_samples(limit=...)`. First every quantizer is switched on alone, then off alone, the worst ones first. The
    result depends neither on the executor nor on the order in which it works.

    Args:
        switches: of the model; left all off.
        metric: from `make_metric`.
        names: quantizers to look at, all by default.
        alone_off: also measure each with all others on.
        progress: show a progress bar.
        executor: runs the measurements; processes of other machines must see this one's temporary folder.
        checkpoint: a JSON file to keep results in, replaced after each; what it holds is not measured again. So an
            interrupted call (KeyboardInterrupt) is resumed by calling again.
        budget: seconds, after which no further measurement is started. Quantizers that were not reached are left out.

    Returns:
        Worst first: by `alone_on`, equal ones by SQNR.

    Raises:
        ConfigError: a name is unknown, the checkpoint is of something else, or the metric cannot be pickled.
        ModelError: the model's output or the score is not finite.
    """
    switches.switch(names or ())
    switches.switch(())
    quantizers = [q for q in switches.quantizers if names is None or q.name in names]
    results = _Checkpoint(checkpoint, "" if checkpoint is None else fingerprint(switches.qgraph, metric))
    workload = Workload(switches, metric)
    deadline = None if budget is None else time.monotonic() + budget
    total = len(quantizers) * (2 if alone_off else 1)
    try:
        with tqdm(total=total, desc="sensitivity", unit="run", disable=not progress, leave=False) as bar:
            _run([Task(q.name, ALONE_ON) for q in quantizers], workload, results, executor, deadline, bar)
            records = _records(quantizers, results)
            if alone_off:
                tasks = [Task(f"{r.node}:{r.kind}", ALONE_OFF) for r in records]
                _run(tasks, workload, results, executor, deadline, bar)
    finally:
        switches.switch(())
        workload.close()
    return _records(quantizers, results)


def _run(
    tasks: Sequence[Task],
    workload: Workload,
    results: _Checkpoint,
    executor: Executor | None,
    deadline: float | None,
    bar: Any,
) -> None:
    """Do what is not done yet, and note every result as it comes."""
    todo = [t for t in tasks if t.key not in results.values]
    bar.update(len(tasks) - len(todo))
    for task, result in _results(todo, workload, executor, deadline):
        results.note(task.key, result)
        bar.update()


def _results(
    tasks: Sequence[Task], workload: Workload, executor: Executor | None, deadline: float | None
) -> Iterator[tuple[Task, Result]]:
    if executor is None:
        for task in tasks:
            if deadline is not None and time.monotonic() >= deadline:
                return
            yield task, workload.measure(task)
        return
    futures = {executor.submit(_measure, workload, task): task for task in tasks}
    try:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        for future in as_completed(futures, timeout=left):
            yield futures[future], future.result()
    except TimeoutError:
        return
    finally:
        for future in futures:
            future.cancel()


def _records(quantizers: Sequence[Any], results: _Checkpoint) -> list[Sensitivity]:
    records = []
    for q in quantizers:
        on, off = (results.values.get(Task(q.name, d).key) for d in (ALONE_ON, ALONE_OFF))
        if on is not None:
            facts = {"node": q.node, "layer": q.layer, "op": q.op, "kind": q.kind, "bits": q.bits}
            records.append(Sensitivity(**facts, alone_on=on[0], alone_off=off and off[0], sqnr=on[1]))
    return sorted(records, key=lambda r: (r.alone_on, r.sqnr))


class _Checkpoint:
    """Results by key, in a file where there is a path.

    Args:
        path: of the JSON file, which need not exist; None keeps results in memory.
        fingerprint: of what is measured.
    """

    def __init__(self, path: str | os.PathLike[str] | None, fingerprint: str) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint = fingerprint
        self.values: dict[str, Result] = {}
        if self.path is not None and self.path.exists():
            self.values = self._read(self.path)

    def _read(self, path: Path) -> dict[str, Result]:
        try:
            content = json.loads(path.read_text())
            found = {k: (float(a), float(b)) for k, (a, b) in content["results"].items()}
            if content["fingerprint"] == self.fingerprint:
                return found
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"The checkpoint {str(path)!r} cannot be read: {error!r}. Remove it.") from error
        raise ConfigError(
            f"The checkpoint {str(path)!r} is of another model, grid, metric or data: remove it, or name another file."
        )

    def note(self, key: str, result: Result) -> None:
        """Add a result; the file is replaced in one step."""
        self.values[key] = result
        if self.path is None:
            return
        content = {"fingerprint": self.fingerprint, "results": self.values}
        temporary = self.path.with_name(self.path.name + ".part")
        temporary.write_text(json.dumps(content, indent=1))
        os.replace(temporary, self.path)


def fingerprint(qgraph: QuantizedGraph, metric: Metric) -> str:
    """A hash of weights, grids, metric and samples."""
    found = hashlib.blake2b(digest_size=16)

    def take(*values: Any) -> None:
        for value in values:
            array = np.ascontiguousarray(value)
            found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())

    for node in qgraph.graph:
        found.update(f"{node.name} {node.op} {node.inputs} {sorted(node.attrs.items())}".encode())
        take(*node.weights.values())
        for q in (qgraph.weights.get(node.name), qgraph.activations.get(node.name)):
            if q is not None:
                take(q.scale, q.zero_point, q.qmin, q.qmax)
    found.update(metric.name.encode())
    for batch in metric.samples:
        take(*batch)
    take(*metric.reference, *metric.samples.flat_labels)
    return found.hexdigest()


def bits_sensitivity(
    graph: Graph,
    data: CalibrationData,
    metric: Metric,
    bits: Sequence[int] = (4, 8),
    *,
    config: QuantConfig | str | Mapping[str, Any] = "w8a8",
    kinds: Sequence[str] = ("weights", "activations"),
    progress: bool = True,
    **options: Any,
) -> dict[int, list[Sensitivity]]:
    """Every quantizer alone on at several bit widths: a table bits x layer.

    Weights take at most 8 bits, so above that only activations are measured; fixed grids (softmax ...) have the
    bits of their container. Nothing but ranges and rounding to nearest is applied: no equalization, no correction.

    Args:
        graph: the float graph, prepared (`transforms.prepare_graph`), perhaps equalized.
        data: calibration data.
        metric: from `make_metric`.
        bits: the widths.
        config: range methods and granularity; its rules may still change bits.
        kinds: "weights", "activations", or both.
        progress: show progress bars.
        options: `executor`, `budget` of `sensitivity`.

    Returns:
        bits -> records, worst first.
    """
    chosen, table = QuantConfig.load(config), {}
    for width in bits:
        plan = make_plan(graph, _at_bits(chosen, width))
        switches = Switches.of(quantize_graph(plan, data, progress), plan.target)
        names = [q.name for q in switches.quantizers if q.kind in kinds and not (q.kind == "weights" and width > 8)]
        table[width] = sensitivity(switches, metric, names=names, alone_off=False, progress=progress, **options)
    return table


def _at_bits(config: QuantConfig, bits: int) -> QuantConfig:
    """A config with all widths changed, for the simulation."""

    def changed(spec: QuantSpec | None, most: int) -> QuantSpec | None:
        width = min(bits, most)
        return spec and replace(spec, bits=width, symmetric=spec.symmetric or width > 8)

    target = config.target if bits <= 8 else get_target("simulation").name
    weights, activations = changed(config.weights, 8), changed(config.activations, 16)
    return replace(config, weights=weights, activations=activations, inputs=None, target=target)
