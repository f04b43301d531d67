"""How far a network's outputs move when some of its weights are rounded: forward passes on fixed samples.

The distance is the KL divergence from the float outputs to the others where outputs are classes, else the squared error
relative to the variance. All passes are of one compiled function, whose weights are variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.budget.groups import Bits, Group
from kquant.budget.rounded import Rounded
from kquant.diagnosis.metrics import kl_divergence
from kquant.graph.ir import Graph, Node, sample_size
from kquant.graph.ops import evaluate

_SLICE = 32 << 20  # bytes of the largest activation computed at once


def distance(
    reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray], steps: Sequence[float] | None = None
) -> float:
    """How far outputs are from those of the float network, summed over the outputs of a model.

    Args:
        reference: of the float network.
        outputs: of the other.
        steps: the step of each output's grid, where it has one: probabilities below half of it count as that in both,
            since a divergence would be of what the grid makes zero.
    """
    floors = [0.0] * len(reference) if steps is None else [s / 2 for s in steps]
    pairs = zip(reference, outputs, floors, strict=True)
    return sum(_distance(np.asarray(p), np.asarray(q), floor) for p, q, floor in pairs)


def _distance(p: np.ndarray, q: np.ndarray, floor: float) -> float:
    if p.dtype.kind != "f":
        return float(np.mean(p != q))
    if p.ndim == 2 and p.shape[-1] > 1:
        probable = floor > 0 and (p >= 0).all() and np.allclose(p.sum(-1), 1, atol=1e-3)
        if probable:
            p, q = (v / v.sum(-1, keepdims=True) for v in (np.maximum(p, floor), np.maximum(q, floor)))
        return max(0.0, kl_divergence(p, q))
    return float(np.mean(np.square(p - q)) / max(float(np.var(p)), 1e-12))


class Passes:
    """A float network whose layers can be replaced by rounded ones.

    Args:
        graph: the float graph.
        groups: what is replaced together.
        rounded: (node, bits) -> the layer.
        samples: one array per input of the graph, batches.
    """

    def __init__(
        self,
        graph: Graph,
        groups: Sequence[Group],
        rounded: Mapping[tuple[str, int], Rounded],
        samples: Sequence[Sequence[np.ndarray]],
    ) -> None:
        self.groups, self._rounded, self._float = tuple(groups), rounded, graph
        self._now: dict[str, int] = {}  # node -> bits, where it is not float
        self._known: dict[tuple[int | None, ...], float] = {}
        searched = {n for g in groups for n in g.nodes}
        self._variables = {n: {k: tf.Variable(w) for k, w in graph[n].weights.items()} for n in searched}
        constants = [_held(n, self._variables.get(n.name)) for n in graph]
        self._run = _compiled(graph.rebuild(constants), graph)
        rows = max(1, _SLICE // max(4 * sample_size(n) for n in graph))
        self._batches = [[x[k : k + rows] for x in batch] for batch in samples for k in range(0, len(batch[0]), rows)]
        self.reference = self._outputs()
        self.count = 0

    def _outputs(self) -> list[np.ndarray]:
        parts = [[np.asarray(y) for y in self._run(*batch)] for batch in self._batches]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def distance(self, bits: Sequence[int | None]) -> float:
        """The distance with every group at its number of bits, None for float; one pass, unless it was made before."""
        key = tuple(bits)
        if key not in self._known:
            for group, wanted in zip(self.groups, key, strict=True):
                for name in group.nodes:
                    self._set(name, wanted)
            self.count += 1
            self._known[key] = distance(self.reference, self._outputs())
        return self._known[key]

    def _set(self, name: str, bits: int | None) -> None:
        if self._now.get(name) == bits:
            return
        source = self._float[name] if bits is None else self._rounded[name, bits].node
        for key, variable in self._variables[name].items():
            variable.assign(source.weights[key])
        if bits is None:
            self._now.pop(name, None)
        else:
            self._now[name] = bits

    def error(self, group: Group, bits: int) -> float:
        """The errors of a group's outputs, relative to their variances."""
        return sum(self._rounded[n, bits].error for n in group.nodes)


def _held(node: Node, variables: Mapping[str, Any] | None) -> Node:
    """A node whose weights the compiled function captures: arrays would be copied into it."""
    return node.with_(weights=variables or {k: tf.constant(w) for k, w in node.weights.items()})


def _compiled(graph: Graph, shapes: Graph) -> Any:
    signature = [tf.TensorSpec(shapes[i].shape, shapes[i].dtype) for i in shapes.inputs]

    @tf.function(input_signature=signature, autograph=False)
    def run(*feeds: Any) -> Any:
        return evaluate(graph, feeds)

    return run


def sensitivities(passes: Passes, measured: Bits = (2, 4)) -> list[np.ndarray]:
    """For every group the distance at each of its bits, alone.

    Passes at few numbers of bits say how large distances are, the error of the layer's output how they compare in
    between: distance(b) = distance(b0) error(b) / error(b0), with b0 the nearest number that was measured.

    Args:
        passes: of the network.
        measured: the numbers of bits to measure at, as far as a group may have them.
    """
    found = []
    for k, group in enumerate(passes.groups):
        points = [b for b in measured if b in group.bits] or [group.bits[0]]
        values = []
        for bits in group.bits:
            at = min(points, key=lambda b: (abs(b - bits), b))
            alone = passes.distance([at if j == k else None for j in range(len(passes.groups))])
            error = passes.error(group, at)
            values.append(alone * passes.error(group, bits) / error if error > 0 else 0.0)
        found.append(np.array(values))
    return found


def at_solution(passes: Passes, bits: Bits, alone: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For every group the distance that its bits add to those of all others, which are as in `bits`.

    What a group adds where it is, is measured: with it, and without it in float. For its other bits that is scaled as
    the distances alone are. So what layers do to each other is in it, around this solution.
    """
    together, found = passes.distance(bits), []
    for k, group in enumerate(passes.groups):
        without: list[int | None] = [None if j == k else b for j, b in enumerate(bits)]
        added = max(together - passes.distance(without), 0.0)
        own = alone[k][group.bits.index(bits[k])]
        factor = float(np.clip(added / own, 0.2, 5.0)) if own > 0 else 1.0
        found.append(alone[k] * factor)
    return found
