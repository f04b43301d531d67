"""`export_tflite`: write a quantized model as a TFLite file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import keras

from kquant.config.text import table
from kquant.errors import ExportError
from kquant.graph.quantized import QuantizedGraph
from kquant.keras.model import extract
from kquant.targets.choice import slow_layers
from kquant.targets.litert.writer import Row, write_tflite
from kquant.targets.storage.constants import Stored
from kquant.targets.target import Target


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        content: the file.
        rows: one per node: operators, types and bytes of its constants.
        op_counts: TFLite operator -> count.
        float_ops: (node, reason) of everything that computes in float.
        notes: what a user of the file should know.
        path: where the file was written, None if nowhere.
        stored: how the weights are stored, where `compress` says so.
    """

    content: bytes = field(repr=False)
    rows: tuple[Row, ...] = field(repr=False)
    op_counts: Mapping[str, int]
    float_ops: tuple[tuple[str, str], ...]
    path: str | None = None
    notes: tuple[str, ...] = ()
    stored: tuple[Stored, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self.content)

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {op}" for op, n in sorted(self.op_counts.items(), key=lambda i: -i[1]))
        lines = [f"{self.path or 'TFLite model'}: {self.bytes:,} bytes, {counts}"]
        if self.float_ops:
            lines += ["computes in float:", table(("node", "reason"), self.float_ops)]
        else:
            lines.append("every operation is an integer operation")
        if self.stored:
            ways = ", ".join(f"{n} {how}" for how, n in Counter(s.how for s in self.stored).items())
            before, after = sum(s.plain for s in self.stored), sum(s.bytes for s in self.stored)
            lines.append(f"weights: {before:,} bytes stored in {after:,}: {ways}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def export_tflite(
    model: keras.Model,
    path: str | os.PathLike[str] | None = None,
    *,
    mode: str = "integer",
    input_type: str | None = None,
    output_type: str | None = None,
    allow_float: bool = True,
    compress: str | None = None,
) -> ExportReport:
    """Write a quantized model as a TFLite file, its integers and scales verbatim.

    The signature "serving_default" has the model's input and output names; the batch stays dynamic.

    Args:
        model: the result of `quantize_model`.
        path: where to write; None only returns the content.
        mode: "integer" (the program that the model simulates), or a file with float activations:
            "dynamic_range" (integer weights, activations quantized on the fly), "weight_only"
            (integer weights, dequantized on load), "float16" (half-precision weights), "float32": of the weights as
            the model has them, which are on their grids where AdaRound or bias correction decided them.
        input_type, output_type: "int8", "uint8", "int16" or "float32"; by default what the model's
            own input and output grids are.
        allow_float: False refuses a file in which anything computes in float (mode "integer").
        compress: store the weights in fewer bytes, where that shortens the file; the same is computed. "tflm", of
            models for target "tflm": as tables, Huffman codes or masks, which the operator DECODE writes into the arena
            (it needs a build of TensorFlow Lite Micro with that operator, the largest such tensor's bytes of arena
            more, and time for each inference). "densify", of models for target "litert" whose weights are
            zeros by more than half: as sparse tensors, which XNNPACK writes out once, at full speed; kernels without
            that delegate compute the same and may take longer.

    Raises:
        ModelError: `model` is not a quantized model.
        ExportError: something would be refused, or silently computed wrongly, by the target's
            kernels; or float operations remain and `allow_float` is False.
    """
    qgraph = extract(model)
    reasons = {s.node: s.reason for s in model.quantization.skipped}
    content, report = write_tflite(
        qgraph,
        target=model.target,
        mode=mode,
        input_type=input_type,
        output_type=output_type,
        float_reasons=reasons,
        compress=compress,
    )
    float_ops = tuple(report.float_nodes.items())
    if float_ops and mode == "integer" and not allow_float:
        raise ExportError(
            "These operations compute in float, and allow_float=False:\n" + table(("node", "reason"), float_ops)
        )
    if path is not None:
        Path(path).write_bytes(content)
    written = None if path is None else os.fspath(path)
    notes = (*_notes(qgraph), *_slow(qgraph, model.target)) if mode == "integer" else ()
    return ExportReport(content, report.rows, report.op_counts, float_ops, written, notes, report.stored)


def _notes(qgraph: QuantizedGraph) -> Iterator[str]:
    """Softmax has a step of 1/256 in int8: with many classes its largest values are often equal."""
    for name in qgraph.graph.outputs:
        node, q = qgraph.graph[name], qgraph.activations.get(name)
        if node.op == "softmax" and q is not None and q.qmax <= 127 and (node.shape[-1] or 0) > 32:
            yield (
                f"output {name!r} is an 8-bit softmax over {node.shape[-1]} classes, whose step is 1/256: the top "
                "classes often tie. Export a model that ends in the logits where their order matters."
            )


def _slow(qgraph: QuantizedGraph, target: Target) -> Iterator[str]:
    """Kernels of packed weights that take longer than those of int8."""
    slow = list(slow_layers(qgraph, target))
    if slow:
        times = max(choice.slowdown for _, choice, _ in slow)
        yield (
            f"{len(slow)} layers with weights below 8 bits take up to {times:.1f} times as long as with int8 weights; "
            f'QuantConfig(prefer="latency") stores them in {sum(added for *_, added in slow):,} bytes more.'
        )
