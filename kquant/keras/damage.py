"""What quantization destroys: tensors whose simulated values are lost in noise, with the cause and a remedy.

A few samples run through the float graph and the simulation, tensor by tensor. The signal-to-quantization-noise ratio
of a tensor x and its simulation x^ is

    SQNR = 10 log10(E[x^2] / E[(x - x^)^2])  dB.

A tensor below `LEAST_DB`, all of whose inputs are above it, is where damage begins; it counts where a reader is below,
too, or the model returns it. (The mean that a normalization subtracts may be lost and missed by nobody.)
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kquant.errors import QuantizationWarning
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import Tie, compute, op_of, weight_of
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid, fake_quantize
from kquant.keras.layer import QuantizedLayer
from kquant.keras.model import QuantizedModel
from kquant.quantize.record import Damage

LEAST_DB = 5.0
_ALONE_DB = 8.0  # a single cause that leaves less than this is the cause
_OUTSHONE = 20.0  # a channel of an output is lost beside others that are so much larger
_SHOWN = 8  # in the warning
Finding = tuple[str, str, str]  # cause, remedy, and the tensor that 16 bits mend ("" for none)
_ROUNDING = 2.0**-21  # of float32, a few times
_CHANNELS = 256  # outputs with more are judged as a whole


def find_damage(
    model: QuantizedModel, qgraph: QuantizedGraph, reference: Graph, sample: Sequence[np.ndarray]
) -> tuple[Damage, ...]:
    """The tensors that quantization destroys.

    Args:
        model: the simulation of `qgraph`.
        qgraph: grids and integers.
        reference: the float graph of the same tensors, before weights were rounded.
        sample: one array per input, a few samples.
    """
    return tuple(_Walk(model, qgraph, reference).run(sample))


def sqnr(x: np.ndarray, simulated: np.ndarray) -> float:
    """Signal-to-quantization-noise ratio in dB; infinite where there is no noise."""
    difference = np.asarray(x, np.float32) - simulated
    signal, noise = float(np.vdot(x, x)), float(np.vdot(difference, difference))
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(max(signal, 1e-30) / noise))


def warn_of(damage: Sequence[Damage], widened: str, name: str) -> None:
    """A `QuantizationWarning` that lists what is destroyed in a model, and what has 16 bits for it, if anything."""
    text = []
    if damage:
        text += [f"Quantization destroys {len(damage)} tensors of {name!r}:", *(f"  {d}" for d in damage[:_SHOWN])]
        text += [f"  ... and {len(damage) - _SHOWN} more, see the report"] if len(damage) > _SHOWN else []
    if widened:
        text.append(f"In {name!r}, 8 bits destroy tensors that have 16 now: {widened}.")
    if text:
        warnings.warn("\n".join(text), QuantizationWarning, stacklevel=3)


@dataclass
class _Walk:
    """Both networks, side by side; a tensor is forgotten after its last reader."""

    model: QuantizedModel
    qgraph: QuantizedGraph
    reference: Graph

    def run(self, sample: Sequence[np.ndarray]) -> list[Damage]:
        graph, layers = self.reference, self.model.quantized_layers
        exact: dict[str, Any] = dict(zip(graph.inputs, map(np.asarray, sample), strict=True))
        simulated: dict[str, Any] = {}
        grids: dict[str, Any] = {}
        decibels: dict[str, float] = {}
        last = {source: node.name for node in graph for source in node.inputs}
        found = []
        for node in graph:
            if node.op != "input":
                exact[node.name] = compute(node, [exact[i] for i in node.inputs])
            self._simulate(node, layers.get(node.name), exact, simulated, grids)
            decibels[node.name] = self._decibels(node, exact, simulated, decibels)
            if self._begins(node, decibels):
                found.append(_Cause(self.qgraph, node, exact, layers.get(node.name)).damage(decibels[node.name]))
            elif node.name in graph.outputs and _fine(decibels, node.name, *node.inputs):
                found += _lost_channels(self.qgraph, node, np.asarray(exact[node.name]), simulated[node.name])
            for source in {i for i in node.inputs if last[i] == node.name}:
                for table in (exact, simulated, grids):
                    table.pop(source, None)
        return [d for d in found if _spreads(graph, d.tensor, decibels)]

    def _simulate(
        self,
        node: Node,
        layer: QuantizedLayer | None,
        exact: Mapping[str, Any],
        simulated: dict[str, Any],
        grids: dict[str, Any],
    ) -> None:
        if layer is None:  # in float, or a constant
            given = node.op in ("input", "const")
            simulated[node.name] = exact[node.name] if given else compute(node, [simulated[i] for i in node.inputs])
            return
        sources = [i for i in node.inputs if i not in layer.constants]
        values = [simulated[i] for i in sources] or [exact[node.name]]
        read = [grids[i] for i in sources if i in grids]
        result = layer.call(values, read)
        if layer.runs_in_integers:
            simulated[node.name], grids[node.name] = result
        else:
            simulated[node.name] = result

    def _decibels(
        self, node: Node, exact: Mapping[str, Any], simulated: Mapping[str, Any], known: Mapping[str, float]
    ) -> float:
        """What is only moved is as good as it was."""
        if node.op == "const" or node.dtype != "float32":
            return float("inf")
        if op_of(node).grid is Tie.OF_INPUT:
            return known[node.inputs[0]]
        if node.op in ("add", "sub") and _cancels(exact[node.name], [exact[i] for i in node.inputs]):
            return float("inf")
        return sqnr(np.asarray(exact[node.name]), np.asarray(simulated[node.name]))

    def _begins(self, node: Node, decibels: Mapping[str, float]) -> bool:
        return not _fine(decibels, node.name) and _fine(decibels, *node.inputs)


def _cancels(result: Any, terms: Sequence[Any]) -> bool:
    """Whether a sum is zero up to the rounding of float32: there is nothing to be lost."""
    largest = max(float(np.max(np.abs(x), initial=0.0)) for x in terms)
    return float(np.max(np.abs(result), initial=0.0)) <= _ROUNDING * largest


def _spreads(graph: Graph, name: str, decibels: Mapping[str, float]) -> bool:
    """Whether a reader of a destroyed tensor is destroyed, holds it among other values, or the model returns it."""
    if name in graph.outputs:
        return True
    for reader in graph.consumers(name):
        tie = op_of(reader).grid
        moved = tie is Tie.OF_INPUT and _spreads(graph, reader.name, decibels)
        if moved or tie is Tie.SHARED or not _fine(decibels, reader.name):
            return True
    return False


def _fine(decibels: Mapping[str, float], *names: str) -> bool:
    return all(decibels[name] >= LEAST_DB for name in names)


@dataclass
class _Cause:
    """Why a tensor is destroyed, tried one after the other: its grid, its weights, the grid of an input."""

    qgraph: QuantizedGraph
    node: Node
    exact: Mapping[str, Any]
    layer: QuantizedLayer | None

    def damage(self, decibels: float) -> Damage:
        cause, remedy, widen = self._own_grid() or self._weights() or self._input() or self._sum()
        return Damage(
            tensor=self.node.name,
            layer=_layer(self.node),
            sqnr=round(decibels, 1),
            cause=cause,
            remedy=remedy,
            widen=widen,
        )

    def _own_grid(self) -> Finding | None:
        q, x = self.qgraph.activations.get(self.node.name), np.asarray(self.exact[self.node.name])
        if q is None or sqnr(x, fake_quantize(x, q)) >= _ALONE_DB:
            return None
        return _coarse(self.qgraph, self.node, q, x)

    def _weights(self) -> Finding | None:
        q = self.qgraph.weights.get(self.node.name)
        if q is None or op_of(self.node).weight is None or op_of(self.node).lookup:
            return None
        key = weight_of(self.node).name
        rounded = {**self.node.weights, key: self.qgraph.graph[self.node.name].weights[key]}
        if self.layer is not None:
            rounded[key] = self.layer.fake_quantized(rounded[key])
        if self._with([self.exact[i] for i in self.node.inputs], rounded) >= _ALONE_DB:
            return None
        rule = f'{{"name": "^{re.escape(_layer(self.node))}$", "weights": {{"bits": 8}}}}'
        more = f"give them 8 bits with the rule {rule}" if q.bits < 8 else "give every channel a scale of its own"
        return f"its weights in {q.bits} bits are another function", f"{more}, or train with kquant.prepare_qat", ""

    def _input(self) -> Finding | None:
        worst: tuple[float, str] | None = None
        for k, name in enumerate(self.node.inputs):
            q = self.qgraph.activations.get(name)
            if q is None:
                continue
            inputs = [self.exact[i] for i in self.node.inputs]
            inputs[k] = fake_quantize(np.asarray(inputs[k], np.float32), q)
            decibels = self._with(inputs, self.node.weights)
            if decibels < _ALONE_DB and (worst is None or decibels < worst[0]):
                worst = decibels, name
        if worst is None:
            return None
        source = self.qgraph.graph[worst[1]]
        q = self.qgraph.activations[source.name]
        if q is None:
            raise AssertionError(f"{source.name!r} has no grid")
        low, high = _range(q)
        cause = (
            f"it reads {source.name!r} in steps of {float(q.scale):.3g} (range {low:.3g} to {high:.3g}), between "
            "which its own values change"
        )
        k = self.node.inputs.index(source.name)
        inputs = [self.exact[i] for i in self.node.inputs]
        inputs[k] = _finer(inputs[k], q)
        if self._with(inputs, self.node.weights) < _ALONE_DB:
            return (
                cause,
                f"narrow the range of {source.name!r}, which 16 bits cannot hold either, or keep both float",
                "",
            )
        return cause, f"{_more_bits(source, q)}, or narrow its range", _wide(self.qgraph, source, q)

    def _sum(self) -> Finding:
        return (
            "the errors of the layers in front add up",
            "use more bits, AdaRound, or train with kquant.prepare_qat; kquant.diagnose finds the layers to change",
            "",
        )

    def _with(self, inputs: Sequence[Any], weights: Mapping[str, Any]) -> float:
        return sqnr(np.asarray(self.exact[self.node.name]), np.asarray(compute(self.node, inputs, weights)))


def _coarse(qgraph: QuantizedGraph, node: Node, q: Grid, x: np.ndarray) -> Finding:
    """The cause and remedy where a tensor's own grid is too coarse."""
    step, (low, high) = float(q.scale), _range(q)
    largest, reach = float(np.max(np.abs(x), initial=0.0)), max(abs(low), abs(high))
    others = [n for n, g in qgraph.activations.items() if g is q and n != node.name and qgraph.graph[n].op != "const"]
    if others and reach > 4 * largest:
        joined = next((n for n in others if op_of(qgraph.graph[n]).grid is Tie.SHARED), others[0])
        cause = f"its values reach {largest:.3g}, the grid shared with {joined!r} {reach:.3g} in steps of {step:.3g}"
        remedy = f"return it as an output of its own, not joined with larger values, or {_more_bits(node, q)}"
        return cause, remedy, _wide(qgraph, qgraph.graph[joined], q)
    if largest > 1.5 * reach:
        return (
            f"its values reach {largest:.3g}, and its grid ends at {reach:.3g}",
            "calibrate on data that shows all of its values, or use method='min_max' for it",
            "",
        )
    cause = f"its values are lost in steps of {step:.3g} (range {low:.3g} to {high:.3g})"
    return cause, _more_bits(node, q), _wide(qgraph, node, q)


