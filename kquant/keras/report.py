"""What was quantized and how, as rows and as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kquant.config.text import table
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.quantize.plan import Plan


def layer_rows(plan: Plan, qgraph: QuantizedGraph) -> list[dict[str, Any]]:
    """One JSON-able row per integer node: its weights, its output grid and what dictated it."""
    rows = []
    for node in qgraph.graph:
        q = qgraph.activations.get(node.name)
        w = qgraph.weights.get(node.name)
        if node.op == "const" or (q is None and w is None):
            continue
        leader = plan.groups.get(node.name, node.name)
        shared = leader if leader != node.name else ""
        rows.append(
            {
                "node": node.name,
                "op": node.op,
                "weights": _weights(w),
                "range": _range(q),
                "grid": "float" if q is None else f"{q.bits}-bit",
                "shared": "fixed by the target" if leader in plan.fixed else shared,
            }
        )
    return rows


def _weights(q: Grid | None) -> str:
    return "" if q is None else f"{q.bits}-bit {'per channel' if np.ndim(q.scale) else 'per tensor'}"


def _range(q: Grid | None) -> list[float] | None:
    return None if q is None else [float(q.scale * (b - q.zero_point)) for b in (q.qmin, q.qmax)]


def format_report(quantization: Mapping[str, Any]) -> str:
    """The facts of a quantized model as text."""
    rows = []
    for row in quantization["layers"]:
        bounds = "" if row["range"] is None else "[{:.4g}, {:.4g}]".format(*row["range"])
        rows.append((row["node"], row["op"], row["weights"], row["grid"], bounds, row["shared"]))
    steps = [(s["name"], "yes" if s["taken"] else "no", s["note"]) for s in quantization.get("steps", ())]
    text = [f"target: {quantization['target']}"]
    if steps:
        text += [table(("step", "taken", "what, or why not"), steps), ""]
    text.append(table(("tensor", "op", "weights", "output", "range", "grid of"), rows))
    if quantization["float"]:
        text.append("\nstays float:")
        text.append(table(("node", "layer", "reason"), [tuple(s.values()) for s in quantization["float"]]))
    return "\n".join(text)
