"""Masks bounded by what the data says of the scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kquant.config.quant_config import QuantConfig
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import op_of
from kquant.graph.transforms.bound_masks import (
    BELOW_LARGEST,
    BELOW_SMALLEST,
    LARGE,
    Seen,
    as_affine,
    bound_masks,
    masked_scores,
    truths,
)
from kquant.quantize.calibrate import over_data
from kquant.quantize.data import CalibrationData


def prepare_masks(
    graph: Graph, config: QuantConfig, data: CalibrationData | None, progress: bool = True
) -> tuple[Graph, str]:
    """The graph with bounded masks, and what was done ("" without any)."""
    sites = masked_scores(graph)
    if not sites:
        return graph, ""
    if data is None or not data.repeatable:
        return bound_masks(graph), f"{len(sites)} to -100: the scores are not known"
    graph, dropped = _without_truths(graph, data, progress)
    bits = 8 if config.activations is None else config.activations.bits
    seen = _observe(graph, data, progress, BELOW_SMALLEST if bits <= 8 else BELOW_LARGEST)
    bounded = bound_masks(graph, seen)
    note = f"{len(sites)} to what their readers can see"
    return bounded, note + (f"; {dropped} of zeros and ones as the data has them" if dropped else "")


def _without_truths(graph: Graph, data: CalibrationData, progress: bool) -> tuple[Graph, int]:
    """Functions in front of masks that read zeros and ones only, as affines, or gone where these do nothing."""
    nodes = {n.name: n for n in truths(graph)}
    if not nodes:
        return graph, 0
    binary = np.ones(len(nodes), bool)

    def check(values: list[Any]) -> Any:
        return tf.stack([tf.reduce_all((v == 0) | (v == 1)) for v in values])

    for found in over_data(graph, [n.inputs[0] for n in nodes.values()], data, check, progress, "observing"):
        binary &= found.numpy()
    affines = {n.name: as_affine(graph, n) for n, zeros in zip(nodes.values(), binary, strict=True) if zeros}
    changed = graph.rebuild([affines.get(n.name, n) for n in graph])
    rename = {n.name: n.inputs[0] for n in affines.values() if _does_nothing(n) and n.name not in graph.outputs}
    return changed.rebuild([n for n in changed if n.name not in rename], rename), len(affines)


def _does_nothing(affine: Node) -> bool:
    return bool(np.all(affine.weights["scale"] == 1)) and not affine.weights["offset"].any()


def _observe(graph: Graph, data: CalibrationData, progress: bool, below: float) -> dict[str, Seen]:
    """What the scores in front of every reader with a mask are; nothing of masks with other values than two."""
    sites = masked_scores(graph)
    names = [name for site in sites for name in (site.scores, site.sums[-1])]

    def extremes(values: list[Any]) -> Any:
        found = []
        for scores, total in zip(values[::2], values[1::2], strict=True):
            scores = tf.reshape(scores, tf.shape(total)) if scores.shape != total.shape else scores
            hidden = total - scores < -LARGE / 2
            visible = tf.where(hidden, -np.inf, scores)
            largest = tf.reduce_max(visible, -1)
            least = tf.reduce_min(tf.where(tf.math.is_finite(largest), largest, np.inf))
            smallest = tf.reduce_min(tf.where(hidden, np.inf, scores))
            found.append(tf.stack([smallest, least, -tf.reduce_max(scores)]))
        return tf.stack(found)

    low = np.full((len(sites), 3), np.inf)
    for found in over_data(graph, names, data, extremes, progress, "observing"):
        low = np.minimum(low, found.numpy())
    return {
        site.reader: Seen(float(smallest), float(-most), float(least), below, op_of(graph[site.reader]).largest)
        for site, (smallest, least, most) in zip(sites, low, strict=True)
        if np.isfinite([smallest, least, most]).all()
    }
