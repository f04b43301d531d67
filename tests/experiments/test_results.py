"""Measured numbers in files, and the tables of the documents made from them."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from experiments import debug_tables, paper_tables, tables, training_tables
from experiments.results import FOLDER, PROVENANCE, Results, markdown, read
from experiments.results.__main__ import DOCUMENTS, ROOT, outdated
from experiments.results.views import MARKED, VIEWS, View, filled

NUMBERS = Results("numbers", ("model", "config", "top-1"), ("model", "config"))


def test_measuring_again_replaces_a_row_and_keeps_the_order(tmp_path: Path) -> None:
    NUMBERS.update([("a", "w8", 1.0), ("b", "w8", 2.0)], command="first", folder=tmp_path)
    NUMBERS.update([("a", "w8", 3.456), ("a", "w4", 1234)], command="second, again", note="x", folder=tmp_path)
    found = [tuple(row.values()) for row in read("numbers", tmp_path)]
    again = ("second, again", "x")
    assert found == [("a", "w8", "3.46", *again), ("b", "w8", "2.00", "first", ""), ("a", "w4", "1234", *again)]


def test_rows_are_kept_only_where_asked(tmp_path: Path, capsys: Any) -> None:
    NUMBERS.show([("a", "w8", 1.0)], write=False, folder=tmp_path)
    assert "| a | w8 | 1.00 |" in capsys.readouterr().out and not list(tmp_path.iterdir())
    NUMBERS.show([("a", "w8", 1.0)], write=True, folder=tmp_path)
    assert read("numbers", tmp_path)[0]["command"].startswith("python -m ")


def test_a_table_shows_the_cells_of_its_file(tmp_path: Path) -> None:
    NUMBERS.update([("a", "w8", 1.0), ("a", "w4", 2.0), ("b", "w8", 12345)], command="c", folder=tmp_path)
    plain = View(source="numbers", columns={"net": "model", "score": "top-1"}, where={"config": ["w8"]})
    assert plain.lines(tmp_path)[2:] == ["| a | 1.00 |", "| b | 12,345 |"]
    columns = {"net": "model", "8": ("top-1", "w8"), "4": ("top-1", "w4")}
    side_by_side = View(source="numbers", by="config", columns=columns, labels={"a": "A net"})
    expected = ["| net | 8 | 4 |", "| --- | --- | --- |", "| A net | 1.00 | 2.00 |", "| b | 12,345 | - |"]
    assert side_by_side.lines(tmp_path) == expected
    text = "before\n<!-- table: t -->\nold\n<!-- end -->\nafter"
    made = filled(text, {"t": side_by_side}, tmp_path)
    assert made == "before\n<!-- table: t -->\n" + "\n".join(expected) + "\n<!-- end -->\nafter"
    assert filled(made, {"t": side_by_side}, tmp_path) == made


def test_thousands_are_separated_in_whole_numbers_only() -> None:
    assert markdown(["1300", "1000.6", "0.5 ± 0.1", "007x"]) == "| 1,300 | 1000.6 | 0.5 ± 0.1 | 007x |"


def test_the_documents_show_what_was_measured() -> None:
    assert not outdated()
    marks = [mark["name"] for name in DOCUMENTS for mark in MARKED.finditer((ROOT / name).read_text(encoding="utf-8"))]
    assert sorted(marks) == sorted(VIEWS)


def test_a_document_that_lies_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in DOCUMENTS:
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    assert not outdated(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("| 80.00 |", "| 80.10 |"), encoding="utf-8")
    assert list(outdated(tmp_path)) == [readme]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.csv")), ids=lambda path: path.stem)
def test_every_row_names_the_command_that_made_it(path: Path) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        header = next(csv.reader(file))
    assert tuple(header[-2:]) == PROVENANCE and len(set(header)) == len(header)
    for row in read(path.stem):
        assert None not in row.values() and len(row) == len(header)
        module = re.match(r"python -m (experiments\.\w+) ", row["command"])
        assert module is not None and (ROOT / (module[1].replace(".", "/") + ".py")).exists()


def test_the_files_have_the_columns_of_the_tables_that_write_them() -> None:
    all_tables = {**tables.TABLES, **paper_tables.TABLES, **debug_tables.TABLES, **training_tables.TABLES}
    for name, table in all_tables.items():
        results = table.results(name)
        rows = read(results.name)
        assert tuple(rows[0]) == (*results.columns, *PROVENANCE)
        keys = [tuple(row[k] for k in results.key) for row in rows]
        assert len(set(keys)) == len(keys)
