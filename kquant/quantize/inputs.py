"""Ranges of inputs that the model or the data declares: bytes are 0 to 255, whatever the calibration data contain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from kquant.graph.tracing.inputs import RANGES
from kquant.quantize.plan import Plan


def declare_ranges(plan: Plan, statistics: Mapping[str, Any], byte_inputs: Iterable[str]) -> tuple[Plan, list[str]]:
    """Fix the range of every input that is said to hold bytes: by its type, its first layer, or the type of the data.

    A range in the config goes before it, and so do data outside of what the model expects.

    Args:
        plan: what is quantized.
        statistics: what was observed, with `low` and `high`; an input that is not in it was not.
        byte_inputs: inputs for which the data has unsigned bytes.

    Returns:
        The plan, and a note for each such input.
    """
    activations, notes = dict(plan.activations), []
    for name in plan.graph.inputs:
        spec, seen = activations.get(name), statistics.get(name)
        expects = RANGES["uint8"] if name in byte_inputs else plan.graph[name].attrs.get("expects")
        if spec is None or spec.range is not None or expects is None:
            continue
        low, high = expects
        if seen is None or (low <= seen.low and seen.high <= high):
            activations[name] = replace(spec, range=(float(low), float(high)))
            notes.append(f"{name!r} holds bytes: {low:.0f} to {high:.0f}")
    return replace(plan, activations=activations), notes
