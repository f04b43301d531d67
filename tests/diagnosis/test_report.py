"""The report's content, the terminal summary and JSON; what the page does is tested in test_browser.py."""

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

import kquant
from kquant.diagnosis import report
from kquant.diagnosis.charts import MAX_BINS, MAX_BOXES, chart_data, widths
from kquant.diagnosis.records import ChannelRanges, Diagnosis
from kquant.diagnosis.report import render
from kquant.diagnosis.summary import changes, decimals
from kquant.errors import DiagnosisError, MissingPackageError

from . import example
from .example import EMPTY, EVIL


class Page(HTMLParser):
    """Tags with their attributes, the text of each table's rows, and the text of <script id="data">."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: dict[str, str] = {}
        self.text: list[str] = []
        self._table, self._script, self._cell = "", "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        self._script = values.get("id", "inline") if tag == "script" else ""
        self._cell = tag == "td"
        if tag == "table":
            self._table = values["id"]
            self.tables[self._table] = []
        if tag == "tr":
            self.tables[self._table].append([])
        if tag == "td":
            self.tables[self._table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        else:
            self.text.append(data)
        if self._cell:
            self.tables[self._table][-1][-1] += data


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return example.diagnosis()


@pytest.fixture(scope="module")
def page(diagnosis: Diagnosis) -> Page:
    pytest.importorskip("plotly")
    return Page(render(diagnosis))


def rows(page: Page, table: str) -> list[list[str]]:
    return [row for row in page.tables[table] if row]


def test_nothing_is_loaded(page: Page) -> None:
    loading = {"src", "srcset", "data", "poster", "action", "background"}
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        held = {"src"} if attrs.get("src", "").startswith("data:image/jpeg;base64,") else set()
        assert not (loading - held) & set(attrs), (tag, attrs)
        assert attrs.get("href", "#").startswith("#")
    styles = re.findall(r"url\(|@import", " ".join(page.text))
    assert not styles
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy


def test_file_holds_what_it_should(diagnosis: Diagnosis, tmp_path) -> None:
    pytest.importorskip("plotly")
    path = tmp_path / "report.html"
    diagnosis.save_html(path)
    assert path.stat().st_size < 6e6
    assert path.read_text(encoding="utf-8") == render(diagnosis)  # the same bytes every time


def test_a_large_model_stays_small() -> None:
    """600 tensors of 2,048 bins, 300 layers of 2,048 channels: bigger than any model of the white paper."""
    pytest.importorskip("plotly")
    d = example.diagnosis()
    edges = tuple(np.linspace(-1.2345678, 3.4567891, 2049).tolist())
    tensor = replace(d.tensors[0], counts=tuple(range(2048)), edges=edges)
    channel = (-0.12345678, -0.0123456, 0.01234567, 0.11111111, 0.2345678)
    layer = ChannelRanges(
        node="a_layer_with_a_name",
        before=(channel,) * 2048,
        after=(),
    )
    layer = replace(layer, after=layer.before)
    large = replace(d, tensors=(tensor,) * 600, channels=(layer,) * 300)
    assert len(render(large).encode()) < 6e6


def test_outcome_comes_first(page: Page, diagnosis: Diagnosis) -> None:
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections[:2] == ["verdict", "recommendation"]
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a" and attrs.get("class") != "skip"]
    assert links == [f"#{name}" for name in sections]
    text = " ".join(page.text)
    for said in (diagnosis.verdict, "Culprit: weights", "49.80", "13.60", "13.50", "48.60", "−1.20"):
        assert said in text
    for stage in diagnosis.stages:
        assert stage.question in text and stage.verdict in text
    for finding in diagnosis.findings:
        assert finding.text in text and finding.remedy in text
    assert diagnosis.model_report in text


def test_recommendation_can_be_used(diagnosis: Diagnosis) -> None:
    """The YAML in the page is the config."""
    pytest.importorskip("plotly")
    text = re.search(r'<pre id="recommended-yaml".*?>(.*?)</pre>', render(diagnosis), re.S)[1]
    config = kquant.QuantConfig.load(yaml.safe_load(text))
    assert config.to_dict() == diagnosis.recommendation


def test_tables_hold_every_record(page: Page, diagnosis: Diagnosis) -> None:
    names = {name: [(row[0], row[3]) for row in rows(page, name)] for name in ("tensors-table", "sensitivity-table")}
    assert names["tensors-table"] == [(t.node, t.kind) for t in diagnosis.tensors]
    assert names["sensitivity-table"] == [(s.node, s.kind) for s in diagnosis.sensitivity]
    assert [row[0] for row in rows(page, "target-table")] == [t.node for t in diagnosis.target]
    assert [row[0] for row in rows(page, "channels-table")] == [c.node for c in diagnosis.channels]
    lost = [float(row[6].replace("−", "-")) for row in rows(page, "sensitivity-table")]
    assert np.allclose(lost, [49.8 - s.alone_on for s in diagnosis.sensitivity], rtol=1e-3)


def test_pictures_stand_side_by_side(page: Page, diagnosis: Diagnosis) -> None:
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    shown = [c for p in diagnosis.pictures for c in (p.image, p.float_drawn, p.quantized_drawn, p.difference)]
    assert [image["src"] for image in images] == [f"data:image/jpeg;base64,{content}" for content in shown]
    assert all("Sample" in image["alt"] for image in images)
    assert "pictures" not in render(replace(diagnosis, pictures=())).split("</nav>")[0].split("<nav")[1]


def test_charts_have_a_text_alternative(page: Page) -> None:
    charts = [attrs for _, attrs in page.tags if attrs.get("class") == "chart"]
    assert len(charts) == 4 and all(c["role"] == "img" and len(c["aria-label"]) > 20 for c in charts)
    data = json.loads(page.scripts["data"])
    assert [bar["score"] for bar in data["waterfall"]][:3] == [49.8, 49.8, 13.9]
    assert data["waterfall"][-1] == {"name": "recommended config", "score": 48.6, "kind": "recommended"}


def test_names_are_escaped(diagnosis: Diagnosis) -> None:
    pytest.importorskip("plotly")
    evil = replace(
        diagnosis,
        model=EVIL,
        metric=EVIL,
        verdict=EVIL,
        advice=(EVIL,),
        model_report=EVIL,
        stages=tuple(replace(s, name=EVIL, question=EVIL, verdict=EVIL) for s in diagnosis.stages),
        findings=tuple(replace(f, kind=EVIL, nodes=(EVIL,), text=EVIL, remedy=EVIL) for f in diagnosis.findings),
        sensitivity=tuple(replace(s, node=EVIL, layer=EVIL, op=EVIL) for s in diagnosis.sensitivity),
        tensors=tuple(replace(t, node=EVIL, layer=EVIL, op=EVIL) for t in diagnosis.tensors),
        channels=tuple(replace(c, node=EVIL) for c in diagnosis.channels),
        target=tuple(replace(t, node=EVIL, op=EVIL) for t in diagnosis.target),
        recommendation={**diagnosis.recommendation, "target": EVIL},
    )
    parsed = Page(render(evil))
    assert not [tag for tag, attrs in parsed.tags if any(a.startswith("on") for a in attrs)]
    assert all(attrs["src"].startswith("data:") for tag, attrs in parsed.tags if tag == "img")
    assert json.loads(parsed.scripts["data"])["tensors"][0]["node"] == EVIL
    assert rows(parsed, "tensors-table")[0][0] == EVIL
    assert [t for t, _ in parsed.tags].count("script") == 3


@pytest.mark.parametrize("left_out", [*EMPTY, "all"])
def test_parts_may_be_empty(diagnosis: Diagnosis, left_out: str) -> None:
    pytest.importorskip("plotly")
    poor = replace(diagnosis, **(EMPTY if left_out == "all" else {left_out: EMPTY[left_out]}))
    parsed = Page(render(poor))
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and "verdict" in ids
    assert str(poor)
    assert Diagnosis.from_json(poor.to_json()) == poor


def test_no_equalization_and_no_labels(diagnosis: Diagnosis) -> None:
    pytest.importorskip("plotly")
    plain = replace(
        diagnosis,
        channels=tuple(replace(c, after=()) for c in diagnosis.channels),
        sensitivity=tuple(replace(s, alone_off=None) for s in diagnosis.sensitivity),
    )
    parsed = Page(render(plain))
    assert rows(parsed, "channels-table")[0][4] == "–"
    assert {row[7] for row in rows(parsed, "sensitivity-table")} == {"–"}


def test_json_round_trip_of_what_json_lacks(diagnosis: Diagnosis) -> None:
    odd = replace(
        diagnosis,
        float_score=float("nan"),
        quantized_score=float("-inf"),
        tensors=(replace(diagnosis.tensors[0], sqnr=float("inf"), saturated=np.float32(0.5)),),
    )
    text = odd.to_json()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    back = Diagnosis.from_json(text)
    assert np.isnan(back.float_score) and back.quantized_score == -np.inf and back.tensors[0].sqnr == np.inf
    assert back.tensors[0].saturated == 0.5 and type(back.tensors[0].saturated) is float
    assert Diagnosis.from_json(diagnosis.to_json()) == diagnosis
    pytest.importorskip("plotly")
    json.loads(Page(render(odd)).scripts["data"], parse_constant=pytest.fail)
    assert str(odd)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.pop("verdict"), "verdict"),
        (lambda v: v.update(more=1), "more"),
        (lambda v: v.update(samples="many"), r"Diagnosis\.samples must be int, found 'many'"),
        (lambda v: v["tensors"][3].update(low=None), r"Diagnosis\.tensors\[3\]\.low must be int or float"),
        (lambda v: v["channels"][0]["before"][1].append(1), r"channels\[0\]\.before\[1\] must hold 5 values, found 6"),
    ],
)
def test_from_json_names_what_is_wrong(diagnosis: Diagnosis, change, said: str) -> None:
    values = json.loads(diagnosis.to_json())
    change(values)
    with pytest.raises(DiagnosisError, match=said):
        Diagnosis.from_json(json.dumps(values))


def test_from_json_refuses_other_text() -> None:
    with pytest.raises(DiagnosisError, match="no Diagnosis in JSON"):
        Diagnosis.from_json("weights: 8")


def test_without_plotly_the_error_says_what_to_install(diagnosis: Diagnosis, monkeypatch, tmp_path) -> None:
    report._plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'kquant\[report\]'"):
        diagnosis.save_html(tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_summary_says_the_outcome_in_40_lines(diagnosis: Diagnosis, monkeypatch) -> None:
    many = replace(diagnosis, stages=diagnosis.stages * 5, findings=diagnosis.findings * 5, advice=diagnosis.advice * 5)
    other = {key: f"other {key}" for key in diagnosis.config}
    for columns in ("60", "80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        for d in (diagnosis, many, replace(many, recommendation=other, verdict="word " * 100)):
            lines = str(d).splitlines()
            assert len(lines) <= 40 and all(len(line) <= max(60, int(columns)) for line in lines[1:])
    text = str(diagnosis)
    for said in ("culprit: weights", "49.80", "-36.20", "recommended config reached 48.60", "equalize: true"):
        assert said in text
    assert "percentile" not in text  # what the recommendation leaves as it was


def test_changes_complete_the_base(diagnosis: Diagnosis) -> None:
    base = diagnosis.config
    assert changes(base, base) == {}
    other = {**base, "weights": {**base["weights"], "bits": 4}, "equalize": True, "activations": None}
    assert changes(other, base) == {"weights": {"bits": 4}, "activations": None, "equalize": True}


@pytest.mark.parametrize(
    ("score", "digits"), [(68.23, 2), (0.6823, 4), (100.0, 1), (31.4, 2), (1234.0, 0), (0.0, 4), (float("nan"), 4)]
)
def test_scores_get_four_digits(score: float, digits: int) -> None:
    assert decimals(score) == digits


def test_bins_keep_counts_and_envelopes(diagnosis: Diagnosis) -> None:
    rng = np.random.default_rng(0)
    channels = np.sort(rng.normal(0, 1, (1000, 5)) * rng.gamma(1, 1, (1000, 1)))
    wide = ChannelRanges(node="wide", before=tuple(map(tuple, channels.tolist())), after=())
    data = chart_data(replace(diagnosis, channels=(wide,)))
    (drawn,) = data["channels"]
    boxes, per = np.array(drawn["before"]).T, drawn["per"]
    assert len(boxes) <= MAX_BOXES and len(boxes) * per >= 1000 > (len(boxes) - 1) * per and drawn["after"] == []
    spans = channels[:, 4] - channels[:, 0]
    for k, box in enumerate(boxes):  # each is the widest of its channels
        group = slice(k * per, (k + 1) * per)
        np.testing.assert_allclose(box, channels[group][np.argmax(spans[group])], rtol=1e-3)
    for tensor, record in zip(data["tensors"], diagnosis.tensors, strict=True):
        assert sum(tensor["counts"]) == sum(record.counts) and len(tensor["counts"]) <= MAX_BINS
        assert len(tensor["edges"]) == len(tensor["counts"]) + 1
        assert np.isclose(tensor["edges"][-1], record.edges[-1]) and np.isclose(tensor["edges"][0], record.edges[0])
        first = np.abs(np.array(record.edges) - tensor["edges"][1]).argmin()
        assert sum(record.counts[:first]) == tensor["counts"][0]


def test_widths() -> None:
    def box(low: float, high: float) -> tuple[float, float, float, float, float]:
        return low, low, 0.0, high, high

    assert widths([box(-1, 1), box(-2, 2), box(0, 2)]) == (4.0, 2.0)
    assert widths([box(0, 0), box(0, 0), box(-1, 1)]) == (2.0, np.inf)
    assert widths([box(0, 0)]) == (0.0, 1.0)
    assert np.isnan(widths([])).all()
