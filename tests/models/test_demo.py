"""The demo prints what it promises."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models import demo, digits_cnn


@pytest.mark.slow
def test_the_demo_prints_its_table_and_holds(capsys, monkeypatch):
    digits = digits_cnn.load_split()
    few = replace(digits, x_test=digits.x_test[:100], y_test=digits.y_test[:100])
    monkeypatch.setattr(digits_cnn, "load_split", lambda: few)
    demo.main([])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("float32", "w"))]
    assert [row[0] for row in rows[:3]] == ["float32", "w8a8", "w4a8"]
    assert min(float(value) for row in rows[:3] for value in row[1:3]) >= 95
    size = [int(row[3].replace(",", "")) for row in rows[:3]]
    assert size[2] < size[1] < size[0] / 2
    assert all(row[-1] == "holds" for row in rows[1:3])
