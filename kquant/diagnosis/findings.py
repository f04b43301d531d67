"""What is wrong with named tensors, told from their records: rules with a threshold each, worst tensors first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kquant.diagnosis.records import Finding, TargetRecord, TensorRecord
from kquant.grids.grid import Grid

WIDE = 8.0  # widest channel over the median one: that leaves the median channel of 8 bits 5 bits
FAR = 8.0  # the grid over the part of it that holds 99 % of the values: three of its bits serve 1 %
CUT = 0.01  # share of values beyond the grid
OTHER = 4.0  # a grid this many times wider or narrower than it should be: two bits
DOMAIN = 2.0  # ranges on calibration data this many times wider or narrower than on evaluation data
NAMED = 4  # tensors that a sentence names
FLOAT_LSB = 100.0  # a float tensor differs where it does by so many steps of 1e-5 of its largest value
_Rule = Callable[[TensorRecord], float]  # how bad it is; 0 where nothing is wrong


@dataclass(frozen=True)
class _Kind:
    """A rule with its words: `text` takes `names` and the worst `value`."""

    kind: str
    of: str
    badness: _Rule
    text: str
    remedy: str


def inner_range(record: TensorRecord) -> float:
    """The width that holds the middle 99 % of the values of the histogram; at least one bin of it."""
    shares = np.cumsum(record.counts) / max(1, sum(record.counts))
    low, high = np.searchsorted(shares, [0.005, 0.995])
    edges = record.edges
    return edges[min(high, len(shares) - 1) + 1] - edges[low]


def _far(t: TensorRecord) -> float:
    """How much of the grid serves the few: values far out, or a channel far wider than the others."""
    ratio = min(t.high - t.low, t.seen_high - t.seen_low) / max(inner_range(t), 1e-30)
    worst = max(ratio, t.channel_ratio / 2)  # channels differ a few times in every network
    return worst if worst > FAR else 0.0


_KINDS = (
    _Kind(
        "wide_channels",
        "weights",
        lambda t: t.channel_ratio if t.channel_ratio > WIDE else 0.0,
        "{names}: the widest channel is up to {value:.0f} times the median one, and they share one scale, which "
        "leaves the narrow ones few steps.",
        "Equalize channels across layers (equalize: true), or take one scale per channel where the hardware does.",
    ),
    _Kind(
        "outliers",
        "activations",
        _far,
        "{names}: a few values or channels reach up to {value:.0f} times as far as the rest, and the grid follows "
        "them.",
        "Clip them (range method mse or percentile), equalize, or give the layer 16 bits.",
    ),
    _Kind(
        "saturation",
        "activations",
        lambda t: t.saturated if t.saturated > CUT else 0.0,
        "{names}: up to {value:.1%} of the values lie beyond the grid.",
        "Calibrate with data like that which is evaluated, or with the range method min_max.",
    ),
)


def of_tensors(
    records: Sequence[TensorRecord],
    kinds: Sequence[str],
    per_tensor: Sequence[str],
    fixed: Collection[str] = (),
) -> list[Finding]:
    """Wide channels, outliers and saturation.

    Args:
        records: of all quantizers.
        kinds: "weights" or "activations" that are to blame.
        per_tensor: nodes whose weights have one scale: the width of channels is theirs to suffer.
        fixed: operations whose grids are the target's, which nobody can choose.
    """
    found = []
    for rule in _KINDS:
        if rule.of not in kinds:
            continue
        judged = [(rule.badness(t), t) for t in records if t.kind == rule.of and t.op not in fixed]
        judged = [(b, t) for b, t in judged if b and (rule.of == "activations" or t.node in per_tensor)]
        judged.sort(key=lambda item: -item[0])
        if judged:
            nodes = tuple(t.node for _, t in judged)
            text = rule.text.format(names=names(nodes), value=judged[0][0])
            found.append(Finding(kind=rule.kind, nodes=nodes, text=text, remedy=rule.remedy))
    return found


def dead_channels(records: Sequence[TensorRecord], per_tensor: Sequence[str]) -> list[Finding]:
    """Channels whose output never changes, of layers whose weights have one scale."""
    dead = {t.node: t.dead_channels for t in records if t.kind == "activations" and t.dead_channels}
    nodes = sorted((t.node for t in records if t.kind == "weights" and t.node in per_tensor and t.node in dead),
                   key=lambda n: -dead[n])  # fmt: skip
    if not nodes:
        return []
    return [
        Finding(
            kind="dead_channels",
            nodes=tuple(nodes),
            text=f"{names(nodes)}: up to {dead[nodes[0]]} channels are constant over the data, "
            "yet their weights count in the one scale that all channels share.",
            remedy="Equalization resolves channels that are constant for certain, and narrows the others.",
        )
    ]


def few_bits(records: Sequence[TensorRecord], guilty: Sequence[str], logits: Sequence[str]) -> list[Finding]:
    """Fewer than 8 bits where it hurts.

    Args:
        records: of all quantizers.
        guilty: names "NODE:KIND" of the quantizers that cost score alone.
        logits: the tensors that make the decision.
    """
    bad = [t for t in records if f"{t.node}:{t.kind}" in guilty]
    found = []
    if at := [t for t in bad if t.node in logits and t.kind == "activations"]:
        found.append(
            Finding(
                kind="logits",
                nodes=tuple(t.node for t in at),
                text=f"{names([t.node for t in at])}, which makes the decision, has {at[0].bits} bits and a step of "
                f"{(at[0].high - at[0].low) / (2 ** at[0].bits - 1):.3g}: classes tie or change order.",
                remedy="Give it 8 bits or more with a rule, and the range method cross_entropy.",
            )
        )
    coarse = [t for t in bad if t.bits < 8 and t.node not in logits]
    if coarse:
        nodes = tuple(dict.fromkeys(t.node for t in coarse))
        found.append(
            Finding(
                kind="few_bits",
                nodes=nodes,
                text=f"{names(nodes)}: {min(t.bits for t in coarse)} bits are too few; each of them costs score alone.",
                remedy="AdaRound for weights; else more bits for these layers with rules, or training.",
            )
        )
    return found


def bad_scales(actual: Mapping[str, Grid | None], expected: Mapping[str, Grid | None]) -> list[Finding]:
    """Grids that are far wider or narrower than those that the config gives on the calibration data.

    Args:
        actual, expected: "NODE:KIND" -> grid.
    """
    off = {n: _wider(q, r) for n, q in actual.items() if q is not None and (r := expected.get(n)) is not None}
    bad = sorted((n for n, f in off.items() if max(f, 1 / f) > OTHER), key=lambda n: -max(off[n], 1 / off[n]))
    if not bad:
        return []
    worst = off[bad[0]]
    nodes = tuple(dict.fromkeys(n.rpartition(":")[0] for n in bad))
    size = f"{worst:.3g} times as wide" if worst > 1 else f"{1 / worst:.3g} times narrower"
    return [
        Finding(
            kind="bad_scale",
            nodes=nodes,
            text=f"{names(nodes)}: the scale of {bad[0].rpartition(':')[2]} is {size} as its config gives on the "
            "calibration data.",
            remedy="Quantize again with quantize_model; what set this scale by hand or by training went astray.",
        )
    ]


def _wider(q: Grid, expected: Grid) -> float:
    """Range of a grid over that of another; the channel that is most off, where there are channels."""
    widths = [np.asarray(g.scale, np.float64) * (g.qmax - g.qmin) for g in (q, expected)]
    ratio = np.atleast_1d(widths[0] / widths[1])
    return float(ratio[np.argmax(np.abs(np.log(ratio)))])


Span = tuple[float, float]


def other_domain(
    calibration: Mapping[str, Span], evaluation: Mapping[str, Span], inputs: Sequence[str]
) -> tuple[tuple[str, ...], str]:
    """Whether ranges on calibration data are not those on evaluation data.

    The inputs decide, or else the majority of the tensors: single ones differ by chance.

    Args:
        calibration, evaluation: tensor -> (low, high) there.
        inputs: which tensors are inputs.

    Returns:
        The tensors that differ, inputs first, and a sentence; both empty where nothing does.
    """
    widths = {n: [max(high - low, 1e-30) for low, high in (calibration[n], evaluation[n])] for n in evaluation}
    off = {n: max(a / b, b / a) for n, (a, b) in widths.items() if max(a / b, b / a) > DOMAIN}
    if not off or not (set(inputs) & set(off) or len(off) > len(widths) / 2):
        return (), ""
    nodes = sorted(off, key=lambda n: (n not in inputs, -off[n]))
    spans = ["[{:.3g}, {:.3g}]".format(*found[nodes[0]]) for found in (calibration, evaluation)]
    return tuple(nodes), f"{nodes[0]!r} spans {spans[0]} on the calibration data and {spans[1]} on the evaluation data."


def deviating(records: Sequence[TargetRecord], float_nodes: Sequence[str]) -> TargetRecord | None:
    """The first operation of the file that, fed the same integers, does something else than the simulation."""
    return next((r for r in records if r.alone > (FLOAT_LSB if r.node in float_nodes else 1.0)), None)


def names(nodes: Sequence[str]) -> str:
    """The first of them in words."""
    shown = ", ".join(nodes[:NAMED])
    return shown if len(nodes) <= NAMED else f"{shown} and {len(nodes) - NAMED} more"
