"""Pieces of HTML, everything escaped: tensors may be called `<script>`."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

escape = html.escape


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, the cell of a record, and for numbers how to write them."""

    title: str
    cell: Callable[[Any], Any]
    write: Callable[[Any], str] | None = None


def number(value: float | None) -> str:
    """Four digits with a true minus; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.4g}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share as percent."""
    return number(value if value is None else 100 * value) + " %"


def decibel(value: float | None) -> str:
    """One digit behind the point: more is noise."""
    return number(value) if value is None or not math.isfinite(value) else f"{value:.1f}".replace("-", "−")


def table(name: str, caption: str, columns: Sequence[Column], rows: Sequence[Any]) -> str:
    """A table that page.js can sort, in a region of its own that scrolls."""
    head = "".join(_head(column) for column in columns)
    body = "".join(f"<tr>{''.join(_cell(column, row) for column in columns)}</tr>\n" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table id="{name}" class="sortable"><caption class="hidden">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def select(name: str, label: str, options: Sequence[tuple[str, str]], chosen: int = 0) -> str:
    """A labelled drop-down of (value, text)."""
    items = "".join(
        f'<option value="{escape(value)}"{" selected" if i == chosen else ""}>{escape(text)}</option>'
        for i, (value, text) in enumerate(options)
    )
    return f'<label class="control">{escape(label)} <select id="{name}">{items}</select></label>'


def chart(name: str, label: str) -> str:
    """The place of a chart; `label` is read to who cannot see it."""
    return f'<div class="chart" id="{name}" role="img" aria-label="{escape(label)}"></div>'


def details(title: str, body: str) -> str:
    """A part that opens on demand, and in print."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def embed(value: Any) -> str:
    """JSON that can stand inside a <script>: no "<" is left."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _head(column: Column) -> str:
    style = "" if column.write is None else ' class="number"'
    return f'<th scope="col"{style} aria-sort="none"><button type="button">{escape(column.title)}</button></th>'


def _cell(column: Column, row: Any) -> str:
    value = column.cell(row)
    if column.write is None:
        return f"<td>{escape(str(value))}</td>"
    key = "" if value is None or math.isnan(value) else f"{value:.9g}"
    return f'<td class="number" data-key="{key}">{escape(column.write(value))}</td>'
