"""What `kquant.diagnose` found: plain records, which the terminal summary and the HTML report are made from."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kquant.diagnosis import serialize
from kquant.diagnosis.summary import summary


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One question of the workflow, answered by a measurement.

    Attributes:
        name: short and unique, e.g. "weights only".
        question: what it answers, e.g. "How much do quantized weights cost alone?".
        score: the metric of the network that it measured, None where it measured no network.
        verdict: the answer in one sentence.
        ok: False where the answer is bad news.
    """

    name: str
    question: str
    score: float | None
    verdict: str
    ok: bool = True


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something wrong with named tensors.

    Attributes:
        kind: machine-readable, e.g. "wide_channels", "outliers", "saturation", "logits", "file_differs".
        nodes: the tensors, worst first.
        text: what was found, in one sentence with numbers.
        remedy: what to do, in one sentence.
    """

    kind: str
    nodes: tuple[str, ...]
    text: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """One quantizer, alone.

    Attributes:
        node: the node in the graph; `layer` is the user's layer it came from, `op` its operation.
        kind: "weights" or "activations".
        bits: of the quantizer.
        alone_on: the metric with this quantizer alone switched on.
        alone_off: the metric with all others on, None where not measured.
        sqnr: in dB, of the network's output with this quantizer alone on, against float.
    """

    node: str
    layer: str
    op: str
    kind: str
    bits: int
    alone_on: float
    alone_off: float | None
    sqnr: float


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """What a quantizer does to its tensor.

    Attributes:
        node, layer, op, kind, bits: as in `Sensitivity`.
        low, high: the smallest and largest value of the grid (over channels).
        seen_low, seen_high: the smallest and largest value of the tensor in the float network.
        sqnr: in dB, of the tensor alone, quantized where it stands.
        saturated: share of the values outside the grid.
        channel_ratio: largest range of a channel over the median one.
        dead_channels: channels that are constant over the data (activations), or whose weights are below 1e-6 of the
            layer's largest.
        counts, edges: histogram of the float values; lengths n and n + 1.
    """

    node: str
    layer: str
    op: str
    kind: str
    bits: int
    low: float
    high: float
    seen_low: float
    seen_high: float
    sqnr: float
    saturated: float
    channel_ratio: float
    dead_channels: int
    counts: tuple[int, ...]
    edges: tuple[float, ...]


Quartiles = tuple[float, float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class ChannelRanges:
    """Weights of each output channel of a layer, before and after equalization (figure 5 of the white paper).

    Attributes:
        node: the layer.
        before, after: by channel its smallest weight, first quartile, median, third quartile and largest weight.
    """

    node: str
    before: tuple[Quartiles, ...]
    after: tuple[Quartiles, ...]


@dataclass(frozen=True, kw_only=True)
class TargetRecord:
    """A tensor of the .tflite file beside the same tensor of the simulation, in LSBs.

    Attributes:
        node, op: which.
        alone: largest difference when the operation is fed the same integers as in the file.
        propagated: mean absolute difference end to end, with the file's own inputs.
        equal: share of elements that are equal end to end.
    """

    node: str
    op: str
    alone: float
    propagated: float
    equal: float


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image and what two networks see in it; images are JPEG files in base64.

    Attributes:
        sample: number of the sample.
        differs: share of the pixels at which the drawings differ.
        image: what the networks saw.
        float_drawn, quantized_drawn: what each makes of it.
        difference: where these differ.
    """

    sample: int
    differs: float
    image: str
    float_drawn: str
    quantized_drawn: str
    difference: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The result of `kquant.diagnose`.

    Attributes:
        model, samples, seconds: which model, on how many samples, how long it took.
        metric: its name; higher is better.
        config: what was diagnosed, as `QuantConfig.to_dict`.
        float_score, quantized_score: the metric of the float model, and of the simulation with `config`.
        target_score: that of the exported file on the interpreter, None where there is no file.
        culprit: "none", "float model", "simulation", "weights", "activations", "weights and activations" or "target".
        verdict: the outcome in one or two sentences.
        stages: the workflow, in the order in which it ran.
        findings: what is wrong, worst first.
        sensitivity: worst first; empty where a budget left it out.
        tensors: every quantizer, in the order of the network.
        channels: ranges per channel of the layers with weights.
        target: tensors of the file, in order.
        recommendation: a config for `quantize_model`, as `QuantConfig.to_dict`; None where nothing better was found.
        recommended_score: its metric, measured on the exported file where there is one.
        advice: what else can be done, in sentences.
        model_report: the report of the quantized model.
        pictures: samples of which the two networks see the most different things, where these can be drawn.
    """

    model: str
    samples: int
    seconds: float
    metric: str
    config: Mapping[str, Any]
    float_score: float
    quantized_score: float
    target_score: float | None
    culprit: str
    verdict: str
    stages: tuple[Stage, ...]
    findings: tuple[Finding, ...]
    sensitivity: tuple[Sensitivity, ...]
    tensors: tuple[TensorRecord, ...]
    channels: tuple[ChannelRanges, ...]
    target: tuple[TargetRecord, ...]
    recommendation: Mapping[str, Any] | None
    recommended_score: float | None
    advice: tuple[str, ...] = ()
    model_report: str = ""
    pictures: tuple[Picture, ...] = ()

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report: one HTML file that needs no network.

        Raises:
            MissingPackageError: plotly is not installed; `pip install 'kquant[report]'`.
        """
        from kquant.diagnosis.report import render

        pathlib.Path(path).write_text(render(self), encoding="utf-8")

    def to_json(self) -> str:
        """Everything as strict JSON; what is not finite travels as "NaN", "Infinity" or "-Infinity"."""
        return serialize.to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Diagnosis:
        """The inverse of `to_json`.

        Raises:
            DiagnosisError: the text is no diagnosis; names the field.
        """
        return serialize.from_json(cls, text)

    def __str__(self) -> str:
        return summary(self)
