"""The weights of every layer at every number of bits, rounded with the float inputs in view, and their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kquant.budget.groups import Group
from kquant.config.specs import AdaRound
from kquant.graph.ir import Node
from kquant.graph.ops import bias_of, weight_of, weight_view
from kquant.grids.formats import weight_grid
from kquant.quantize.adaround import positions, round_on
from kquant.quantize.data import CalibrationData
from kquant.quantize.gram import Moments, moments
from kquant.quantize.plan import Plan
from kquant.quantize.walk import Batches, layer_by_layer

_SETTINGS = AdaRound(sweeps=10)
_NEAREST = AdaRound(sweeps=1, scales=(1.0,))  # of 8 bits nothing is left to gain


@dataclass(frozen=True, eq=False)
class Rounded:
    """A layer at a number of bits.

    Attributes:
        node: with the kernel on its grid and the bias that belongs to it.
        error: of its output, summed over channels, relative to the variance of that.
    """

    node: Node
    error: float


def rounded_layers(
    plan: Plan, groups: Sequence[Group], data: CalibrationData, *, seed: int = 0, progress: bool = True
) -> Mapping[tuple[str, int], Rounded]:
    """(node, bits) -> the layer, from one pass over the data: the second moments of its inputs do for all bits."""
    wanted = {n: g.bits for g in groups for n in g.nodes}
    found: dict[tuple[str, int], Rounded] = {}

    def solve(node: Node, batches: Batches) -> Node:
        m = moments(node, batches(), positions=positions(node, _SETTINGS), seed=seed)
        for bits in wanted[node.name]:
            found[node.name, bits] = _rounded(plan, node, batches, m, bits)
        return node

    layer_by_layer(plan.graph, wanted, data, solve, progress=progress, title="moments")
    return found


def _rounded(plan: Plan, node: Node, batches: Batches, m: Moments, bits: int) -> Rounded:
    spec = replace(plan.weights[node.name], bits=bits)
    axis = weight_of(node).channels if spec.per_channel else None
    view = weight_view(node)
    if not view.any():
        return Rounded(node, 0.0)
    grid = weight_grid(view, spec, axis, name=node.origin or node.name)
    made, row = round_on(node, batches, m, grid, _NEAREST if bits >= 8 else _SETTINGS)
    keep = {k: made.weights[k] for k in (weight_of(node).name, bias_of(node))}
    return Rounded(node.with_weights(**keep), max(0.0, row.loss) / max(row.power, 1e-30))
