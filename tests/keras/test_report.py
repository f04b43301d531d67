"""Rows and text of what was quantized."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kquant.config.text import table
from kquant.keras.report import format_report, layer_rows
from kquant.quantize.calibrate import quantize_graph
from kquant.quantize.pipeline import record_of
from kquant.quantize.plan import make_plan
from tests.support.toy import calibration, config, toy_data, toy_graph


def rows_of(name="w8a8", **changes):
    plan = make_plan(toy_graph(), config(name, **changes))
    qgraph = quantize_graph(plan, calibration(toy_data(16)), progress=False)
    return plan, qgraph, {r["node"]: r for r in layer_rows(record_of(plan, config(name), 0, []), qgraph)}


@pytest.mark.parametrize(
    "name, weights, grid",
    [("w8a8", "8-bit per channel", "8-bit"), ("w4a8-per_tensor", "4-bit per tensor", "8-bit"),
     ("w4a4", "4-bit per channel", "4-bit"), ("w8a16", "8-bit per channel", "16-bit")],
)  # fmt: skip
def test_rows_say_bits_granularity_and_range(name, weights, grid):
    plan, qgraph, rows = rows_of(name)
    assert set(rows) == set(plan.graph.nodes)
    assert (rows["dw"]["weights"], rows["dw"]["grid"]) == (weights, grid)
    assert rows["add"]["weights"] == ""
    q = qgraph.activations["dw"]
    expected = [q.scale * (q.qmin - q.zero_point), q.scale * (q.qmax - q.zero_point)]
    np.testing.assert_allclose(rows["dw"]["range"], expected)
    assert json.loads(json.dumps(rows)) == rows


def test_rows_say_what_a_code_for_the_weights_would_take():
    _, qgraph, rows = rows_of("w4a8")
    for name in ("c1", "dw", "fc"):
        counts = np.unique(qgraph.integers[name], return_counts=True)[1]
        share = counts / counts.sum()
        entropy = -np.sum(share * np.log2(share))
        assert rows[name]["entropy"] == pytest.approx(entropy)
        assert entropy <= rows[name]["huffman"] < entropy + 1
        assert rows[name]["zeros"] == np.mean(qgraph.integers[name] == 0)
    assert rows["add"]["entropy"] is None


def test_rows_say_what_dictated_a_grid():
    plan, _, rows = rows_of()
    assert rows["sm"]["shared"] == "fixed by the target"
    assert rows["cat"]["shared"] == rows["pool"]["shared"] == plan.groups["cat"]
    assert rows["c1"]["shared"] == ""


def test_weight_only_rows_have_no_output_grid():
    _, _, rows = rows_of("w8")
    assert set(rows) == {"c1", "dw", "fc"}
    assert (rows["fc"]["grid"], rows["fc"]["range"]) == ("float", None)


def test_the_text_has_a_line_for_every_row_and_every_reason():
    plan, qgraph, rows = rows_of(rules=[{"name": "^dw$", "float": True}])
    record = record_of(plan, config(), 0, [])
    text = format_report(record, qgraph)
    assert text.startswith("target: litert\n")
    first = {line.split()[0] for line in text.splitlines() if line.strip()}
    assert set(rows) <= first
    assert plan.skipped[0].reason in text and "stays float:" in text
    assert "stays float" not in format_report(replace(record, skipped=()), qgraph)


def test_columns_are_aligned_numbers_to_the_right():
    text = table(("name", "bytes", "share"), [("a", "1,024", "9.5 %"), ("longer", 7, "-3 %")])
    assert text.splitlines() == [
        "name    bytes  share",
        "------  -----  -----",
        "a       1,024  9.5 %",
        "longer      7   -3 %",
    ]


def test_a_table_without_rows_is_its_header():
    assert table(("a", "bc"), []).splitlines()[0].split() == ["a", "bc"]
