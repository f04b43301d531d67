"""Tables 1 to 6 of the white paper (Nagel et al. 2021, arXiv 2106.08295), section 3, on the models of `zoo`.

1 ranges of weights, 2 ranges of activations, 3 equalization and absorption, 4 bias correction, 5 AdaRound, 6 the whole
pipeline. Cells are top-1 in percent of the exported file: in integers where activations are quantized, else in float
on the quantized weights; of the simulation where activations alone are quantized, which no file can hold.
Whatever a table does not vary is that of the presets, and all its steps are switched off.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import keras
import numpy as np

import kquant
from kquant.config.quant_config import QuantConfig
from kquant.config.specs import WEIGHT_METHODS, AdaRound
from kquant.graph.ir import Graph
from kquant.graph.ops import op_of
from kquant.graph.transforms import prepare_graph
from kquant.graph.transforms.absorb_bias import absorb_bias
from kquant.graph.transforms.equalize import equalize
from kquant.keras.model import extract, insert
from kquant.quantize.bias_correction import round_kernel
from kquant.quantize.calibrate import smallest_outputs
from kquant.quantize.data import CalibrationData
from kquant.quantize.pipeline import quantize_after_training
from kquant.targets.litert.writer import write_tflite

from . import zoo
from .tables import OFF, Options, Table

BITS = (8, 6, 4)
GRANULARITY = {"per tensor": "-per_tensor", "per channel": ""}  # suffix of the preset
LOGITS = {"position": "last", "activations": {"method": "cross_entropy"}}  # whether or not a softmax follows
FLOAT = {"weights": None, "activations": None, "target": "simulation", **OFF}


@dataclass(frozen=True, eq=False)
class Case:
    """A model with its data.

    Attributes:
        name: key of `zoo.MODELS`.
        batches: what is scored, (inputs, labels): read once for all cells, less than a GB.
        model: the float model.
        graph: its graph, batch normalization folded and activations fused.
        top1: of the float model, in percent.
        scores: digest of a file -> its score; some variants of a table are the same network.
    """

    name: str
    batches: Sequence[Any]
    model: keras.Model
    graph: Graph
    top1: float
    scores: dict[bytes, float] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, options: Options) -> Case:
        model, batches = zoo.load_model(name), list(zoo.MODELS[name].evaluation(options.samples))
        return cls(name, batches, model, prepare_graph(model), zoo.float_top1(model, batches))

    @property
    def seen(self) -> int:
        """Number of evaluation samples."""
        return sum(len(y) for _, y in self.batches)

    @property
    def has_statistics(self) -> bool:
        """Whether batch normalizations tell how activations are distributed."""
        return any(node.stats for node in self.graph)

    def data(self, seed: int | None = None) -> CalibrationData:
        """The calibration set of the record, or one of `subset`."""
        source = zoo.calibration(self.name) if seed is None else subset(self.name, seed)
        return CalibrationData(source, [(i, self.graph[i].shape, self.graph[i].dtype) for i in self.graph.inputs])

    def score(self, model: kquant.QuantizedModel) -> float:
        """Top-1 of the exported file, or of the simulation where only activations are quantized."""
        weights, activations = (getattr(model.quantization.config, k) is not None for k in ("weights", "activations"))
        if activations and not weights:
            return zoo.float_top1(model, self.batches)
        content = kquant.export_tflite(model).content if activations else rounded_file(model)
        digest = hashlib.sha256(content).digest()
        if digest not in self.scores:
            self.scores[digest] = zoo.top1(content, self.batches)[0]
        return self.scores[digest]


def rounded_file(model: kquant.QuantizedModel) -> bytes:
    """A float32 file with the weights rounded to their grids: what "weight_only" computes, several times as fast."""
    qgraph = extract(model)
    nodes = [round_kernel(n, q) if (q := qgraph.weights.get(n.name)) is not None else n for n in qgraph.graph]
    return write_tflite(replace(qgraph, graph=qgraph.graph.rebuild(nodes)), mode="float32")[0]


def quantized(
    graph: Graph, config: Mapping[str, Any], data: CalibrationData | None, seed: int = 0
) -> kquant.QuantizedModel:
    """As `kquant.quantize_model`, from a graph that was transformed before."""
    settings = QuantConfig.load(config)
    return insert(*quantize_after_training(graph, settings, data, seed=seed, progress=False)[:2])


def subset(name: str, seed: int) -> np.ndarray:
    """Calibration samples drawn at random: half of twice as many as the record has (or of all there are)."""
    pool = zoo.MODELS[name].calibration(2 * zoo.MODELS[name].calibration_size)
    batches = [pool] if isinstance(pool, np.ndarray) else pool
    rng = np.random.default_rng(seed)
    return np.concatenate([b[np.sort(rng.permutation(len(b))[: len(b) // 2])] for b in batches])


def spread(values: Sequence[float]) -> float | str:
    """Mean and half the range of repeated measurements; a single one as it is."""
    if len(values) == 1:
        return values[0]
    return f"{np.mean(values):.2f} ± {(max(values) - min(values)) / 2:.2f}"


def weight_ranges(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """Table 1: weights rounded to nearest, activations float."""
    case = Case.of(name, options)
    for granularity, suffix in GRANULARITY.items():
        for method in WEIGHT_METHODS:
            if options.wants(variant := f"{method}, {granularity}"):
                configs = [{"preset": f"w{b}{suffix}", "weights": {"method": method}, **OFF} for b in BITS]
                scores = [case.score(quantized(case.graph, c, None)) for c in configs]
                yield name, variant, case.seen, case.top1, *scores


def activation_ranges(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """Table 2: activations (the input at 8 bits), weights float."""
    case = Case.of(name, options)
    variants: dict[str, dict[str, Any]] = {
        "min_max": {"activations": {"method": "min_max"}, "logits": None},
        "mse": {"activations": {"method": "mse"}, "logits": None},
        "mse, cross_entropy for logits": {"activations": {"method": "mse"}, "rules": [LOGITS], "logits": None},
    }
    if case.has_statistics:
        variants["batch_norm"] = {"inputs": {"range": _input_range(case)}, "logits": None}
    for variant, changes in variants.items():
        if options.wants(variant):
            configs = [{"preset": f"a{b}", **OFF, **changes} for b in BITS]
            data = None if variant == "batch_norm" else case.data()
            yield name, variant, case.seen, case.top1, *(case.score(quantized(case.graph, c, data)) for c in configs)


def _input_range(case: Case) -> tuple[float, float]:
    """What preprocessing makes of an input, which batch normalization cannot know."""
    extremes = [(float(x.min()), float(x.max())) for (x,) in case.data()]
    return min(e[0] for e in extremes), max(e[1] for e in extremes)


Transform = Callable[[Graph], Graph]


def _equalized(graph: Graph, **settings: Any) -> Graph:
    return equalize(graph, **settings)[0]


EQUALIZE: Mapping[str, Transform] = {
    "original": lambda graph: graph,
    "dead channels": partial(_equalized, max_sweeps=0),
    "CLE": partial(_equalized, activations=0.0, dead_channels=False),
    "CLE, dead channels": partial(_equalized, activations=0.0),
    "CLE, dead channels, activations": _equalized,
}


def equalization(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """Table 3: the float model after each transform, W8 per tensor and W8A8; the last row is W8 per channel."""
    case = Case.of(name, options)

    def row(variant: str, graph: Graph, suffix: str) -> Sequence[Any]:
        configs = (FLOAT, {"preset": f"w8{suffix}", **OFF}, {"preset": f"w8a8{suffix}", **OFF})
        return name, variant, case.seen, case.top1, *(case.score(quantized(graph, c, case.data())) for c in configs)

    for variant, transform in EQUALIZE.items():
        absorbing = f"{variant} + absorption"
        wanted = options.wants(variant), options.wants(absorbing)
        graph = transform(case.graph) if any(wanted) else case.graph
        if wanted[0]:
            yield row(variant, graph, "-per_tensor")
        if wanted[1]:
            yield row(absorbing, _absorbed(graph, case), "-per_tensor")
    if options.wants("original, per channel"):
        yield row("original, per channel", case.graph, "")


def _absorbed(graph: Graph, case: Case) -> Graph:
    """By the statistics of batch normalizations, or by the data where there are none."""
    names = [n.name for n in graph if op_of(n).linear]
    lows = {} if case.has_statistics else smallest_outputs(graph, names, case.data(), progress=False)
    return absorb_bias(graph, lows=lows)[0]


def bias_correction(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """Table 4: W8 per tensor, activations float."""
    case = Case.of(name, options)
    config = {"preset": "w8-per_tensor", **OFF}
    for variant, transform in EQUALIZE.items():
        if not options.wants(variant):
            continue
        graph = transform(case.graph)
        plain = case.score(quantized(graph, config, None))
        empirical = case.score(quantized(graph, {**config, "correct_bias": True}, case.data()))
        analytic: float | str = "-"
        if case.has_statistics:
            analytic = case.score(quantized(graph, {**config, "correct_bias": True}, None))
        yield name, variant, case.seen, case.top1, plain, empirical, analytic


ROUNDING: Mapping[str, Mapping[str, Any]] = {
    "nearest": {},
    "nearest, bias correction": {"correct_bias": True},
    "descent, symmetric": {"adaround": AdaRound(asymmetric=False)},
    "descent, asymmetric": {"adaround": AdaRound()},
    "gram, asymmetric": {"adaround": AdaRound(solver="gram")},
    "stochastic, asymmetric": {"adaround": AdaRound(solver="stochastic")},
}


def rounding(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """Table 5: W4 per channel, activations float; what looks at data is repeated on random subsets."""
    case = Case.of(name, options)
    for variant, changes in ROUNDING.items():
        if not options.wants(variant):
            continue
        scores, seconds = [], []
        for seed in range(options.seeds if changes else 1):
            data, start = case.data(seed), time.perf_counter()
            model = quantized(case.graph, {"preset": "w4", **OFF, **changes}, data, seed)
            seconds.append(time.perf_counter() - start)
            scores.append(case.score(model))
        yield name, variant, case.seen, case.top1, spread(scores), f"{np.mean(seconds):.1f}"


def pipeline(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """Table 6: the presets as they are, exported; with data on random subsets, and without."""
    case = Case.of(name, options)

    def cell(preset: str, seed: int | None) -> float:
        if seed is None:
            config = {"preset": preset, "inputs": {"range": _input_range(case)}}
            return case.score(kquant.quantize_model(case.model, None, config, progress=False))
        return case.score(kquant.quantize_model(case.model, subset(name, seed), preset, seed=seed, progress=False))

    for source, seeds in (("data", tuple(range(options.seeds))), ("no data", (None,))):
        for granularity, suffix in GRANULARITY.items():
            variant = f"{granularity}, {source}"
            if options.wants(variant) and (source == "data" or case.has_statistics):
                cells = [spread([cell(f"{p}{suffix}", seed) for seed in seeds]) for p in ("w8a8", "w4a8")]
                yield name, variant, case.seen, case.top1, *cells


_FIRST, _KEY = ("model", "variant", "samples", "float"), ("model", "variant")
TABLES = {
    "1": Table(weight_ranges, (*_FIRST, *(f"W{b}" for b in BITS)), _KEY),
    "2": Table(activation_ranges, (*_FIRST, *(f"A{b}" for b in BITS)), _KEY),
    "3": Table(equalization, (*_FIRST, "transformed, float", "W8", "W8A8 .tflite"), _KEY),
    "4": Table(bias_correction, (*_FIRST, "W8", "empirical correction", "analytic correction"), _KEY),
    "5": Table(rounding, (*_FIRST, "W4", "seconds"), _KEY),
    "6": Table(pipeline, (*_FIRST, "W8A8 .tflite", "W4A8 .tflite"), _KEY),
}
