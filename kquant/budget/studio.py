"""The state of a search: the network, its sensitivities, what files cost, and what was evaluated."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from tqdm.auto import tqdm

from kquant.budget.drafts import BYTES, FLASH, Drafts, cost_tables, costs_of, fits
from kquant.budget.evaluate import Journal, Workbench, score_all
from kquant.budget.groups import Bits, config_of, groups_of, uniform
from kquant.budget.latency import LatencyTable
from kquant.budget.passes import Passes, at_solution, sensitivities
from kquant.budget.result import Evaluation
from kquant.budget.rounded import rounded_layers
from kquant.budget.solvers import SOLVERS, Problem, Task, check_reachable, separable
from kquant.config.quant_config import QuantConfig
from kquant.diagnosis.metrics import Metric, make_metric
from kquant.diagnosis.samples import Samples, read_samples
from kquant.errors import CalibrationError, ConfigError, ModelError
from kquant.graph.ir import Graph
from kquant.graph.transforms import prepare_graph
from kquant.quantize.data import CalibrationData
from kquant.targets.target import get_target

LIMIT = 3072  # samples that are read, at most
HELD = 3  # one of so many is held out
_WORK = 5e9  # multiplications of a forward pass, about
_FEWEST, _MOST = 32, 128  # samples of a forward pass
_TRIES, _FILES = 8, 3  # at keeping a budget that drafts, and files, exceed


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `search` was asked for, beside the model, the data and the metric."""

    base: QuantConfig
    limits: Mapping[str, float]
    latencies: LatencyTable | None
    solver: str
    executor: Executor | None
    seed: int
    progress: bool
    resume: str | os.PathLike[str] | None
    effort: int


class Studio:
    """Everything that the strategies of `search` work with; a context, which cleans up behind itself.

    Args:
        model: the float model.
        data: see `search`.
        metric: likewise.
        settings: likewise.

    Attributes:
        groups: what bits are chosen for.
        problem: distances and costs of every choice.
        passes: forward passes.
        metric: of the held-out samples; `float_score` is that of the float model.
        by_score: choose by the metric, and not by the distance.
        objective: what `max_drop` makes small.
        evaluations: all that were made, in order.
    """

    def __init__(self, model: keras.Model, data: Any, metric: Any, settings: Settings) -> None:
        self._settings, base, seed = settings, settings.base, settings.seed
        self.by_score = metric is not None
        graph = prepare_graph(model)
        calibration, held = split(read_samples(data, graph, limit=LIMIT))
        arrays = {n: np.concatenate(c) for n, c in zip(held.names, zip(*calibration, strict=True), strict=True)}
        self.metric = make_metric(metric or ("accuracy" if held.labels is not None else "kl"), held, model)
        self.float_score = self.metric.of_run(model, self.metric.reference)
        self.bench = Workbench(model, arrays, self.metric, seed)
        names = zip(graph.inputs, graph.input_names, strict=True)
        specs = [(name, graph[node].shape, graph[node].dtype) for node, name in names]
        calibrated = CalibrationData(dict(arrays) if len(arrays) > 1 else next(iter(arrays.values())), specs)
        self.objective = FLASH if FLASH in settings.limits else BYTES
        self.drafts = Drafts(graph, base, calibrated, tuple(settings.limits), settings.latencies)
        plan, _ = self.drafts.plan(base)
        self.groups = groups_of(plan)
        if not any(len(g.bits) > 1 for g in self.groups):
            raise ModelError(f"{model.name!r} has no layer whose weights could have other bits on {base.target}.")
        tables, rest = cost_tables(self.drafts, self.groups)
        rounded = rounded_layers(plan, self.groups, calibrated, seed=seed, progress=settings.progress)
        self.passes = Passes(plan.graph, self.groups, rounded, _few(calibration, sum(g.macs for g in self.groups)))
        self.problem = Problem(groups=self.groups, loss=sensitivities(self.passes), costs=tables, rest=rest)
        self.evaluations: list[Evaluation] = []
        self._journal = Journal(settings.resume, _fingerprint(plan.graph, base, arrays, self.metric, seed))

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        self.bench.close()

    def config(self, bits: Bits) -> QuantConfig:
        """The config that gives the groups these bits."""
        return config_of(self._settings.base, self.groups, bits)

    def within(self, limits: Mapping[str, float]) -> list[Evaluation]:
        """What the solver finds within limits, the exact solution of the separable part, and the uniform config."""
        own = self._drafted(limits)
        candidates = {own: self._settings.solver}
        simple = self._drafted(limits, lambda allowed: separable(self.problem, allowed))
        candidates.setdefault(simple, "separable")
        for width in sorted({b for g in self.groups for b in g.bits}, reverse=True):
            bits = uniform(self.groups, width)
            if fits(self._draft_costs(bits), limits):
                candidates.setdefault(bits, "uniform")
                break
        found = self._evaluated(candidates)
        kept = [e for e in found if fits(e.costs, limits)]
        if not any(e.bits == own for e in kept):
            kept += self._kept(limits, found[0])
        if not kept:
            raise ConfigError(f"No file that was made keeps all budgets {dict(limits)}: raise one of them.")
        return kept

    def most(self, limits: Mapping[str, float]) -> list[Evaluation]:
        """The config of the most bits, or what fits the limits."""
        bits = tuple(g.bits[-1] for g in self.groups)
        if not limits or fits(self._draft_costs(bits), limits):
            return [e for e in self._evaluated({bits: "most bits"}) if fits(e.costs, limits)]
        return self.within(limits)

    def at(self, limits: Sequence[Mapping[str, float]]) -> list[Evaluation | None]:
        """What the solver finds within each of several limits; None where nothing fits."""
        chosen: list[Bits | None] = []
        for each in limits:
            try:
                chosen.append(self._drafted(each))
            except ConfigError:
                chosen.append(None)
        found = {e.bits: e for e in self._evaluated({b: self._settings.solver for b in chosen if b is not None})}
        pairs = zip(chosen, limits, strict=True)
        return [found[b] if b is not None and fits(found[b].costs, each) else None for b, each in pairs]

    def _solve(self, allowed: Mapping[str, float]) -> Bits:
        task = Task(
            problem=self.problem,
            limits=allowed,
            measure=self.passes.distance,
            refine=self._refined,
            rng=np.random.default_rng(self._settings.seed),
            effort=self._settings.effort,
        )
        return SOLVERS[self._settings.solver](task)

    def _refined(self, bits: Bits) -> list[np.ndarray]:
        return at_solution(self.passes, bits, self.problem.loss)

    def _drafted(self, limits: Mapping[str, float], solve: Any = None) -> Bits:
        """A choice whose draft keeps the limits: where it does not, the solver is given less."""
        check_reachable(self.problem, limits)
        allowed = dict(limits)
        for _ in range(_TRIES):
            bits = (solve or self._solve)(allowed)
            costs = self._draft_costs(bits)
            if fits(costs, limits):
                return bits
            for name, limit in limits.items():
                allowed[name] -= 1.05 * max(0.0, costs[name] - limit)
        raise ConfigError(f"No choice of bits keeps all budgets {dict(limits)} in a file: raise one of them.")

    def _draft_costs(self, bits: Bits) -> Mapping[str, float]:
        return self.drafts.costs(self.drafts.content(self.config(bits)))

    def _kept(self, limits: Mapping[str, float], made: Evaluation) -> list[Evaluation]:
        """A choice whose real file keeps the limits, where drafts promised too much for the one that was made."""
        allowed = dict(limits)
        for _ in range(_FILES):
            for name, limit in limits.items():
                allowed[name] -= 1.5 * max(0.0, made.costs[name] - limit)
            try:
                (made,) = self._evaluated({self._drafted(allowed): self._settings.solver})
            except ConfigError:
                break
            if fits(made.costs, limits):
                return [made]
        return []

    def _evaluated(self, candidates: Mapping[Bits, str]) -> list[Evaluation]:
        """The evaluations of choices, made or known."""
        done = {e.bits for e in self.evaluations}
        keys = {b: json.dumps(b) for b in candidates if b not in done}
        self._measure([b for b in keys if keys[b] not in self._journal.values])
        for bits, key in keys.items():
            rounded, known = self.passes.distance(bits), self._journal.values[key]
            self.evaluations.append(Evaluation(name=candidates[bits], bits=bits, weights_alone=rounded, **known))
        found = {e.bits: e for e in self.evaluations}
        return [found[b] for b in candidates]

    def _measure(self, todo: Sequence[Bits]) -> None:
        """Quantize and score, all at once where an executor does it."""
        executor = self._settings.executor
        step = 1 if executor is None else max(1, len(todo))
        show = self._settings.progress
        with tqdm(total=len(todo), desc="files", unit="file", disable=not show, leave=False) as bar:
            for k in range(0, len(todo), step):
                part = todo[k : k + step]
                for bits, scored in zip(part, score_all(self.bench, [*map(self.config, part)], executor), strict=True):
                    known = {"costs": self._costs(scored.content), "score": scored.score, "distance": scored.distance}
                    self._journal.note(json.dumps(bits), known)
                    bar.update()

    def _costs(self, content: bytes) -> dict[str, float]:
        return costs_of(content, get_target(self._settings.base.target), self.drafts.resources, self.drafts.latencies)


