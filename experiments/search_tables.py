"""What files take on LiteRT, and what the search of bits finds: the tables latency and search.

latency: files of presets and preferences on one thread; "by operators" is the sum of one-operator files, which
`kquant.profile` keeps. Files of one model are timed in turns, so that what else the machine does falls on all of them.
search: at equal budgets the uniform config that fits and every solver. Distances are KL divergences from the float
outputs on samples that were held out: "weights" of the float network with rounded weights, "file" of the .tflite file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

import kquant
from kquant.budget.latency import measured
from kquant.targets.litert.timing import seconds

from . import zoo
from .tables import Options, Table

ROUNDS = 5  # of timing all files of a model
PREFERENCES = (None, "bytes", "latency")
SHARES = {"halfway": None, "w4a8": 1.0, "80 % of w4a8": 0.8}
SOLVERS = ("milp", "greedy", "evolution")


def latency(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """The time of every preset and preference."""
    model, data = zoo.load_model(name), zoo.calibration(name, options.calibration)
    files: dict[tuple[str, str], bytes] = {}
    for preset in options.configs:
        for prefer in PREFERENCES if int(preset[1]) < 8 else (None,):
            qmodel = kquant.quantize_model(model, data, {"preset": preset, "prefer": prefer}, progress=False)
            files[preset, prefer or "default"] = kquant.export_tflite(qmodel).content
    times = {key: [seconds(content) for _ in range(1)] for key, content in files.items()}
    for _ in range(ROUNDS - 1):
        for key, content in files.items():
            times[key].append(seconds(content))
    table = measured(files.values())
    first = min(next(iter(times.values())))
    batches = zoo.record(name).evaluation(options.samples)
    for (preset, prefer), content in files.items():
        whole, summed = min(times[preset, prefer]), table.total(content)
        yield (
            *(name, preset, prefer, len(content), f"{1e3 * whole:.3f}", f"{1e3 * summed:.3f}"),
            *(f"{summed / whole:.3f}", f"{whole / first:.2f}", *zoo.top1(content, batches)),
        )


def search(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """Every solver at every budget, beside the uniform config."""
    model, data = zoo.load_model(name), zoo.calibration(name, options.calibration)
    sizes = {p: _bytes(model, data, p) for p in ("w8a8", "w4a8")}
    for budget, share in SHARES.items():
        most = (sizes["w8a8"] + sizes["w4a8"]) // 2 if share is None else int(share * sizes["w4a8"])
        for solver in (s for s in SOLVERS if options.wants(f"{budget}, {s}")):
            start = time.perf_counter()
            try:
                result = kquant.search(model, data, max_bytes=most, solver=solver, progress=False)
            except kquant.ConfigError:
                yield name, budget, solver, most, *("",) * 10
                continue
            took = time.perf_counter() - start
            found, plain = result.best, _uniform(result)
            ratios = [f"{a / b:.2f}" if plain and b else "" for a, b in _pairs(found, plain)]
            yield (
                *(name, budget, solver, most, found.bytes, plain.bytes if plain else ""),
                *(f"{found.weights_alone:.5f}", ratios[0], f"{found.distance:.5f}", ratios[1]),
                *(_top1(name, model, data, result.config, options), _uniform_top1(name, model, data, plain, options)),
                *(result.passes, f"{took:.0f}"),
            )


def _bytes(model: keras.Model, data: Any, preset: str) -> int:
    """Bytes of a preset's file, as small as it gets."""
    config = {"preset": preset, "prefer": "bytes"}
    return kquant.export_tflite(kquant.quantize_model(model, data, config, progress=False)).bytes


def _uniform(result: kquant.SearchResult) -> Any:
    """The evaluation of the same bits for all layers, as far as they may have them; None where none fits."""
    return next((e for e in result.evaluations if e.name == "uniform" or len(set(e.bits)) == 1), None)


def _pairs(found: Any, plain: Any) -> list[tuple[float, float]]:
    if plain is None:
        return [(0.0, 0.0)] * 2
    return [(found.weights_alone, plain.weights_alone), (found.distance, plain.distance)]


def _top1(name: str, model: keras.Model, data: Any, config: kquant.QuantConfig, options: Options) -> str:
    content = kquant.export_tflite(kquant.quantize_model(model, data, config, progress=False)).content
    return f"{zoo.top1(content, zoo.record(name).evaluation(options.samples))[0]:.2f}"


def _uniform_top1(name: str, model: keras.Model, data: Any, plain: Any, options: Options) -> str:
    if plain is None:
        return ""
    preset = f"w{max(set(plain.bits), key=plain.bits.count)}a8"
    config = kquant.QuantConfig.load({"preset": preset, "prefer": "bytes"})
    return _top1(name, model, data, config, options)


TABLES: Mapping[str, Table] = {
    "latency": Table(
        latency,
        ("model", "preset", "prefer", "bytes", "ms", "ms by operators", "ratio", "to the first preset", "top-1")
        + ("samples",),
        ("model", "preset", "prefer"),
    ),
    "search": Table(
        search,
        ("model", "budget", "solver", "max_bytes", "bytes", "uniform bytes", "weights", "to uniform", "file")
        + ("file to uniform", "top-1", "uniform top-1", "passes", "seconds"),
        ("model", "budget", "solver"),
    ),
}
