"""What is simulated is what runs: the comparison of a quantized model with its TFLite file, in LSBs.

Four checks, each independent of the others:

1. structure: every tensor of the plan is in the file, on the very grid, with the very integers;
2. wiring: the float32 version of the same file equals the float graph;
3. arithmetic: a numpy integer reference equals the kernels of the target's runtime (LiteRT's reference kernels, or
   TensorFlow Lite Micro) at every tensor, and every layer of the simulation, fed the same integers, is within 1 LSB;
4. end to end: the simulation and the runtime (LiteRT's default kernels, XNNPACK) take the same decisions.

Where the target has a compiler, it compiles the file; what runs outside the accelerator breaks the contract.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from kquant.config.text import table
from kquant.errors import CalibrationError, ExportError
from kquant.graph.ir import Node
from kquant.graph.ops import evaluate, op_of, weight_of
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import quantize_bias
from kquant.keras.layer import QuantizedLayer
from kquant.keras.model import QuantizedModel, extract
from kquant.quantize.data import CalibrationData
from kquant.targets.litert.flatbuffer import read_tensors, summary
from kquant.targets.litert.reader import Tensor, file_content
from kquant.targets.litert.reference.interpreter import IntegerReference
from kquant.targets.litert.runtime import TFLiteModel
from kquant.targets.litert.target import INTERPRETER
from kquant.targets.litert.writer import write_tflite
from kquant.targets.runtime import Footprint, KernelSet, Runtime
from kquant.targets.target import Target
from kquant.verify.end_to_end import EndToEnd, end_to_end


@dataclass(frozen=True)
class TensorParity:
    """One tensor: differences in LSBs (relative differences where it is float)."""

    name: str
    op: str
    dtype: str
    elements: int
    reference_max: float
    reference_unequal: int
    simulation_max: float
    simulation_equal: float


@dataclass(frozen=True)
class ParityReport:
    """The result of `verify_tflite`.

    Attributes:
        structure: differences between plan and file, empty if there are none.
        float_error: largest difference of the float32 version, relative to the output's range.
        tensors: one row per tensor.
        end_to_end: one row per output.
        kernels: the kernels that stood for the reference ("reference" or "builtin" of LiteRT, "tflite-micro").
        ops: operator type -> count.
        bytes: size of the file.
        runtime: what ran the file end to end.
        footprints: what it takes on the target's devices.
        notes: what was not checked, and what quantization destroys in spite of parity.
    """

    structure: tuple[str, ...]
    float_error: float
    tensors: tuple[TensorParity, ...]
    end_to_end: tuple[EndToEnd, ...]
    kernels: str
    ops: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    runtime: str = "LiteRT"
    footprints: tuple[Footprint, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def reference_max_lsb(self) -> float:
        """Largest difference between the integer reference and the kernels, softmax apart."""
        return max((t.reference_max for t in self.tensors if _integer(t) and t.op != "softmax"), default=0.0)

    @property
    def op_by_op_max_lsb(self) -> float:
        """Largest difference between a layer of the simulation and the kernels, same inputs."""
        return max((t.simulation_max for t in self.tensors if _integer(t)), default=0.0)

    @property
    def agreement(self) -> float:
        """Share of samples on which simulation and runtime take the same decision."""
        return min((e.agreement for e in self.end_to_end), default=1.0)

    @property
    def ok(self) -> bool:
        """Whether the parity contract holds."""
        softmax = [t for t in self.tensors if t.op == "softmax" and _integer(t)]
        return (
            not self.structure
            and self.float_error < 1e-4
            and self.reference_max_lsb == 0
            and all(t.reference_max <= 1 and t.reference_unequal <= max(1, 1e-4 * t.elements) for t in softmax)
            and self.op_by_op_max_lsb <= 1
            and all(e.agreement >= min(0.995, e.kernels_agreement) for e in self.end_to_end)
            and all(e.reference_equal in (None, 1.0) for e in self.end_to_end)
            and not any(f.left_out for f in self.footprints)
        )

    def __str__(self) -> str:
        worst = sorted((t for t in self.tensors if _integer(t)), key=lambda t: t.simulation_equal)[:5]
        lines = [
            f"parity {'holds' if self.ok else 'FAILS'}: {self.bytes:,} bytes, {sum(self.ops.values())} operators",
            f"  structure              {'identical' if not self.structure else '; '.join(self.structure[:5])}",
            f"  float32 wiring         {self.float_error:.1e} relative",
            f"  integer reference      {self.reference_max_lsb:.0f} LSB from the {self.kernels} kernels, "
            f"{len(self.tensors)} tensors",
            f"  simulation, op by op   {self.op_by_op_max_lsb:.0f} LSB",
        ]
        lines += [f"  {line}" for e in self.end_to_end for line in str(e).splitlines()]
        lines += [f"  {f}" for f in self.footprints]
        lines += [f"  not on {f.device}: {op}" for f in self.footprints for op in f.left_out]
        lines += [f"  note: {note}" for note in self.notes]
        if worst and worst[0].simulation_equal < 1:
            rows = [(t.name, t.op, f"{100 * t.simulation_equal:.3f}", t.simulation_max) for t in worst]
            lines.append(table(("least equal tensor", "op", "equal %", "max LSB"), rows))
        return "\n".join(lines)


def _integer(t: TensorParity) -> bool:
    return t.dtype.startswith(("int", "uint"))


def verify_tflite(
    model: keras.Model,
    source: bytes | str | os.PathLike[str],
    data: Any,
    *,
    samples: int | None = None,
    tensor_samples: int = 2,
    batch_size: int = 32,
) -> ParityReport:
    """Compare a quantized model with the TFLite file exported from it.

    Args:
        model: the result of `quantize_model`.
        source: the file's path or bytes, exported in mode "integer".
        data: inputs, as for `quantize_model`.
        samples: how many are compared end to end; by default as many as the runtime does in short time, 1000 on LiteRT,
            20 on TensorFlow Lite Micro.
        tensor_samples: how many are compared at every tensor.
        batch_size: batch size where `data` is arrays.

    Raises:
        ExportError: the file is missing, truncated or corrupt, or the target's runtime or compiler refuses it.
        CalibrationError: there is no data.
        ModelError: `model` is not a quantized model.
    """
    content, qgraph = file_content(source), extract(model)
    runtime, notes = _runtime(model.target)
    samples = runtime.samples if samples is None else samples
    batches = first_samples(CalibrationData(data, input_specs(qgraph), batch_size=batch_size), samples)
    few = [x[: 1 if model.target.fixed_batch else tensor_samples] for x in batches[0]]
    info = summary(content)
    kernels, stored = _kernel_tensors(runtime, content, few)
    reference = IntegerReference(content, lambda op, _: [stored[t.name] for t in op.outputs], kernels.reference)
    return ParityReport(
        structure=_structure(qgraph, model.target, content),
        float_error=_float_error(qgraph, model.target, few),
        tensors=_tensor_parity(model, qgraph, reference, stored),
        end_to_end=end_to_end(model, qgraph, runtime, content, batches),
        kernels=kernels.name,
        ops=info.op_counts,
        bytes=len(content),
        runtime=runtime.name,
        footprints=() if runtime.measure is None else runtime.measure(content),
        notes=notes + tuple(f"quantization destroys {d}" for d in model.quantization.damage),
    )


def _runtime(target: Target) -> tuple[Runtime, tuple[str, ...]]:
    """The target's runtime, or LiteRT's where it is not installed, and a note that says so."""
    runtime = target.runtime
    if runtime is None:
        raise ExportError(f"{target.name} has no runtime that runs its files; verify with a target that has one.")
    if runtime.installed:
        return runtime, ()
    missing = f"{runtime.name} is not installed (pip install '{runtime.package}'): compared on {INTERPRETER.name}"
    return INTERPRETER, (missing,)


def input_specs(qgraph: QuantizedGraph) -> list[tuple[str, Any, str]]:
    """(name, shape, dtype) of every input, as `CalibrationData` wants them."""
    graph = qgraph.graph
    return [(n, graph[i].shape, graph[i].dtype) for n, i in zip(graph.input_names, graph.inputs, strict=True)]


def first_samples(data: CalibrationData, samples: int) -> list[list[np.ndarray]]:
    """The first `samples` samples."""
    batches, left = [], samples
    for batch in data:
        batches.append([x[:left] for x in batch])
        left -= len(batch[0])
        if left <= 0:
            break
    if not batches:
        raise CalibrationError("There is no data to compare on: pass at least one sample.")
    return batches


def _kernel_tensors(
    runtime: Runtime, content: bytes, inputs: Sequence[np.ndarray]
) -> tuple[KernelSet, dict[str, np.ndarray]]:
    """All tensors of one run of the first of the runtime's kernels that accept the file."""
    for kernels in runtime.checks:
        try:
            runner = kernels.open(content)
            runner.run(inputs)
            return kernels, runner.tensors()
        except ExportError:
            if kernels is runtime.checks[-1]:
                raise
    raise ExportError(f"{runtime.name} does not show every tensor; verify with a target whose runtime does.")


