"""Formats of weights: accuracy, divergence and bytes, rounded to nearest and with the errors compensated.

Files are those of the target "ethos_u", with int8 tensors for all weights: what shrinks is what coders make of them.
`top1` is the file's on LiteRT; `kl`, in nats, is that of the outputs with quantized weights and float activations from
those of the float network, on the same samples; `entropy` and `zeros` are of the weights that have a grid, each tensor
by itself; `flash` is Vela's for an ethos-u55-128, `xz` the file's size after `xz -9e`.

"nearest" has the biases corrected, "compensated" is the default of the preset: AdaRound, with scales and levels fitted.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import kquant
from kquant.graph.ir import Graph
from kquant.graph.ops import evaluate, weight_of
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import dequantize
from kquant.keras.model import extract
from kquant.targets.ethos_u.target import ACCELERATORS
from kquant.targets.ethos_u.vela import compile_file

from . import zoo
from .tables import Options, Table

ROUNDINGS = {"nearest": {"adaround": False}, "compensated": {}}
HEADER = ("model", "config", "rounding", "calibration", "samples", "float", "top1", "drop", "kl", "entropy", "zeros")
_FLOOR = 1e-12
_XZ = 9 | lzma.PRESET_EXTREME


def formats(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """Every preset, with either rounding."""
    model, size = zoo.load_model(name), options.calibration or zoo.record(name).calibration_size
    data, batches = zoo.calibration(name, options.calibration), zoo.record(name).evaluation(options.samples)
    wanted = [model.predict_on_batch(x) for x, _ in batches]
    expected = zoo.float_top1(model, batches)
    for preset in options.configs:
        for rounding, changes in ROUNDINGS.items():
            if not options.wants(rounding) or (rounding == "nearest" and "-d" in preset):
                continue  # a divergence chooses steps on the way of AdaRound
            config = {"preset": preset, "target": "ethos_u", **changes}
            qmodel = kquant.quantize_model(model, data, config, progress=False)
            content, qgraph = kquant.export_tflite(qmodel).content, extract(qmodel)
            top1, seen = zoo.top1(content, batches)
            entropy, zeros = of_weights(qgraph)
            first = (name, preset, rounding, size, seen, expected, top1, expected - top1)
            kl = divergence(qgraph, batches, wanted)
            flash, packed = compile_file(content, ACCELERATORS[0]).flash, xz(content)
            yield *first, f"{kl:.4f}", f"{entropy:.3f}", f"{zeros:.3f}", len(content), flash, len(packed)
            keras.backend.clear_session()


def xz(content: bytes) -> bytes:
    """The file as `xz -9e` packs it."""
    return lzma.compress(content, preset=_XZ)


def of_weights(qgraph: QuantizedGraph) -> tuple[float, float]:
    """Entropy in bits per weight, and the share of zeros."""
    found = [(q.entropy(w), w) for n, w in qgraph.integers.items() if (q := qgraph.weights[n]) is not None]
    total = sum(w.size for _, w in found)
    return sum(h * w.size for h, w in found) / total, sum(float(np.sum(w == 0)) for _, w in found) / total


def with_integers(qgraph: QuantizedGraph) -> Graph:
    """The float graph with the values of the integers for weights."""

    def quantized(node: Any) -> Any:
        grid = qgraph.weights.get(node.name)
        if grid is None:
            return node
        key = weight_of(node).name
        values = dequantize(qgraph.integers[node.name], grid)
        return node.with_weights(**{key: values.reshape(node.weights[key].shape)})

    return qgraph.graph.rebuild(quantized(n) for n in qgraph.graph)


def divergence(qgraph: QuantizedGraph, batches: Sequence[Any], wanted: Sequence[np.ndarray]) -> float:
    """The mean divergence of the class probabilities, in nats."""
    graph = with_integers(qgraph)
    graph = graph.rebuild(n.with_(weights={k: tf.constant(w) for k, w in n.weights.items()}) for n in graph)
    run = tf.function(lambda x: evaluate(graph, [x])[0], autograph=False, reduce_retracing=True)
    total = seen = 0.0
    for (x, _), p in zip(batches, wanted, strict=True):
        p, q = (as_probabilities(v) for v in (p, np.asarray(run(tf.constant(x)))))
        total += float((p * np.log((p + _FLOOR) / (q + _FLOOR))).sum())
        seen += len(p)
    return total / seen


def as_probabilities(values: np.ndarray) -> np.ndarray:
    """Of class scores: themselves where they are probabilities, or their softmax."""
    values = values.astype(np.float64).reshape(len(values), -1)
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-3):
        return values
    e = np.exp(values - values.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


TABLES = {"formats": Table(formats, (*HEADER, "bytes", "flash", "xz"), ("model", "config", "rounding", "calibration"))}
