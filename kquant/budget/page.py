"""The page of a profile: totals, and a table whose cells have bars. No script, nothing from the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from kquant.diagnosis.markup import escape

if TYPE_CHECKING:
    from kquant.budget.records import LayerCost, Profile
    from kquant.budget.result import SearchResult

_STYLE = """
table { width: 100%; border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.3rem 0.5rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.bar { position: relative; text-align: right; min-width: 8rem; }
td.bar i { position: absolute; inset: 0.2rem auto 0.2rem 0; background: var(--blue-soft);
  border-right: 3px solid var(--blue); }
td.bar span { position: relative; }
.scroll { overflow-x: auto; }
"""


@dataclass(frozen=True)
class Bars:
    """A column whose cells have bars as long as their numbers: title, the number of a row, how it is written."""

    title: str
    value: Callable[[Any], float | None]
    write: Callable[[float], str]


def page(kicker: str, title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """An HTML document.

    Args:
        kicker: what kind of page it is.
        title: of what.
        subtitle: plain text.
        sections: (title, HTML).
    """
    style = resources.files("kquant.diagnosis").joinpath("page.css").read_text(encoding="utf-8") + _STYLE
    body = "\n".join(f"<section><h2>{escape(name)}</h2>\n{html}</section>" for name, html in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(kicker)}: {escape(title)}</title><style>{style}</style></head><body>"
        f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>'
        f'<p class="subtitle">{escape(subtitle)}</p></header><main id="main">\n{body}\n</main>'
        "<footer><p>Made by kquant. This file needs no network.</p></footer></body></html>\n"
    )


def bar_table(texts: Sequence[tuple[str, Callable[[Any], str]]], bars: Sequence[Bars], rows: Sequence[Any]) -> str:
    """A table: columns of text, then columns of bars; the longest bar of a column fills its cell."""
    head = "".join(f'<th scope="col">{escape(t)}</th>' for t in (*(t for t, _ in texts), *(b.title for b in bars)))
    longest = [max((b.value(row) or 0 for row in rows), default=0) or 1 for b in bars]
    lines = []
    for row in rows:
        cells = [f"<td>{escape(cell(row))}</td>" for _, cell in texts]
        cells += [_bar(bar, row, most) for bar, most in zip(bars, longest, strict=True)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def _bar(bar: Bars, row: Any, most: float) -> str:
    value = bar.value(row)
    if value is None:
        return "<td class='bar'>–</td>"
    width = 100 * max(0.0, value) / most
    return f'<td class="bar"><i style="width: {width:.1f}%"></i><span>{escape(bar.write(value))}</span></td>'


def profile_page(profile: Profile) -> str:
    """The page of a profile."""
    bars = [
        Bars("bytes", lambda x: x.bytes, lambda v: f"{v:,.0f}"),
        Bars("MACs", lambda x: x.macs, lambda v: f"{v:,.0f}"),
        Bars("bit operations", lambda x: x.bit_operations, lambda v: f"{v:,.0f}"),
    ]
    if profile.latency_device:
        bars.append(Bars("ms", lambda x: x.seconds, lambda v: f"{1e3 * v:.4f}"))
    if any(x.cycles is not None for x in profile.layers):
        bars.append(Bars("cycles, estimated by the compiler", lambda x: x.cycles, lambda v: f"{v:,.0f}"))
    layers = bar_table([("layer", _name), ("operator", _op), ("bits", _bits)], bars, profile.layers)
    totals = "".join(f"<p>{escape(line)}</p>" for line in (*profile.summary, *profile.notes))
    return page(
        "Profile",
        profile.name,
        f"{profile.bytes:,} bytes, of which {profile.structure:,} are the structure of the file",
        [("In all", totals), ("By operator", layers)],
    )


def _name(x: LayerCost) -> str:
    return x.name


def _op(x: LayerCost) -> str:
    return x.op


def _bits(x: LayerCost) -> str:
    return str(x.weight_bits or "")


def search_page(result: SearchResult) -> str:
    """The page of a search."""
    budgets = ", ".join(f"{k}={v:,.6g}" for k, v in result.budgets.items())
    tried = bar_table(
        [("config", lambda e: e.name)],
        [
            Bars("bytes", lambda e: e.bytes, lambda v: f"{v:,.0f}"),
            Bars("distance to float", lambda e: e.distance, lambda v: f"{v:.4g}"),
            Bars(result.metric, lambda e: e.score, lambda v: f"{v:.4g}"),
        ],
        result.evaluations,
    )
    layers = bar_table(
        [("layer", lambda x: x.layer)],
        [
            Bars("bits", lambda x: x.bits, lambda v: f"{v:.0f}"),
            Bars("weights", lambda x: x.weights, lambda v: f"{v:,.0f}"),
            Bars("MACs", lambda x: x.macs, lambda v: f"{v:,.0f}"),
            Bars("distance alone", lambda x: x.alone.get(x.bits, 0.0), lambda v: f"{v:.3g}"),
        ],
        result.layers,
    )
    said = [f"Float: {result.float_score:.4g}. Found: {result.best.score:.4g} in {result.best.bytes:,} bytes."]
    text = "".join(f"<p>{escape(line)}</p>" for line in (*said, *result.notes))
    return page(
        "Search",
        f"{result.solver} within {budgets}",
        f"{result.passes} forward passes, {len(result.evaluations)} files, {result.seconds:.0f} s",
        [
            ("In all", text),
            ("What was quantized and scored", tried),
            ("Layers", layers),
            ("Config", f"<pre>{escape(result.config.to_yaml())}</pre>"),
        ],
    )
