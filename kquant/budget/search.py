"""`search`: bits where they matter, within budgets that real files keep."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from kquant.budget.drafts import ARENA, BYTES, FLASH, LATENCY
from kquant.budget.latency import LatencyTable
from kquant.budget.result import Evaluation, LayerBits, SearchResult
from kquant.budget.solvers import SOLVERS
from kquant.budget.studio import Settings, Studio, best_of
from kquant.config.quant_config import QuantConfig
from kquant.config.text import suggest
from kquant.errors import ConfigError, ModelError
from kquant.keras.model import QuantizedModel

_ROUNDS, _POINTS = 3, 2  # of looking for the smallest file within a drop: sizes tried in each round


def search(
    model: keras.Model,
    data: Any,
    metric: Any = None,
    *,
    config: QuantConfig | str | os.PathLike[str] | Mapping[str, Any] = "w8a8",
    max_bytes: float | None = None,
    max_latency: float | None = None,
    max_arena: float | None = None,
    max_flash: float | None = None,
    max_drop: float | None = None,
    target: str = "litert",
    solver: str = "milp",
    executor: Executor | None = None,
    seed: int = 0,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    latencies: LatencyTable | None = None,
    effort: int = 2,
) -> SearchResult:
    """The bits of every layer's weights with which a model keeps most of its accuracy within budgets.

    How far the outputs move with each layer at each number of bits comes from second moments and few forward passes on
    unlabelled samples; what files cost, from drafts of them. The solver chooses. Its choices, and the uniform config
    that fits, are quantized for real (with AdaRound, where the config says no other), and their files are scored on a
    third of the data, which quantization does not see. The best file that was really measured is returned; no budget
    is ever exceeded.

    Args:
        model: a float model, as for `quantize_model`.
        data: a few hundred representative samples, with labels or without, as for `quantize_model`.
        metric: what counts: None, "accuracy", "agreement", "sqnr", "kl", a Keras metric, or a function
            (model) -> float; higher is better. None reports accuracy (without labels -KL to the float model) and
            chooses by the distance to the float outputs, which a few samples tell apart better.
        config: what else is asked for; its weights' bits are what the search changes.
        max_bytes: of the .tflite file.
        max_latency: seconds of one inference on LiteRT, by the table of latencies.
        max_arena: bytes of the arena of TensorFlow Lite Micro, or of the SRAM that Vela reports.
        max_flash: bytes of flash, as the target's device counts them.
        max_drop: how much of the metric may be lost against the float model, in its own units: the smallest such file
            is looked for.
        target: what the files are for; the config's, where that names another and this is "litert".
        solver: "milp", "greedy" or "evolution".
        executor: runs the evaluations of files; any `concurrent.futures.Executor`, or a Dask client's.
        seed: the same model, data, config and seed give the same result.
        progress: show progress bars.
        resume: a JSON file to keep evaluations in; a call that was stopped goes on from it.
        latencies: a table of another device; by default this machine is measured.
        effort: how many rounds of forward passes the solver may make.

    Returns:
        A record whose `config` goes to `quantize_model` or `prepare_qat`.

    Raises:
        ConfigError: no budget, one that cannot be reached, an unknown solver, or a target that cannot tell a cost.
        ModelError: the model is quantized already, or has no layer to choose for.
        CalibrationError: the data does not fit, or is too little.
    """
    start = time.perf_counter()
    given = {BYTES: max_bytes, LATENCY: max_latency, ARENA: max_arena, FLASH: max_flash}
    limits = {name: float(value) for name, value in given.items() if value is not None}
    _check(model, limits, max_drop, solver, effort)
    base = QuantConfig.load(config)
    base = replace(base, target=base.target if target == "litert" else target, prefer=base.prefer or "bytes")
    settings = Settings(
        base=base,
        limits=limits,
        latencies=latencies,
        solver=solver,
        executor=executor,
        seed=seed,
        progress=progress,
        resume=resume,
        effort=effort,
    )
    with Studio(model, data, metric, settings) as studio:
        if max_drop is None:
            found = studio.within(limits)
        else:
            found = _smallest(studio, limits, max_drop)
        best = best_of(found, studio.by_score)
        if max_drop is not None:
            best = min(found, key=lambda e: (e.costs[studio.objective], -e.score))
        return SearchResult(
            config=studio.config(best.bits),
            best=best,
            evaluations=tuple(studio.evaluations),
            layers=_layers(studio, best),
            budgets=limits | ({} if max_drop is None else {"max_drop": max_drop}),
            metric=studio.metric.name,
            float_score=studio.float_score,
            solver=solver,
            passes=studio.passes.count,
            seconds=time.perf_counter() - start,
        )


def _layers(studio: Studio, best: Evaluation) -> tuple[LayerBits, ...]:
    """What the best config gives each layer."""
    return tuple(
        LayerBits(
            layer=g.layer,
            bits=b,
            weights=g.size,
            macs=g.macs,
            alone={n: float(v) for n, v in zip(g.bits, loss, strict=True)},
        )
        for g, b, loss in zip(studio.groups, best.bits, studio.problem.loss, strict=True)
    )


def _check(model: keras.Model, limits: Mapping[str, float], max_drop: float | None, solver: str, effort: int) -> None:
    if isinstance(model, QuantizedModel):
        raise ModelError(f"{model.name!r} is already quantized: pass the float model that it was made from.")
    if not limits and max_drop is None:
        raise ConfigError("search needs a budget: max_bytes, max_latency, max_arena or max_flash, or max_drop.")
    for name, value in limits.items():
        if not value > 0:
            raise ConfigError(f"{name} must be a positive number, found {value!r}.")
    if max_drop is not None and not max_drop >= 0:
        raise ConfigError(f"max_drop must be a number of at least 0, found {max_drop!r}.")
    if solver not in SOLVERS:
        raise ConfigError(f"Unknown solver {solver!r}{suggest(solver, SOLVERS)}; known are {', '.join(SOLVERS)}.")
    if effort < 1:
        raise ConfigError(f"effort must be an integer of at least 1, found {effort!r}.")


def _smallest(studio: Studio, limits: Mapping[str, float], max_drop: float) -> list[Evaluation]:
    """Evaluations within the limits and the drop; sizes between the least and the most are tried, by sections.

    Raises:
        ConfigError: even with the most bits that fit, more than the drop is lost.
    """
    resource, allowed = studio.objective, studio.float_score - max_drop
    good = [e for e in studio.most(limits) if e.score >= allowed]
    if not good:
        lost = studio.float_score - max(e.score for e in studio.evaluations)
        raise ConfigError(
            f"max_drop={max_drop:g} cannot be kept: the best config within the other budgets loses {lost:.3g} "
            f"({studio.metric.name}). Allow more, or see kquant.diagnose for what else costs accuracy."
        )
    low, high = studio.problem.least(resource), min(e.costs[resource] for e in good)
    for _ in range(_ROUNDS):
        points = [float(x) for x in np.linspace(low, high, _POINTS + 2)[1:-1]]
        tried = studio.at([{**limits, resource: point} for point in points])
        for point, evaluation in zip(points, tried, strict=True):
            if evaluation is not None and evaluation.score >= allowed:
                good.append(evaluation)
                high = min(high, point)
                break
            low = point
    return good
