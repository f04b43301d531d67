"""Where a .tflite file departs from the simulation, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from tqdm.auto import tqdm

from kquant.diagnosis.records import TargetRecord
from kquant.errors import ExportError
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.keras.model import QuantizedModel, extract
from kquant.quantize.data import CalibrationData
from kquant.targets.litert.flatbuffer import read_tensors
from kquant.targets.litert.reader import Tensor, file_content
from kquant.targets.litert.runtime import TFLiteModel
from kquant.verify.parity import first_samples, input_specs, simulated_layer

Array = np.ndarray[Any, Any]
FLOAT_STEP = 1e-5  # of the largest magnitude: the "LSB" of a tensor that stays float


def compare_with_target(
    model: QuantizedModel,
    source: bytes | str | os.PathLike[str],
    data: Any,
    *,
    samples: int = 16,
    batch_size: int = 4,
    progress: bool = True,
) -> tuple[TargetRecord, ...]:
    """Compare every tensor of a file with the same tensor of the simulation.

    Each operation is compared alone, fed the very integers that the file's operation read, and end to end, where
    what came before adds up. The file runs on the default kernels, with all of its tensors made outputs so that they
    can be read. `alone` of at most 1 is a rounding.

    Args:
        model: the result of `quantize_model`.
        source: the file's path or bytes, exported in mode "integer".
        data: inputs, as for `quantize_model`.
        samples: how many are compared.
        batch_size: how many at a time, where `data` is arrays.
        progress: show a progress bar.

    Returns:
        One record per tensor that the two have in common, in the order of the network. Where the grids differ, it is
        real values that are compared, in steps of the simulation.

    Raises:
        ExportError: the file is missing, corrupt, or has no tensor of the model.
        CalibrationError: there is no data.
        ModelError: `model` is not a quantized model.
    """
    content, qgraph = file_content(source), extract(model)
    batches = first_samples(CalibrationData(data, input_specs(qgraph), batch_size=batch_size), samples)
    layers = model.quantized_layers
    stored = read_tensors(content)
    names = [n for n in qgraph.graph.nodes if n in layers and n in stored]
    if not names:
        raise ExportError(
            f"The file has no tensor named as a layer of {model.name!r}: pass the file that was exported from it."
        )
    simulation = model.inner(names)
    interpreter = TFLiteModel(_with_all_outputs(content))
    differences = {name: _Difference() for name in names}
    for batch in tqdm(batches, desc="comparing", unit="batch", disable=not progress, leave=False):
        tensors = _run(interpreter, batch)
        found = {n: _on_grid_of(qgraph, n, v, stored) for n, v in tensors.items() if n in stored}
        values = keras.tree.flatten(simulation.predict_on_batch(list(batch)))
        for name, value in zip(names, map(np.asarray, values), strict=True):
            if name not in found:
                continue
            q = qgraph.activations.get(name)
            step = FLOAT_STEP * max(1e-12, float(np.max(np.abs(value)))) if q is None else 1.0
            alone = simulated_layer(layers[name], qgraph, found)
            differences[name].add(found[name], _integers(value, q), alone, step)
    return tuple(differences[n].record(n, qgraph.graph[n].op) for n in names if differences[n].elements)


def first_deviation(records: Iterable[TargetRecord], steps: float = 1.0) -> TargetRecord | None:
    """The first operation that, fed the same integers, differs by more than `steps` LSBs; None where none does."""
    return next((r for r in records if r.alone > steps), None)


@dataclass
class _Difference:
    """Running sums for one tensor."""

    alone: float = 0.0
    total: float = 0.0
    equal: int = 0
    elements: int = 0

    def add(self, found: Array, simulated: Array, alone: Array | None, step: float) -> None:
        """One batch: the file's tensor, the simulation's, and what the simulation makes of the file's inputs."""
        off = np.abs(found - simulated) / step
        self.total += float(off.sum())
        self.equal += int(np.count_nonzero(off < 0.5))
        self.elements += off.size
        if alone is not None:
            self.alone = max(self.alone, float(np.max(np.abs(found - alone) / step, initial=0.0)))

    def record(self, node: str, op: str) -> TargetRecord:
        mean, equal = self.total / self.elements, self.equal / self.elements
        return TargetRecord(node=node, op=op, alone=self.alone, propagated=mean, equal=equal)


def _with_all_outputs(content: bytes) -> bytes:
    """The same program, that returns the result of every operator too."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    graph = model.subgraphs[0]
    results = [int(t) for op in graph.operators for t in op.outputs if t >= 0]
    graph.outputs = list(dict.fromkeys([*(int(t) for t in graph.outputs), *results]))
    builder = flatbuffers.Builder(len(content) + 1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _run(interpreter: TFLiteModel, batch: Sequence[Array]) -> dict[str, Array]:
    """The inputs and all results by name, as stored."""
    results = interpreter.run(batch)
    named = {d["name"]: y for d, y in zip(interpreter.outputs, results, strict=True)}
    return {**interpreter.tensors(), **named}


def _integers(value: Array, q: Grid | None) -> Array:
    """Real values of the simulation as integers, float64; those of a float tensor as they are."""
    wide = value.astype(np.float64)
    return wide if q is None else np.rint(wide / float(q.scale)) + int(q.zero_point)


def _on_grid_of(qgraph: QuantizedGraph, name: str, value: Array, stored: Mapping[str, Tensor]) -> Array:
    """A tensor of the file in the steps of the simulation, float64: its own integers where the grids are the same."""
    q, tensor = qgraph.activations.get(name), stored[name]
    if q is None or value.dtype.kind not in "iu" or tensor.scale.size != 1:
        return value
    ratio = float(tensor.scale[0]) / float(q.scale)
    return (value.astype(np.float64) - int(tensor.zero_point[0])) * ratio + int(q.zero_point)
