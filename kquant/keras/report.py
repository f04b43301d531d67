"""What was quantized and how, as rows and as text; with what a coder of weights would make of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from kquant.config.text import table
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.quantize.record import Quantization
from kquant.targets.storage import huffman


def layer_rows(quantization: Quantization, qgraph: QuantizedGraph) -> list[dict[str, Any]]:
    """One JSON-able row per integer node: its weights, its output grid and what dictated it.

    "entropy" is the zero-order entropy of the integers of its weights in bits per weight, "huffman" the length of a
    Huffman code for them, its table apart.
    """
    rows = []
    for node in qgraph.graph:
        q = qgraph.activations.get(node.name)
        w = qgraph.weights.get(node.name)
        if node.op == "const" or (q is None and w is None):
            continue
        dictated = node.name in quantization.fixed
        rows.append(
            {
                "node": node.name,
                "op": node.op,
                "weights": _weights(w),
                **_statistics(qgraph, node.name),
                "range": _range(q),
                "grid": "float" if q is None else f"{q.bits}-bit",
                "shared": "fixed by the target" if dictated else quantization.shared.get(node.name, ""),
            }
        )
    return rows


def _weights(q: Grid | None) -> str:
    return "" if q is None else f"{q.bits}-bit {'per channel' if np.ndim(q.scale) else 'per tensor'}"


def _statistics(qgraph: QuantizedGraph, name: str) -> dict[str, float | None]:
    """The integers of a node's weight: entropy and mean length in a Huffman code, in bits each; the share of zeros."""
    q, integers = qgraph.weights.get(name), qgraph.integers.get(name)
    if q is None or integers is None:
        return {"entropy": None, "huffman": None, "zeros": None}
    coded, zeros = huffman.mean_bits(integers), float(np.mean(integers == 0))
    return {"entropy": q.entropy(integers), "huffman": coded, "zeros": zeros}


def _range(q: Grid | None) -> list[float] | None:
    return None if q is None else [float(q.scale * (b - q.zero_point)) for b in (q.qmin, q.qmax)]


def format_report(quantization: Quantization, qgraph: QuantizedGraph) -> str:
    """What was done to a network, and its tensors as they are now, as text."""
    rows = []
    for row in layer_rows(quantization, qgraph):
        bounds = "" if row["range"] is None else "[{:.4g}, {:.4g}]".format(*row["range"])
        coded = ""
        if row["entropy"] is not None:
            coded = f"{row['entropy']:.2f} ({row['huffman']:.2f}), {100 * row['zeros']:.0f} % zeros"
        rows.append((row["node"], row["op"], row["weights"], coded, row["grid"], bounds, row["shared"]))
    steps = [(s.name, "yes" if s.taken else "no", s.note) for s in quantization.steps]
    text = [f"target: {quantization.target}"]
    if steps:
        text += [table(("step", "taken", "what, or why not"), steps), ""]
    text.append(table(("tensor", "op", "weights", "entropy (Huffman)", "output", "range", "grid of"), rows))
    if quantization.skipped:
        text.append("\nstays float:")
        text.append(table(("node", "layer", "reason"), [(s.node, s.layer, s.reason) for s in quantization.skipped]))
    if quantization.damage:
        text.append("\ndestroyed by quantization:")
        text += [f"  {damage}" for damage in quantization.damage]
    return "\n".join(text)
