"""16 bits for the tensors that 8 destroy, where the target has them and they cost little time.

Kernels of 16-bit activations take up to a hundred times as long as those of 8 where they multiply by weights, and a few
times as long elsewhere. So a layer with weights is widened only if it has a small share of all multiplications. Outputs
of the model keep their type: what reads the file expects it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set

from kquant.graph.ir import Graph
from kquant.graph.ops import Tie, multiplications, op_of
from kquant.quantize.record import Damage, Step
from kquant.targets.target import Target

ROUNDS = 3  # of looking, widening, and looking again
SHARE = 0.01  # of the multiplications with weights


def to_widen(graph: Graph, damage: Sequence[Damage], target: Target) -> frozenset[str]:
    """The tensors that 16 bits would mend and that may have them.

    Args:
        graph: the graph that is quantized.
        damage: what 8 bits destroy in it.
        target: whose kernels compute it.
    """
    if 16 not in target.mixed_activation_bits:
        return frozenset()
    names = {moved for d in damage if d.widen for moved in _moved(graph, d.widen)}
    wide = {n for n in names if not target.float_only(graph[n].op, 16) and not _returned(graph, n)}
    return frozenset(wide) if share(graph, wide) <= SHARE else frozenset(n for n in wide if not share(graph, [n]))


def share(graph: Graph, names: Iterable[str]) -> float:
    """The part of all multiplications with weights that some operations have."""
    return sum(multiplications(graph[n]) for n in names) / max(1, sum(map(multiplications, graph)))


def step(graph: Graph, mended: Sequence[Damage], wide: Set[str]) -> Step:
    """What was widened, why, and what that costs."""
    worst: dict[str, float] = {}
    for damage in mended:
        worst[damage.widen] = min(damage.sqnr, worst.get(damage.widen, damage.sqnr))
    said = ", ".join(f"{n!r} ({worst[n]:.1f} dB in 8 bits)" for n in sorted(worst.keys() & wide))
    cost = f"{100 * share(graph, wide):.2g} % of the multiplications in the slower kernels of 16 bits"
    return Step(name="widen", taken=True, note=f"{said}; {cost}")


def _moved(graph: Graph, name: str) -> Iterator[str]:
    """A tensor and those that only move its values."""
    yield name
    for reader in graph.consumers(name):
        if op_of(reader).grid is Tie.OF_INPUT:
            yield from _moved(graph, reader.name)


def _returned(graph: Graph, name: str) -> bool:
    """Whether the model returns a tensor, as it is or moved."""
    return any(moved in graph.outputs for moved in _moved(graph, name))