def _structure(qgraph: QuantizedGraph, target: Target, content: bytes) -> tuple[str, ...]:
    """Differences between the grids and integers of the plan and those of the file."""
    tensors = read_tensors(content)
    wrong = []
    for node in qgraph.graph:
        q = qgraph.activations.get(node.name)
        if q is None or node.op == "const":
            continue
        if node.name not in tensors:
            wrong.append(f"{node.name!r} is not in the file")
            continue
        stored = tensors[node.name]
        if not (np.array_equal(stored.scale, np.atleast_1d(q.scale)) and stored.zero_point[0] == int(q.zero_point)):
            wrong.append(f"{node.name!r} has grid {stored.scale} {stored.zero_point} in the file, not {q}")
        wrong += [f"{name!r} differs from the plan" for name in _wrong_constants(qgraph, target, node, tensors)]
    return tuple(wrong)


def _wrong_constants(
    qgraph: QuantizedGraph, target: Target, node: Node, tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    """Names of the weights and the bias of an integer operation that are not the plan's integers in the file."""
    w, layout = qgraph.weights.get(node.name), target.kernel(node).layout if node.op in target.kernels else None
    if w is None or layout is None:
        return
    key, bias_key = weight_of(node).name, op_of(node).bias
    expected = {f"{node.name}/{key}": (layout.to_file(qgraph.integers[node.name]), w.scale)}
    x = qgraph.activations.get(node.inputs[0])
    if x is not None and bias_key is not None and bias_key in node.weights:
        bias = quantize_bias(node.weights[bias_key], x.scale, w.scale)
        expected[f"{node.name}/{bias_key}"] = (bias, np.float32(x.scale) * np.asarray(w.scale, np.float32))
    for name, (integers, scale) in expected.items():
        stored = tensors.get(name)
        if (
            stored is None
            or stored.data is None
            or not (np.array_equal(stored.data, integers) and np.array_equal(stored.scale, np.atleast_1d(scale)))
        ):
            yield name


def _float_error(qgraph: QuantizedGraph, target: Target, inputs: Sequence[np.ndarray]) -> float:
    """Largest difference between the float32 file and the float graph, relative to the output's size."""
    content, _ = write_tflite(qgraph, target=target, mode="float32")
    # one thread: LiteRT's float convolution computes garbage for few channels when several threads share it
    found = TFLiteModel(content, "builtin", threads=1).predict_batches([list(inputs)])
    errors = []
    for y, expected in zip(found, evaluate(qgraph.graph, inputs), strict=True):
        expected = np.asarray(expected)
        if expected.dtype.kind in "iub":
            errors.append(np.mean(y != expected))
            continue
        errors.append(np.max(np.abs(y - expected)) / max(1e-12, float(np.max(np.abs(expected)))))
    return float(max(errors))


def _tensor_parity(
    model: QuantizedModel, qgraph: QuantizedGraph, reference: IntegerReference, stored: dict[str, np.ndarray]
) -> tuple[TensorParity, ...]:
    """Reference and simulation against the kernels' own tensors, operator by operator."""
    graph = qgraph.graph
    layers = model.quantized_layers
    expected = reference.run([stored[graph_input] for graph_input in reference.input_names])
    rows = []
    for name, value in stored.items():
        if name not in expected or value.size == 0 or value.dtype.kind not in "iuf":
            continue
        difference = np.abs(expected[name].astype(np.float64) - value)
        if value.dtype.kind == "f":
            difference = difference / max(1e-12, float(np.max(np.abs(value))))
        layer = layers.get(name)
        simulated = None if layer is None else simulated_layer(layer, qgraph, stored)
        off = np.zeros(1) if simulated is None else np.abs(simulated.astype(np.float64) - value)
        if value.dtype.kind == "f":
            off = off / max(1e-12, float(np.max(np.abs(value))))
        rows.append(
            TensorParity(
                name=name,
                op=graph[name].op if name in graph.nodes else "",
                dtype=str(value.dtype),
                elements=value.size,
                reference_max=float(difference.max()),
                reference_unequal=int(np.count_nonzero(difference)),
                simulation_max=float(off.max()),
                simulation_equal=float(np.mean(off == 0)),
            )
        )
    return tuple(rows)


def simulated_layer(layer: QuantizedLayer, qgraph: QuantizedGraph, stored: dict[str, np.ndarray]) -> np.ndarray | None:
    """What a layer of the simulation makes of the kernels' own integers, as integers; real values of a float layer.

    Args:
        layer: of the simulation.
        qgraph: the grids.
        stored: tensors of the file by name, as stored; None is returned where an input of the layer is missing.
    """
    node = layer.node
    sources = [i for i in node.inputs if i not in layer.constants]
    if node.op == "input" or any(i not in stored for i in sources):
        return None
    values, grids = [], []
    for name in sources:
        q = qgraph.activations.get(name)
        value = stored[name]
        if q is not None:
            value = np.float32(q.scale) * (value.astype(np.float32) - np.float32(q.zero_point))
            grids.append(np.array([q.scale, q.zero_point], np.float32))
        values.append(value)
    result = layer(values, grids) if grids and layer.runs_in_integers else layer(values)
    if not layer.runs_in_integers:
        return np.asarray(result)
    y, (scale, zero_point) = np.asarray(result[0]), np.asarray(result[1])
    return np.rint(y / scale) + zero_point
