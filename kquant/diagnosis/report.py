"""The diagnosis as one HTML file that opens offline: text and tables are written here, page.js draws the charts.

Without JavaScript everything but the charts and the sorting is there. plotly.js is packed with gzip, which keeps the
file at half the size; the browser unpacks it.
"""

from __future__ import annotations

import base64
import functools
import gzip
import string
from collections.abc import Mapping
from importlib import resources
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from kquant.diagnosis.charts import chart_data, widths
from kquant.diagnosis.markup import (
    Column,
    chart,
    decibel,
    details,
    embed,
    escape,
    number,
    percent,
    select,
    table,
)
from kquant.diagnosis.summary import changes, decimals, to_yaml
from kquant.errors import MissingPackageError

if TYPE_CHECKING:
    from kquant.diagnosis.records import Diagnosis


def render(diagnosis: Diagnosis) -> str:
    """The report as an HTML document.

    Raises:
        MissingPackageError: plotly is not installed.
    """
    d = diagnosis
    parts = [(name, title, body) for name, title, write in _SECTIONS if (body := write(d))]
    page = string.Template(_file("page.html"))
    return page.substitute(
        model=escape(d.model),
        subtitle=escape(f"{d.metric} on {d.samples:,} samples, diagnosed in {_duration(d.seconds)}"),
        style=_file("page.css"),
        links="".join(f'<li><a href="#{name}">{title.split(",")[0]}</a></li>' for name, title, _ in parts),
        sections="\n".join(_section(*part) for part in parts),
        data=embed(chart_data(d)),
        plotly=_plotly(),
        script=_file("page.js"),
    )