def best_of(found: Sequence[Evaluation], by_score: bool) -> Evaluation:
    """The evaluation of the best score, or of the least distance to the float network."""
    return min(found, key=lambda e: (-e.score if by_score else 0.0, e.distance, e.bytes))


def split(samples: Samples) -> tuple[list[tuple[np.ndarray, ...]], Samples]:
    """Batches to calibrate with, and samples that are held out: one of `HELD`, spread evenly."""
    count = len(samples)
    if count < 2 * HELD:
        raise CalibrationError(f"search needs at least {2 * HELD} samples, found {count}; pass a few hundred.")
    held = np.arange(count) % HELD == HELD - 1
    return list(samples.chosen(~held).batches), samples.chosen(held)


def _few(batches: Sequence[tuple[np.ndarray, ...]], macs: int) -> list[tuple[np.ndarray, ...]]:
    """The first samples, as many as a forward pass should take."""
    count = int(np.clip(_WORK / max(1, macs), _FEWEST, _MOST))
    arrays = [np.concatenate(column)[:count] for column in zip(*batches, strict=True)]
    return [tuple(arrays)]


def _fingerprint(graph: Graph, base: QuantConfig, arrays: Mapping[str, np.ndarray], metric: Metric, seed: int) -> str:
    """A hash of everything that an evaluation depends on."""
    found = hashlib.blake2b(digest_size=16)
    found.update(json.dumps([base.to_dict(), metric.name, seed], sort_keys=True).encode())
    values = [w for node in graph for w in node.weights.values()]
    labelled = metric.samples.flat_labels
    for value in (*values, *arrays.values(), *(x for batch in metric.samples for x in batch), *labelled):
        array = np.ascontiguousarray(value)
        found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return found.hexdigest()
