"""What the report's charts draw, as JSON-able numbers: binned to what a screen can show, four digits each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kquant.diagnosis.summary import decimals, waterfall

if TYPE_CHECKING:
    from kquant.diagnosis.records import ChannelRanges, Diagnosis, Quartiles, TensorRecord

MAX_BOXES, MAX_BINS = 256, 96  # of one chart
ALL_BOXES, ALL_BINS = 20_000, 40_000  # of all layers together: a large model's file stays below 6 MB


def chart_data(diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything that page.js draws."""
    d = diagnosis
    boxes = int(np.clip(ALL_BOXES // max(1, len(d.channels)), 16, MAX_BOXES))
    bins = int(np.clip(ALL_BINS // max(1, len(d.tensors)), 16, MAX_BINS))
    return {
        "metric": d.metric,
        "decimals": decimals(d.float_score),
        "float": finite(d.float_score),
        "quantized": finite(d.quantized_score),
        "waterfall": [{"name": n, "score": finite(s), "kind": k} for n, s, k in waterfall(d)],
        "sensitivity": [
            {
                "node": s.node,
                "type": s.kind,
                "bits": s.bits,
                "lost": finite(d.float_score - s.alone_on),
                "won": None if s.alone_off is None else finite(s.alone_off - d.quantized_score),
            }
            for s in d.sensitivity
        ],
        "channels": [_channels(c, boxes) for c in d.channels],
        "tensors": [_histogram(t, bins) for t in d.tensors],
    }


def finite(value: float) -> float | None:
    """Rounded to six digits; None for what no chart can show."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def widths(channels: Sequence[Quartiles]) -> tuple[float, float]:
    """(range of the widest channel, that over the median one): inf where most are dead, NaN without channels."""
    if not channels:
        return math.nan, math.nan
    spans = np.array([c[-1] - c[0] for c in channels], np.float64)
    widest, median = float(spans.max()), float(np.median(spans))
    return widest, widest / median if median else (math.inf if widest else 1.0)


def _channels(record: ChannelRanges, limit: int) -> dict[str, Any]:
    per = math.ceil(max(len(record.before), len(record.after), 1) / limit)
    return {
        "node": record.node,
        "per": per,
        "before": _widest(record.before, per),
        "after": _widest(record.after, per),
    }


def _widest(channels: Sequence[Quartiles], per: int) -> list[list[float | None]]:
    """Columns of smallest values, quartiles and largest values: of each `per` neighbouring channels the widest."""
    groups = [channels[i : i + per] for i in range(0, len(channels), per)]
    shown = [max(g, key=lambda c: c[-1] - c[0] if math.isfinite(c[-1] - c[0]) else -1.0) for g in groups]
    return [[_short(v) for v in column] for column in zip(*shown, strict=True)]


def _histogram(record: TensorRecord, limit: int) -> dict[str, Any]:
    step = math.ceil(max(1, len(record.counts)) / limit)
    starts = range(0, len(record.counts), step)
    return {
        "node": record.node,
        "type": record.kind,
        "low": finite(record.low),
        "high": finite(record.high),
        "counts": [int(sum(record.counts[i : i + step])) for i in starts],
        "edges": [finite(e) for e in (*(record.edges[i] for i in starts), *record.edges[-1:])],
    }


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
