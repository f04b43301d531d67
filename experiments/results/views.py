"""The tables of the documents: which cells of which files they show, and the lines between their marks.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import FOLDER, Row, heading, markdown, read

MARKED = re.compile(r"(?P<begin><!-- table: (?P<name>\S+) -->\n)(?P<table>.*?)(?P<end><!-- end -->)", re.S)
Column = str | tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class View:
    """A table of a document.

    Attributes:
        source: name of the file.
        columns: heading -> column of the file; or, with `by`, (column, value of `by`): the cell of that row.
        by: column that tells apart the rows of a model (or whatever the first column names) that become one row of the
            table; None to keep rows as they are.
        where: column -> the values it may have.
        labels: cell -> what the table calls it.
    """

    source: str
    columns: Mapping[str, Column]
    by: str | None = None
    where: Mapping[str, Collection[str]] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def lines(self, folder: Path = FOLDER) -> list[str]:
        """The Markdown lines."""
        rows = [r for r in read(self.source, folder) if all(r[c] in values for c, values in self.where.items())]
        groups: dict[object, dict[str, Row]] = {}
        for number, row in enumerate(rows):
            group = number if self.by is None else row[next(iter(row))]
            groups.setdefault(group, {})[row[self.by] if self.by else ""] = row
        body = [[self._cell(group, column) for column in self.columns.values()] for group in groups.values()]
        return [*heading(list(self.columns)), *map(markdown, body)]

    def _cell(self, group: Mapping[str, Row], column: Column) -> str:
        if isinstance(column, str):
            cell = next(iter(group.values()))[column]
        else:
            cell = group[column[1]][column[0]] if column[1] in group else "-"
        return self.labels.get(cell, cell) or "-"


def filled(text: str, views: Mapping[str, View], folder: Path = FOLDER) -> str:
    """A document with the tables between its marks made anew.

    Raises:
        KeyError: a mark names no view.
    """

    def table(found: re.Match[str]) -> str:
        lines = "\n".join(views[found["name"]].lines(folder))
        return f"{found['begin']}{lines}\n{found['end']}"

    return MARKED.sub(table, text)


def _variants(column: str, variants: Mapping[str, str]) -> dict[str, Column]:
    """Heading -> the cell of a variant."""
    return {heading: (column, variant) for heading, variant in variants.items()}


NAMES = {
    "mobilenet_v1": "MobileNetV1 0.25, ImageNet",
    "mobilenet_v2": "MobileNetV2 1.0, ImageNet",
    "resnet8": "ResNet8, CIFAR-10",
    "resnet20": "ResNet20, CIFAR-10",
    "resnet56": "ResNet56, CIFAR-10",
    "ds_cnn": "DS-CNN, speech commands",
}
PRESETS = ("w8a8", "w8a8-per_tensor", "w4a8", "w4a4")
CALIBRATED = {"calibration": ("200", "500")}  # as many samples as everywhere else
EQUALIZED = "CLE, dead channels, activations"
_MODEL: dict[str, Column] = {"model": "model", "float": "float"}

VIEWS: Mapping[str, View] = {
    "deployed": View(
        source="accuracy",
        columns={
            **{"model": "model", "samples": "samples", "float": "float"},
            **{"kquant w8a8": "w8a8 .tflite", "converter": "converter"},
            **{"kquant bytes": "bytes", "converter bytes": "converter bytes"},
        },
        labels=NAMES,
    ),
    "presets": View(
        source="configs",
        by="config",
        where=CALIBRATED,
        columns={
            **{"model": "model", "float": ("float", "w8a8")},
            **_variants(".tflite", dict(zip(PRESETS, PRESETS, strict=True))),
            **_variants("bytes", {f"{preset} bytes": preset for preset in ("w8a8", "w4a8")}),
        },
    ),
    "parity": View(
        source="parity",
        by="config",
        columns={
            "model": "model",
            **_variants("equal %", {f"{preset}, equal %": preset for preset in ("w8a8", "w4a8", "w4a4", "w8a16")}),
            **_variants(
                "kernels equal %", {f"{preset}, kernels equal %": preset for preset in ("w8a8", "w4a8", "w4a4")}
            ),
        },
    ),
    "equalization": View(
        source="table_3",
        by="variant",
        columns={
            **_MODEL,
            **_variants("W8A8 .tflite", {"plain": "original", "dead channels": "dead channels", "CLE": "CLE"}),
            **_variants("W8A8 .tflite", {"CLE, dead channels": "CLE, dead channels", "and activations": EQUALIZED}),
            **_variants("W8A8 .tflite", {"and absorption": f"{EQUALIZED} + absorption"}),
            **_variants("W8A8 .tflite", {"per channel": "original, per channel"}),
        },
    ),
    "rounding": View(
        source="table_5",
        by="variant",
        columns={
            **_MODEL,
            **_variants("W4", {"nearest": "nearest", "and biases": "nearest, bias correction"}),
            **_variants("W4", {"descent, symmetric": "descent, symmetric", "descent": "descent, asymmetric"}),
            **_variants("W4", {"gram": "gram, asymmetric", "stochastic": "stochastic, asymmetric"}),
            "seconds of descent": ("seconds", "descent, asymmetric"),
        },
    ),
    "pipeline": View(
        source="table_6",
        by="variant",
        columns={
            **_MODEL,
            **_variants(
                "W8A8 .tflite", {"W8A8 per tensor": "per tensor, data", "W8A8 per channel": "per channel, data"}
            ),
            **_variants("W8A8 .tflite", {"W8A8 per tensor, no data": "per tensor, no data"}),
            **_variants(
                "W4A8 .tflite", {"W4A8 per tensor": "per tensor, data", "W4A8 per channel": "per channel, data"}
            ),
            **_variants("W4A8 .tflite", {"W4A8 per channel, no data": "per channel, no data"}),
        },
    ),
    "training": View(
        source="training",
        by="variant",
        columns={
            "model": "model",
            **_variants("trained", {name: name for name in ("float", "w8a8", "w4a8", "w4a4", "w4a4, distilled")}),
            **_variants("trained", {f"{p}, kept": f"{p}, batch norm kept" for p in ("w4a8", "w4a4")}),
        },
    ),
    "training_widths": View(
        source="table_10",
        by="variant",
        columns={
            f"{preset}, {granularity}": ("trained .tflite", f"{preset}, {granularity}")
            for preset in ("w8a8", "w4a8", "w4a4")
            for granularity in ("per tensor", "per channel")
        },
    ),
    "cost": View(
        source="cost",
        columns={"200 images": "what", "kquant": "kquant", "converter": "converter", "ratio": "ratio"},
    ),
    "targets": View(
        source="targets",
        columns={
            **{"model": "model", "preset": "preset", "target": "target", "bytes": "bytes", "arena": "arena"},
            **{"accelerator": "accelerator", "SRAM": "sram", "flash": "flash", "cycles": "cycles"},
            **{"CPU operators": "cpu_operators", "top-1": "top1", "default": "top1_default", "samples": "samples"},
        },
    ),
    "formats": View(
        source="formats",
        columns={
            **{"model": "model", "config": "config", "rounding": "rounding", "float": "float", "drop": "drop"},
            **{"KL": "kl", "bits": "entropy"},
            **{"Vela flash": "flash", "xz": "xz", "samples": "samples"},
        },
    ),
    "packing": View(
        source="packing",
        columns={
            **{"model": "model", "preset": "preset", ".tflite": "bytes", "xz -9e": "xz", "packed": "packed"},
            **{"smaller than xz, %": "smaller_than_xz", "TFLM": "tflm_bytes"},
            **{"arena": "arena", "arena, TFLM": "tflm_arena"},
        },
    ),
    "latency": View(
        source="latency",
        columns={
            **{"model": "model", "preset": "preset", "prefer": "prefer", "bytes": "bytes", "ms": "ms"},
            **{"to w8a8": "to the first preset", "top-1": "top-1", "samples": "samples"},
        },
    ),
    "search": View(
        source="search",
        columns={
            **{"model": "model", "budget": "budget", "solver": "solver", "bytes": "bytes", "KL": "file"},
            **{"to uniform": "file to uniform", "top-1": "top-1", "uniform top-1": "uniform top-1"},
            **{"uniform bytes": "uniform bytes", "seconds": "seconds"},
        },
    ),
    "scenes": View(
        source="scenes",
        columns={
            **{"task": "task", "setting": "setting", "config": "config", "float": "float", ".tflite": ".tflite"},
            **{"bytes": "bytes", "integers only": "integer only", "contract": "contract", "scenes": "frames"},
        },
    ),
    "scenes_training": View(
        source="scenes_training",
        columns={
            **{"task": "task", "variant": "variant", "epochs": "epochs", "before": "before", "after": "after"},
            **{"to float": "difference", "contract": "contract"},
        },
    ),
    "diagnosis": View(
        source="diagnosis",
        columns={
            **{"model": "model", "float": "float, all samples", "steps off": "steps off, all samples"},
            **{"culprit": "culprit", "recommended": "recommended", "recommended, top-1": "recommended .tflite"},
            "pipeline, top-1": "pipeline .tflite",
        },
    ),
}
