"""The simulation against a file on the runtime of its target: outputs and decisions of whole networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kquant.graph.quantized import QuantizedGraph
from kquant.graph.structure import pack, unpack
from kquant.keras.model import QuantizedModel
from kquant.targets.litert.reference.interpreter import IntegerReference
from kquant.targets.litert.runtime import as_stored, dequantized
from kquant.targets.runtime import Runtime


@dataclass(frozen=True)
class EndToEnd:
    """One output.

    Attributes:
        samples: how many were compared.
        equal: share of the elements at which simulation and runtime are equal.
        max_lsb: their largest difference.
        agreement: share of the samples on which they take the same decision.
        kernels_equal, kernels_agreement: the same of the runtime and its other kernels; 1 where it has none.
        reference_equal: the same as `equal` of the integer reference and the runtime, where that is to be bit for bit.
    """

    samples: int
    equal: float
    max_lsb: float
    agreement: float
    kernels_equal: float = 1.0
    kernels_agreement: float = 1.0
    reference_equal: float | None = None

    def __str__(self) -> str:
        line = (
            f"end to end             {100 * self.equal:.3f} % of elements equal, at most {self.max_lsb:.0f} LSB, "
            f"same decision {100 * self.agreement:.2f} % of {self.samples}"
        )
        if self.reference_equal is not None:
            return f"{line}\nreference at outputs   {100 * self.reference_equal:.3f} % of elements equal"
        among = f"{100 * self.kernels_equal:.3f} %, {100 * self.kernels_agreement:.2f} %"
        return f"{line} (kernels among themselves: {among})"


def end_to_end(
    model: QuantizedModel,
    qgraph: QuantizedGraph,
    runtime: Runtime,
    content: bytes,
    batches: Sequence[Sequence[np.ndarray]],
) -> tuple[EndToEnd, ...]:
    """Run batches of inputs through the simulation, the runtime, its other kernels, and the reference if it is exact.

    Args:
        model: the simulation.
        qgraph: its graph and grids.
        runtime: of its target.
        content: the file.
        batches: real-valued inputs.
    """
    found = runtime.open(content).predict_batches(batches)
    other = found if runtime.other is None else runtime.other(content).predict_batches(batches)
    exact = _reference_outputs(runtime, content, batches)
    graph = qgraph.graph
    simulated = [model.predict_on_batch(pack(graph.input_structure, list(batch))) for batch in batches]
    columns = [unpack(graph.output_structure, graph.output_names, s) for s in simulated]
    rows = []
    for k, name in enumerate(graph.outputs):
        ours, q = np.concatenate([np.asarray(c[k]) for c in columns]), qgraph.activations.get(name)
        whole = ours.dtype.kind in "iub"  # places and truth values
        lsb = 1.0 if whole else float(q.scale) if q is not None else 1e-5 * max(1e-12, float(np.max(np.abs(ours))))
        off, off_kernels = (np.abs(y.astype(np.float64) - found[k]) / lsb for y in (ours, other[k]))
        rows.append(
            EndToEnd(
                samples=len(ours),
                equal=float(np.mean(off < 0.5)),
                max_lsb=float(np.rint(off.max())),
                agreement=same_decision(ours, found[k]),
                kernels_equal=float(np.mean(off_kernels < 0.5)),
                kernels_agreement=same_decision(other[k], found[k]),
                reference_equal=None if exact is None else float(np.mean(exact[k] == found[k])),
            )
        )
    return tuple(rows)


def _reference_outputs(
    runtime: Runtime, content: bytes, batches: Sequence[Sequence[np.ndarray]]
) -> list[np.ndarray] | None:
    """Outputs of the integer reference as real numbers; None where the runtime may differ, or computes in float."""
    if not runtime.exact:
        return None
    reference = IntegerReference(content, kernels=runtime.checks[0].reference)
    if reference.unsupported():
        return None
    inputs, outputs = ([t.detail for t in ts] for ts in (reference.program.inputs, reference.program.outputs))
    step = max(1, inputs[0]["shape"][0] if inputs[0]["shape"] else 1)  # its shapes may be constant
    results = []
    for batch in batches:
        stored = [as_stored(x, d) for x, d in zip(batch, inputs, strict=True)]
        for k in range(0, len(stored[0]), step):
            made = reference.run([x[k : k + step] for x in stored])
            results.append([dequantized(made[d["name"]], d) for d in outputs])
    return [np.concatenate(column) for column in zip(*results, strict=True)]


def same_decision(ours: np.ndarray, reference: np.ndarray) -> float:
    """Share of samples whose largest entry is among the largest of the reference (ties count as agreement).

    Args:
        ours, reference: outputs, [samples, ..., classes]; or integers, which are decisions.
    """
    return float(np.mean(same_decisions(ours, reference)))


def same_decisions(ours: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Where `same_decision` counts a decision as the same, [samples, ...]."""
    if ours.dtype.kind in "iub":
        return np.asarray(ours == reference)
    chosen = np.take_along_axis(reference, np.argmax(ours, -1)[..., None], -1)[..., 0]
    return np.asarray(chosen == np.max(reference, -1))
