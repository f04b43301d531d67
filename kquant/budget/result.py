"""What a search found: plain records, printed, as JSON, and as a page."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kquant.config.quant_config import QuantConfig
from kquant.config.text import plain, table


@dataclass(frozen=True, kw_only=True)
class LayerBits:
    """What was chosen for one layer.

    Attributes:
        layer: the user's.
        bits: of its weights.
        weights: how many it has.
        macs: its multiplications.
        alone: number of bits -> how far the outputs move with this layer alone at so many.
    """

    layer: str
    bits: int
    weights: int
    macs: int
    alone: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A config that was quantized for real, and its file scored on samples that quantization did not see.

    Attributes:
        name: where it came from: the solver, "uniform", "most bits".
        bits: of the weights of each layer, in order.
        costs: "max_bytes" -> bytes of the file, and likewise what else was asked for.
        score: the metric of the file.
        distance: of the file's outputs from the float network's (`passes.distance`).
        weights_alone: the distance of the float network with these weights, by a forward pass on other samples.
    """

    name: str
    bits: tuple[int, ...]
    costs: Mapping[str, float]
    score: float
    distance: float
    weights_alone: float

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return int(self.costs["max_bytes"])


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """A config within budgets, and what was tried on the way to it.

    Attributes:
        config: for `quantize_model` and `prepare_qat`.
        best: its evaluation.
        evaluations: all that were made, in order.
        layers: what `config` gives each layer, and why.
        budgets: what was asked for.
        metric: what `score` is.
        float_score: of the float model.
        solver: its name.
        passes: how many forward passes were made.
        seconds: what it took.
        notes: what a reader should know.
    """

    config: QuantConfig
    best: Evaluation
    evaluations: tuple[Evaluation, ...]
    layers: tuple[LayerBits, ...]
    budgets: Mapping[str, float]
    metric: str
    float_score: float
    solver: str
    passes: int
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def front(self) -> tuple[Evaluation, ...]:
        """The evaluations that no other beats in bytes and distance, smallest first."""
        found: list[Evaluation] = []
        for e in sorted(self.evaluations, key=lambda e: (e.bytes, e.distance)):
            if not found or e.distance < found[-1].distance:
                found.append(e)
        return tuple(found)

    def __str__(self) -> str:
        budgets = ", ".join(f"{k}={v:,.6g}" for k, v in self.budgets.items())
        head = [
            f"{self.solver} within {budgets}: {self.best.bytes:,} bytes, {self.metric} {self.best.score:.4g} "
            f"(float {self.float_score:.4g}), {self.passes} passes, {self.seconds:.0f} s"
        ]
        rows = [
            (e.name, *(_cost(k, v) for k, v in e.costs.items()), f"{e.score:.4g}", f"{e.distance:.4g}")
            for e in self.evaluations
        ]
        header = ("evaluated", *(_TITLES[k] for k in self.best.costs), self.metric, "distance to float")
        layers = [(x.layer, x.bits, f"{x.weights:,}", f"{x.alone.get(x.bits, 0):.3g}") for x in self.layers]
        return "\n".join(
            [*head, "", table(header, rows), "", table(("layer", "bits", "weights", "distance alone"), layers)]
            + [f"note: {note}" for note in self.notes]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {**plain(asdict_without_config(self)), "config": self.config.to_dict()}

    def to_json(self) -> str:
        """A JSON document."""
        return json.dumps(self.to_dict(), indent=1)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page that opens offline."""
        from kquant.budget.page import search_page

        pathlib.Path(path).write_text(search_page(self), encoding="utf-8")


_TITLES = {"max_bytes": "bytes", "max_latency": "ms", "max_arena": "arena", "max_flash": "flash"}


def _cost(kind: str, value: float) -> str:
    return f"{1e3 * value:.4f}" if kind == "max_latency" else f"{value:,.0f}"


def asdict_without_config(result: SearchResult) -> dict[str, Any]:
    """The fields as plain values, but for the config, which says itself how it is stored."""
    values = {k: v for k, v in vars(result).items() if k != "config"}
    values |= {"best": asdict(result.best), "front": [asdict(e) for e in result.front]}
    values |= {k: [asdict(v) for v in getattr(result, k)] for k in ("evaluations", "layers")}
    return values