@functools.cache
def _plotly() -> str:
    """plotly.js, packed: base64 of gzip."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingPackageError(
            "The HTML report draws its charts with plotly, which is not installed: pip install 'kquant[report]'. "
            "print(diagnosis) and diagnosis.to_json() work without it."
        ) from error
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _file(name: str) -> str:
    return resources.files("kquant.diagnosis").joinpath(name).read_text(encoding="utf-8")


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>\n{body}</section>'


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _none(text: str) -> str:
    return f'<p class="none">{escape(text)}</p>'


def _verdict(d: Diagnosis) -> str:
    good = d.culprit == "none"
    label = "No culprit" if good else f"Culprit: {d.culprit}"
    tiles = [
        ("Float model", d.float_score),
        ("Quantized, simulation", d.quantized_score),
        ("Quantized, .tflite file", d.target_score),
        ("Recommended config", d.recommended_score),
    ]
    return (
        f'<div class="verdict {"good" if good else "bad"}"><p class="culprit">'
        f'<span class="mark" aria-hidden="true">{"✓" if good else "!"}</span>{escape(label)}</p>'
        f"<p>{escape(d.verdict)}</p></div>"
        f'<dl class="tiles">{"".join(_tile(d, title, score) for title, score in tiles)}</dl>'
    )


def _tile(d: Diagnosis, title: str, score: float | None) -> str:
    if score is None:
        return f"<div><dt>{title}</dt><dd>–</dd><dd class='delta'>not measured</dd></div>"
    delta = d.metric if title == "Float model" else f"{_delta(d, score)} to float"
    return f"<div><dt>{title}</dt><dd>{_score(d, score)}</dd><dd class='delta'>{escape(delta)}</dd></div>"


def _score(d: Diagnosis, score: float) -> str:
    return f"{score:.{decimals(d.float_score)}f}".replace("-", "−")


def _delta(d: Diagnosis, score: float) -> str:
    return f"{score - d.float_score:+.{decimals(d.float_score)}f}".replace("-", "−")


def _recommendation(d: Diagnosis) -> str:
    if d.recommendation is None:
        body = _none("No config was found that does better than the one diagnosed.")
    else:
        reached = ""
        if (score := d.recommended_score) is not None:
            reached = f"It reached <strong>{_score(d, score)}</strong>, {_delta(d, score)} to float. "
        different = to_yaml(changes(d.recommendation, d.config)).strip()
        body = (
            f"<p>{reached}What changes:</p><pre>{escape(different)}</pre>"
            "<p class='lead'>The whole of it, for <code>quantize_model(model, data, config=\"config.yaml\")</code>:</p>"
            + _config(d.recommendation, "recommended")
        )
    if d.advice:
        body += f"<h3>What else can be done</h3><ul>{''.join(f'<li>{escape(a)}</li>' for a in d.advice)}</ul>"
    return body + details("The config that was diagnosed", _config(d.config, "diagnosed"))


def _config(config: Mapping[str, Any], name: str) -> str:
    """A config as YAML with a button that copies it."""
    return (
        f'<div class="code"><button type="button" class="copy" data-copies="{name}-yaml">Copy</button>'
        f'<pre id="{name}-yaml" tabindex="0" aria-label="{name} config">{escape(to_yaml(config))}</pre></div>'
    )


def _waterfall(d: Diagnosis) -> str:
    return (
        "<p>Each bar begins at the score of the float model and ends at the score that a network reached: its length "
        "is what was lost.</p>"
        + chart("waterfall", f"{d.metric} of every network that was measured; the workflow below lists the numbers.")
    )


def _pictures(d: Diagnosis) -> str:
    """Nothing where there are none, which is usual."""
    if not d.pictures:
        return ""
    rows = []
    for p in d.pictures:
        panels = (
            ("Image", p.image),
            ("Float", p.float_drawn),
            ("Quantized", p.quantized_drawn),
            ("Difference", p.difference),
        )
        figures = "".join(
            f'<figure><img src="data:image/jpeg;base64,{content}" alt="Sample {p.sample}: {title.lower()}">'
            f"<figcaption>{title}</figcaption></figure>"
            for title, content in panels
        )
        rows.append(
            f"<li><h3>Sample {p.sample}</h3><p>The two differ at {escape(percent(p.differs))} of the pixels.</p>"
            f'<div class="panels">{figures}</div></li>'
        )
    return (
        "<p>What the float network and the quantized one make of the same image, for the samples on which they differ "
        f'most.</p><ol class="pictures">{"".join(rows)}</ol>'
    )


def _workflow(d: Diagnosis) -> str:
    if not d.stages:
        return _none("No stage was run.")
    items = []
    for stage in d.stages:
        kind, mark, said = ("good", "✓", "fine") if stage.ok else ("bad", "!", "bad news")
        score = "" if stage.score is None else f"{_score(d, stage.score)} <small>({_delta(d, stage.score)})</small>"
        items.append(
            f'<li class="{kind}"><span class="mark" role="img" aria-label="{said}">{mark}</span>'
            f'<div><h3>{escape(stage.name)}</h3><p class="question">{escape(stage.question)}</p>'
            f'<p>{escape(stage.verdict)}</p></div><p class="score">{score}</p></li>'
        )
    return f'<ol class="stages">{"".join(items)}</ol>'


def _findings(d: Diagnosis) -> str:
    if not d.findings:
        return _none("Nothing wrong with any tensor was found.")
    cards = []
    for finding in d.findings:
        shown = "".join(f"<li><code>{escape(node)}</code></li>" for node in finding.nodes[:12])
        more = f"<li>and {len(finding.nodes) - 12} more</li>" if len(finding.nodes) > 12 else ""
        cards.append(
            f"<li><h3>{escape(finding.kind.replace('_', ' ').capitalize())}</h3><p>{escape(finding.text)}</p>"
            f'<p class="remedy"><strong>Remedy:</strong> {escape(finding.remedy)}</p>'
            f'<ul class="nodes">{shown}{more}</ul></li>'
        )
    return f'<ul class="cards">{"".join(cards)}</ul>'


def _sensitivity(d: Diagnosis) -> str:
    if not d.sensitivity:
        return _none("Not measured: the sample budget left it out.")
    kinds = [("", "weights and activations"), ("weights", "weights"), ("activations", "activations")]
    columns = (
        *_NAMES,
        Column(f"{d.metric}, alone on", attrgetter("alone_on"), number),
        Column("lost", lambda s: d.float_score - s.alone_on, number),
        Column("alone off", attrgetter("alone_off"), number),
        Column("won", lambda s: None if s.alone_off is None else s.alone_off - d.quantized_score, number),
        Column("SQNR of output, dB", attrgetter("sqnr"), decibel),
    )
    caption = "Sensitivity of every quantizer, worst first"
    return (
        "<p>The score that is lost with one quantizer alone switched on, and the score that is won back with that one "
        "alone switched off.</p>"
        f'<div class="controls">{select("sensitivity-kind", "Show", kinds)}'
        '<button type="button" id="sensitivity-all" aria-expanded="false">Show all</button></div>'
        + chart("sensitivity-chart", "Bars per quantizer, worst first; the table below holds the numbers.")
        + details(f"Table: {caption.lower()}", table("sensitivity-table", caption, columns, d.sensitivity))
    )


def _channels(d: Diagnosis) -> str:
    if not d.channels:
        return _none("No layer with weights was recorded.")
    ratios = [widths(c.before)[1] for c in d.channels]
    order = sorted(range(len(ratios)), key=lambda i: -ratios[i] if ratios[i] == ratios[i] else 0.0)
    options = [(str(i), f"{d.channels[i].node} (widest / median {number(ratios[i])})") for i in order]
    columns = (
        Column("layer", attrgetter("node")),
        Column("channels", lambda c: len(c.before), number),
        Column("widest, before", lambda c: widths(c.before)[0], number),
        Column("widest / median, before", lambda c: widths(c.before)[1], number),
        Column("widest, after", lambda c: widths(c.after)[0], number),
        Column("widest / median, after", lambda c: widths(c.after)[1], number),
    )
    caption = "Weight ranges of all layers"
    return (
        "<p>The weights of every output channel: smallest, quartiles and largest. With one scale per tensor the widest "
        "channel sets the step of all; equalization makes them alike (figures 2 and 5 of the white paper). "
        "Worst layer first.</p>"
        f'<div class="controls">{select("channels-layer", "Layer", options)}</div>'
        + chart("channels-chart", "A box for each channel before and after equalization; the table below sums it up.")
        + details(f"Table: {caption.lower()}", table("channels-table", caption, columns, d.channels))
    )


def _distributions(d: Diagnosis) -> str:
    if not d.tensors:
        return _none("No tensor was recorded.")
    indices = [i for i, t in enumerate(d.tensors) if t.counts and t.kind == "activations"]
    worst = min(indices, key=lambda i: d.tensors[i].sqnr, default=0)
    options = [
        (str(i), f"{t.node} ({t.kind}, {t.bits} bits, SQNR {decibel(t.sqnr)} dB)") for i, t in enumerate(d.tensors)
    ]
    return (
        "<p>The float values of a tensor and the grid that was chosen for them: what lies beyond its edges saturates, "
        "and a grid far wider than the values wastes its steps.</p>"
        f'<div class="controls">{select("histogram-tensor", "Tensor", options, worst)}'
        '<label class="control"><input type="checkbox" id="histogram-log" checked> Logarithmic counts</label></div>'
        + chart("histogram-chart", "Histogram with the edges of the grid; the table of all tensors holds the numbers.")
    )


def _target(d: Diagnosis) -> str:
    if not d.target:
        return _none("No .tflite file was compared.")
    differing = [t for t in d.target if t.propagated or t.alone]
    own = sum(t.alone >= 1 for t in d.target)
    columns = (
        Column("tensor", attrgetter("node")),
        Column("op", attrgetter("op")),
        Column("alone, largest LSB", attrgetter("alone"), number),
        Column("end to end, mean LSB", attrgetter("propagated"), number),
        Column("equal", attrgetter("equal"), percent),
    )
    return (
        f"<p>{len(d.target) - len(differing)} of {len(d.target)} tensors of the .tflite file equal the simulation; "
        f"{own} operations differ by themselves, fed the simulation's own integers.</p>"
        + table("target-table", "The .tflite file beside the simulation, in LSBs", columns, d.target)
    )


def _tensors(d: Diagnosis) -> str:
    if not d.tensors:
        return _none("No tensor was recorded.")
    kinds = [("", "weights and activations"), ("weights", "weights"), ("activations", "activations")]
    return (
        '<div class="controls"><label class="control">Search <input type="search" id="search" '
        'placeholder="tensor, layer or op" autocomplete="off" spellcheck="false"></label>'
        f'{select("tensors-kind", "Show", kinds)}<output id="tensors-count" aria-live="polite"></output></div>'
        + table("tensors-table", "Every quantizer", _TENSOR_COLUMNS, d.tensors)
    )


def _model(d: Diagnosis) -> str:
    if not d.model_report:
        return _none("No report of the quantized model.")
    return details("Grids, steps and what stays float", f'<pre tabindex="0">{escape(d.model_report)}</pre>')


_NAMES = (
    Column("tensor", attrgetter("node")),
    Column("layer", attrgetter("layer")),
    Column("op", attrgetter("op")),
    Column("kind", attrgetter("kind")),
    Column("bits", attrgetter("bits"), number),
)
_TENSOR_COLUMNS = (
    *_NAMES,
    Column("SQNR, dB", attrgetter("sqnr"), decibel),
    Column("saturated", attrgetter("saturated"), percent),
    Column("widest / median channel", attrgetter("channel_ratio"), number),
    Column("dead channels", attrgetter("dead_channels"), number),
    Column("grid from", attrgetter("low"), number),
    Column("grid to", attrgetter("high"), number),
    Column("values from", attrgetter("seen_low"), number),
    Column("values to", attrgetter("seen_high"), number),
)
_SECTIONS = (
    ("verdict", "Verdict", _verdict),
    ("recommendation", "Recommendation", _recommendation),
    ("accuracy", "Accuracy, from float to quantized", _waterfall),
    ("pictures", "Pictures, float beside quantized", _pictures),
    ("workflow", "Workflow", _workflow),
    ("findings", "Findings", _findings),
    ("sensitivity", "Sensitivity", _sensitivity),
    ("channels", "Weight ranges", _channels),
    ("distributions", "Distributions", _distributions),
    ("target", "Target, beside the simulation", _target),
    ("tensors", "All tensors", _tensors),
    ("model", "Model", _model),
)
