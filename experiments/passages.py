"""How models of others go through: quantized, exported, file and simulation compared; a row of a table each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from kquant.errors import KQuantError

HEADER = "| model | operators | file = simulation | dB | in float |\n| --- | --- | --- | --- | --- |"


@dataclass(frozen=True)
class Passage:
    """How a model went through.

    Attributes:
        name: of the model.
        operators: of the file.
        floats: (layer, reason) of those that compute in float.
        sqnr: of the file's outputs against the float model, in dB; that of the worst output.
        parity: what `verify_tflite` says.
    """

    name: str
    operators: int
    floats: Sequence[tuple[str, str]]
    sqnr: float
    parity: Any

    @property
    def row(self) -> tuple[str, ...]:
        """Of the table."""
        types = Counter(reason for _, reason in self.floats)
        floats = "; ".join(f"{count} x {reason}" for reason, count in types.items())
        agrees = "yes" if self.parity.ok else "NO"
        return self.name, str(self.operators), agrees, f"{self.sqnr:.1f}", floats or "-"


def sqnr(expected: Any, found: Any) -> float:
    """Signal to quantization noise of the worst of some outputs, in dB."""

    def of(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(10 * np.log10(np.sum(a**2) / max(np.sum((a - b) ** 2), 1e-30)))

    return min(map(of, keras.tree.flatten(expected), keras.tree.flatten(found)))


def passage(name: str, model: keras.Model, data: Any, config: str = "w8a8") -> Passage:
    """Quantize, export and verify a model."""
    import kquant

    qmodel = kquant.quantize_model(model, data, config=config, progress=False)
    report = kquant.export_tflite(qmodel)
    parity = kquant.verify_tflite(qmodel, report.content, data)
    found = kquant.TFLiteModel(report.content).predict(data)
    expected = model(data, training=False)  # `predict` of a task decodes
    return Passage(name, sum(report.op_counts.values()), report.float_ops, sqnr(expected, found), parity)


def row(name: str, build: Callable[[], Any], samples: Callable[[Any], Any], config: str = "w8a8") -> str:
    """Of a table: how a model went through, or who refused it and why.

    Args:
        name: of the model, for the table.
        build: what makes it.
        samples: model -> data for it.
        config: a preset.
    """
    return "| " + " | ".join(_cells(name, build, samples, config)) + " |"


def _cells(name: str, build: Callable[[], Any], samples: Callable[[Any], Any], config: str) -> Sequence[str]:
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    try:
        model = build()
    except Exception as error:  # some need weights, or packages, of their own
        return name, "", "", "", _line("not built", error)
    try:
        return passage(name, model, samples(model), config).row
    except KQuantError as error:
        return name, "", "", "", _line("refused", error)
    except Exception as error:  # a fault of kquant
        return name, "", "", "", _line(f"FAILS, {type(error).__name__}", error)


def _line(kind: str, error: Exception) -> str:
    return f"{kind}: " + " ".join(str(error).split()).replace("|", "/")
