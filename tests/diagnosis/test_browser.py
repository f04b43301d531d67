"""The report in a real headless browser: Debian's chromium, driven by playwright."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from experiments.screenshot import browser
from kquant.diagnosis.charts import widths

from . import example
from .example import EMPTY, EVIL

pytest.importorskip("plotly")
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")

BOXES = "#channels-chart path.box"
BARS = "() => [...document.querySelectorAll('#{} .bars path')].filter(p => p.getBoundingClientRect().width > 0).length"
CHARTS = ("waterfall", "sensitivity-chart", "channels-chart", "histogram-chart")


@dataclass
class Opened:
    """A page with all that it complained about or asked the network for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        try:
            running = browser(playwright)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        yield running
        running.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """The address of each report."""
    d, folder = example.diagnosis(), tmp_path_factory.mktemp("reports")
    evil = replace(
        d,
        metric=EVIL,
        stages=tuple(replace(s, name=EVIL) for s in d.stages),
        sensitivity=tuple(replace(s, node=EVIL) for s in d.sensitivity),
        tensors=tuple(replace(t, node=EVIL + "<b>" + t.node) for t in d.tensors),
    )
    reports = {
        "full": d,
        "empty": replace(d, **EMPTY),
        "evil": evil,
        "nan": replace(d, float_score=float("nan"), quantized_score=float("inf")),
        "unequalized": replace(d, channels=tuple(replace(c, after=()) for c in d.channels)),
    }
    for name, report in reports.items():
        report.save_html(folder / f"{name}.html")
    return {name: (folder / f"{name}.html").as_uri() for name in reports}