def _lost_channels(qgraph: QuantizedGraph, node: Node, x: np.ndarray, simulated: Any) -> list[Damage]:
    """Entries of the last axis of an output that are lost beside much larger ones."""
    q = qgraph.activations.get(node.name)
    if q is None or x.ndim < 2 or not 1 < x.shape[-1] <= _CHANNELS or node.op in ("softmax", "logistic", "tanh"):
        return []
    axes = tuple(range(x.ndim - 1))
    noise = np.square(x - np.asarray(simulated)).sum(axis=axes)
    largest = np.abs(x).max(axis=axes)
    small = (largest > 0) & (_OUTSHONE * largest < largest.max())
    lost = np.flatnonzero(small & (noise >= np.square(x).sum(axis=axes)))
    if not len(lost):
        return []
    few = ", ".join(map(str, lost[:4])) + (", ..." if len(lost) > 4 else "")
    step = float(q.scale)
    cause = f"its channels {few} reach {largest[lost].max():.3g}, others {largest.max():.3g}, in steps of {step:.3g}"
    remedy = f"return them as an output of their own, or {_more_bits(node, q)}"
    return [Damage(tensor=node.name, layer=_layer(node), sqnr=0.0, cause=cause, remedy=remedy)]


def _range(q: Grid) -> tuple[float, float]:
    low, high = (float(q.scale) * (edge - int(q.zero_point)) for edge in (q.qmin, q.qmax))
    return low, high


def _finer(x: Any, q: Grid) -> np.ndarray:
    """x in 256 times smaller steps."""
    step = np.float32(q.scale) / 256
    return np.asarray(np.rint(np.asarray(x, np.float32) / step) * step, np.float32)


def _more_bits(node: Node, q: Grid) -> str:
    bits = 16 if q.bits >= 8 else 8
    rule = f'{{"name": "^{re.escape(_layer(node))}$", "activations": {{"bits": {bits}}}}}'
    return f"give it {bits} bits with the rule {rule}"


def _wide(qgraph: QuantizedGraph, node: Node, q: Grid) -> str:
    """The tensor to which 16 bits are to be given: what is only brought to a grid has that of its reader."""
    if q.bits != 8:
        return ""
    return qgraph.graph.consumers(node.name)[0].name if node.op == "requantize" else node.name


def _layer(node: Node) -> str:
    return node.origin or node.name
