"""Measured numbers: a CSV file for each table, written by the command that measures and named in each row.

Every file has the columns of its table, then `command` (what made the row) and `note` (where and how, if it matters).
Older rows were made when `experiments` was a part of `tools`, by the command of the same name there. Numbers are plain;
"81.17 ± 1.25" is the mean and half the range of repeated measurements. What the documents show is made of
these files: `python -m experiments.results --write`.
"""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PROVENANCE = ("command", "note")
UNRECORDED = ("--write", "--files", "--note")  # flags that say where numbers go, not what is measured
Row = dict[str, str]


@dataclass(frozen=True)
class Results:
    """The file of a table.

    Attributes:
        name: of the file, without .csv.
        columns: of the table.
        key: columns that name a row; measuring it again replaces it.
    """

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]

    def show(self, rows: Iterable[Sequence[Any]], *, write: bool, note: str = "", folder: Path = FOLDER) -> None:
        """Print rows as they are measured, and keep them where `write` says so, with the command of this process."""
        print("\n".join(heading(self.columns)), flush=True)
        for row in rows:
            print(markdown(map(plain, row)), flush=True)
            if write:  # at once: a run that is stopped keeps what it has
                self.update([row], command=this_command(), note=note, folder=folder)

    def update(self, rows: Iterable[Sequence[Any]], *, command: str, note: str = "", folder: Path = FOLDER) -> None:
        """Write measured rows: in the place of those with the same key, or at the end."""
        path = folder / f"{self.name}.csv"
        found = {self._key(row): row for row in (read(self.name, folder) if path.exists() else [])}
        for cells in rows:
            row = dict(zip(self.columns, map(plain, cells), strict=True)) | {"command": command, "note": note}
            found[self._key(row)] = row
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, (*self.columns, *PROVENANCE), lineterminator="\n")
            writer.writeheader()
            writer.writerows(found.values())

    def _key(self, row: Row) -> tuple[str, ...]:
        return tuple(row[column] for column in self.key)


def read(name: str, folder: Path = FOLDER) -> list[Row]:
    """The rows of a file."""
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def plain(value: Any) -> str:
    """A cell of a file: fractions (percent, mostly) with two digits."""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def markdown(cells: Iterable[str]) -> str:
    """A line of a Markdown table; whole numbers get their thousands separated."""
    return "| " + " | ".join(f"{int(c):,}" if c.isdecimal() else c for c in cells) + " |"


def heading(columns: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [markdown(columns), "|" + " --- |" * len(columns)]


def this_command() -> str:
    """The command line of this process, as one would type it."""
    spec = sys.modules["__main__"].__spec__
    module = spec.name if spec is not None else Path(sys.argv[0]).stem
    arguments = [a for a in sys.argv[1:] if a.split("=")[0] not in UNRECORDED]
    return shlex.join(["python", "-m", module, *arguments])