@pytest.fixture
def visit(chromium: Any, files: dict[str, str]) -> Iterator[Any]:
    """visit(name, **options of the browser's context) -> Opened; at the end nothing may have complained."""
    visited: list[Opened] = []

    def go(name: str = "full", **options: Any) -> Opened:
        opened = Opened(chromium.new_context(**options).new_page())
        page = opened.page
        page.on("console", lambda m: opened.complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        page.on("dialog", lambda dialog: opened.complaints.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: opened.requests.append(request.url))
        page.goto(files[name])
        page.wait_for_selector("html[data-ready]", timeout=30_000)
        visited.append(opened)
        return opened

    yield go
    for opened in visited:
        assert not opened.complaints
        assert all(url in files.values() or url.startswith(("data:", "blob:")) for url in opened.requests)
        opened.page.context.close()


def overflow(page: Any) -> int:
    return page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")


def shown(page: Any) -> list[str]:
    """The tensors in the rows that are to be seen."""
    return page.locator("#tensors-table tbody tr:visible td:first-child").all_inner_texts()


@pytest.mark.slow
def test_charts_are_drawn(visit: Any) -> None:
    page, d = visit().page, example.diagnosis()
    bars = {name: page.evaluate(BARS.replace("{}", name)) for name in CHARTS}
    assert bars["waterfall"] >= 9  # of 12 networks, some as good as float
    assert bars["sensitivity-chart"] == 40 and bars["histogram-chart"] > 30
    worst = max(
        d.channels,
        key=lambda c: widths(c.before)[1],
    )
    assert worst.node in page.locator("#channels-layer option:checked").inner_text()
    assert page.locator(BOXES).count() == 2 * len(worst.before)
    assert page.locator("#histogram-chart").inner_text().count("grid from") == 1


def test_pictures_are_shown(visit: Any) -> None:
    page = visit().page
    images = page.locator("#pictures img")
    assert images.count() == 4 * len(example.diagnosis().pictures)
    sizes = images.evaluate_all(
        "all => all.map(i => [i.naturalWidth, i.naturalHeight, i.getBoundingClientRect().width])"
    )
    assert all((width, height) == (64, 48) and shown > 100 for width, height, shown in sizes)
    assert [e.inner_text() for e in page.locator("#pictures figcaption").all()[:4]] == [
        *("Image", "Float", "Quantized", "Difference"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["empty", "evil", "nan", "unequalized"])
def test_odd_reports_open(visit: Any, name: str) -> None:
    page = visit(name).page
    assert page.locator("h1").is_visible() and page.locator("#problem").is_hidden()
    if name == "evil":  # shown as they are, run by nobody
        assert "<img" in page.locator("#waterfall").inner_text() and page.locator("main img[src=x]").count() == 0
    if name == "unequalized":
        assert "after equalization" not in page.locator("#channels-chart").inner_text()


@pytest.mark.slow
def test_search_and_filter(visit: Any) -> None:
    page = visit().page
    every = shown(page)
    assert every == [t.node for t in example.diagnosis().tensors]
    page.get_by_label("Search").fill("DW_1 relu")
    assert shown(page) == [n for n in every if "dw_1" in n and "relu" in n]
    assert page.locator("#tensors-count").inner_text() == f"{len(shown(page))} of {len(every)}"
    page.get_by_label("Search").fill("")
    page.select_option("#tensors-kind", "weights")
    assert shown(page) == [n for n in every if not n.endswith("relu")]
    page.get_by_label("Search").fill("no such tensor")
    assert shown(page) == []


@pytest.mark.slow
def test_sorting(visit: Any) -> None:
    page, tensors = visit().page, example.diagnosis().tensors
    head = page.locator("#tensors-table th", has_text="SQNR")
    for order, falling in (("descending", True), ("ascending", False)):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        expected = [t.node for t in sorted(tensors, key=lambda t: t.sqnr, reverse=falling)]
        assert shown(page) == expected
    page.locator("#tensors-table th button").first.click()
    assert head.get_attribute("aria-sort") == "none"
    assert [n for n in shown(page) if "pw" in n][::2] == [f"conv_pw_{i}" for i in range(1, 14)]  # 2 before 10


@pytest.mark.slow
def test_selectors_redraw(visit: Any) -> None:
    page, d = visit().page, example.diagnosis()
    page.select_option("#sensitivity-kind", "activations")
    page.locator("#sensitivity-all").click()
    ticks = page.locator("#sensitivity-chart .ytick text").all_text_contents()
    assert ticks == [f"{s.node} · a8" for s in d.sensitivity if s.kind == "activations"]
    page.select_option("#channels-layer", "0")
    assert page.locator(BOXES).count() == 2 * len(d.channels[0].before)
    page.select_option("#histogram-tensor", "4")
    assert f"{d.tensors[4].high:.3g}" in page.locator("#histogram-chart").inner_text()
    page.get_by_label("Logarithmic counts").uncheck()
    assert page.evaluate("() => byId('histogram-chart').layout.yaxis.type") == "linear"


@pytest.mark.slow
def test_keyboard(visit: Any) -> None:
    """The skip link first, then the order of the page; what has the focus shows it."""
    page = visit().page
    names, outlines = [], []
    focused = "[document.activeElement, getComputedStyle(document.activeElement).outlineStyle]"
    page.keyboard.press("Tab")
    while page.evaluate("() => document.activeElement !== document.body"):
        name, outline = page.evaluate(
            f"() => {{ const [e, o] = {focused}; return [e.id || e.className || e.textContent, o]; }}"
        )
        names.append(name)
        outlines.append(outline)
        page.keyboard.press("Tab")
    assert names[0] == "skip" and names[1] == "Verdict"
    order = ["recommended-yaml", "sensitivity-kind", "sensitivity-all", "channels-layer", "histogram-tensor", "search"]
    assert [names.index(name) for name in order] == sorted(names.index(name) for name in order)
    assert set(outlines) == {"solid"}
    page.locator("#target-table th button").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#target-table th").first.get_attribute("aria-sort") == "ascending"


@pytest.mark.slow
def test_no_horizontal_scroll(visit: Any) -> None:
    page = visit(viewport={"width": 375, "height": 800}).page
    for part in page.locator("details > summary").all():
        part.click()
    for width in (375, 320, 768, 1200):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_function(
            "() => { const chart = document.querySelector('#waterfall'); "
            "return chart.querySelector('.main-svg').clientWidth === chart.clientWidth; }"
        )
        assert overflow(page) == 0


@pytest.mark.slow
def test_dark_scheme(visit: Any) -> None:
    """Charts follow, also when the scheme changes while the page is open."""
    page = visit(color_scheme="dark").page
    light_text = "() => getComputedStyle(document.querySelector('#waterfall .ytick text')).fill"
    brightness = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert max(page.evaluate(brightness)) < 60
    assert min(int(v) for v in page.evaluate(light_text)[4:-1].split(",")) > 200
    page.emulate_media(color_scheme="light")
    assert min(page.evaluate(brightness)) > 200
    assert max(int(v) for v in page.evaluate(light_text)[4:-1].split(",")) < 60


@pytest.mark.slow
def test_print(visit: Any) -> None:
    """Light, charts at the width of the page, everything open; afterwards as before."""
    page = visit(color_scheme="dark").page
    page.evaluate("() => dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#waterfall .main-svg").first.bounding_box()["width"] == 680
    assert page.locator("details:not([open])").count() == 0
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden() and page.locator("#search").is_hidden()
    page.emulate_media(media="screen")
    page.evaluate("() => dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert page.locator("#waterfall .main-svg").first.bounding_box()["width"] > 680


@pytest.mark.slow
def test_copy(visit: Any) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"]).page
    page.locator(".copy").first.click()
    page.get_by_text("Copied").wait_for(timeout=5_000)
    assert page.evaluate("() => navigator.clipboard.readText()") == page.locator("#recommended-yaml").inner_text()
