"""Settings and results in words: suggestions, plain structures, columns of text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def suggest(name: str | None, known: Iterable[str]) -> str:
    """The hint "(did you mean ...?)" with a space in front; empty where no known name is near."""
    plain = re.sub(r"[\\^$.*+?()\[\]{}]", "", name or "")
    close = difflib.get_close_matches(plain, list(known), n=3, cutoff=0.5) if plain else []
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def plain(value: Any) -> Any:
    """`value` with every tuple in it as a list, as YAML and JSON have it."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Plain text columns, numbers aligned to the right."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    numeric = [all(_is_number(row[k]) for row in cells[1:]) for k in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in (lines[0], "  ".join("-" * w for w in widths), *lines[1:]))


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").replace("-", "").replace("%", "").strip().isdigit() or not text


def snake(name: str) -> str:
    """A name of a class in lower case with underscores."""
    return "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
