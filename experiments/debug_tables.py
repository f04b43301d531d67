"""The tables about the debugger: what it recommends, and whether its ranking of layers is stable."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import kquant
from kquant.diagnosis.metrics import make_metric
from kquant.diagnosis.samples import predict, read_samples
from kquant.diagnosis.sensitivity import sensitivity
from kquant.diagnosis.switches import Switches

from . import zoo
from .tables import OFF, Options, Table

PRESET = "w8a8-per_tensor"
DIAGNOSED, RANKED = 300, 256  # samples, unless the command line says otherwise


def diagnosis(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """One scale per weight tensor, every step off: who is blamed, and what the recommended config comes to."""
    model, real, data = zoo.load_model(name), zoo.MODELS[name], zoo.calibration(name)
    config = {"preset": PRESET, **OFF}
    few = real.evaluation(options.samples or DIAGNOSED)
    d = kquant.diagnose(model, few, config=config, calibration_data=data)
    batches = real.evaluation(None)

    def on_target(chosen: Any) -> float | str:
        if chosen is None:
            return "-"
        return zoo.top1(kquant.export_tflite(kquant.quantize_model(model, data, chosen)).content, batches)[0]

    kinds = "; ".join(f"{f.kind.replace('_', ' ')}: {', '.join(f.nodes[:3])} ({len(f.nodes)})" for f in d.findings)
    changes = ", ".join(k for k, v in (d.recommendation or {}).items() if v is True) or "-"
    yield (
        *(name, d.samples, d.float_score, d.target_score, d.culprit, kinds, changes),
        *(zoo.float_top1(model, batches), *map(on_target, (config, d.recommendation, PRESET)), f"{d.seconds:.0f}"),
    )


@dataclass(frozen=True)
class Ranking:
    """Two rankings of all quantizers, alone on, on disjoint halves of the samples.

    Attributes:
        names: quantizers, worst first, of each half.
        passes: seconds of a half in plain evaluations of the simulation on it.
    """

    names: tuple[list[str], list[str]]
    passes: tuple[float, float]

    @property
    def spearman(self) -> float:
        """Spearman's rank correlation of the two."""
        first, second = self.names
        return float(np.corrcoef(np.arange(len(first)), [second.index(n) for n in first])[0, 1])


def rank_twice(name: str, config: str, samples: int) -> Ranking:
    """Rank the quantizers of a preset by KL divergence from the float model, on two halves of evaluation samples."""
    qmodel = kquant.quantize_model(zoo.load_model(name), zoo.calibration(name, 200), config, progress=False)
    switches = Switches.of(qmodel)
    x = np.concatenate([x for x, _ in zoo.MODELS[name].evaluation(samples)])
    names, passes = [], []
    for half in (x[::2], x[1::2]):
        data = read_samples(half, switches.qgraph.graph, batch_size=64)
        metric = make_metric("kl", data, switches.model)
        for compiled in (qmodel, switches.model):
            predict(compiled, read_samples(half[:64], switches.qgraph.graph, batch_size=64))
        started = time.perf_counter()
        predict(qmodel, data)
        middle = time.perf_counter()
        found = sensitivity(switches, metric, alone_off=False)
        passes.append((time.perf_counter() - middle) / (middle - started))
        names.append([f"{r.node}:{r.kind}" for r in found])
    return Ranking((names[0], names[1]), (passes[0], passes[1]))


def stability(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """How alike the rankings of two halves of the samples are, and what one costs."""
    samples = options.samples or RANKED
    for config in options.configs:
        found = rank_twice(name, config, samples)
        first, second = (set(names[:10]) for names in found.names)
        count = len(found.names[0])
        yield (
            *(name, config, f"2 x {samples // 2}", count, found.spearman, f"{len(first & second)} of 10"),
            *(f"{max(found.passes):.0f}", f"{1.3 * (count + 2):.0f}"),
        )


TABLES = {
    "diagnosis": Table(
        diagnosis,
        ("model", "samples", "float", "steps off", "culprit", "findings (layers)", "recommended")
        + ("float, all samples", "steps off, all samples", "recommended .tflite", "pipeline .tflite", "seconds"),
    ),
    "sensitivity": Table(
        stability,
        ("model", "config", "samples", "quantizers", "Spearman", "same among the worst 10")
        + ("cost in simulations", "allowed"),
        ("model", "config"),
    ),
}
