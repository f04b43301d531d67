"""Which bits every group gets: solvers of one signature.

solve(task) -> bits of every group.

    milp        the separable part exactly (`scipy.optimize.milp`), then cross terms measured around the solution
    greedy      bits are taken from the group that loses least for what it saves, as AIMET's Pareto walk does
    evolution   mutation and crossover of a population, as neural architecture search does
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from kquant.budget.groups import Bits, Group, uniform
from kquant.errors import ConfigError

Array = np.ndarray
Measure = Callable[[Bits], float]
Refine = Callable[[Bits], list[Array]]  # the distances that bits add around a solution (`passes.at_solution`)
_SECONDS = 30.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """A choice of bits for every group.

    Attributes:
        groups: what is chosen for.
        loss: for each group an array like its `bits`: what each of them adds to the distance.
        costs: resource -> likewise, what each of them costs.
        rest: resource -> what the rest of the file costs.
    """

    groups: tuple[Group, ...]
    loss: list[Array]
    costs: Mapping[str, list[Array]]
    rest: Mapping[str, float]

    def picked(self, tables: Sequence[Array], bits: Bits) -> float:
        """The sum of the entries of tables that bits pick."""
        return float(sum(t[g.bits.index(b)] for t, g, b in zip(tables, self.groups, bits, strict=True)))

    def cost(self, resource: str, bits: Bits) -> float:
        """What a choice costs."""
        return self.rest[resource] + self.picked(self.costs[resource], bits)

    def excess(self, bits: Bits, limits: Mapping[str, float]) -> float:
        """By how much budgets are exceeded, relative to these; 0 where none is."""
        return sum(max(0.0, self.cost(r, bits) / limit - 1) for r, limit in limits.items())

    def least(self, resource: str) -> float:
        """The least that any choice costs."""
        return self.rest[resource] + float(sum(t.min() for t in self.costs[resource]))


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """What a solver is asked for.

    Attributes:
        problem: what is chosen, and what sums of its entries say.
        limits: resource -> the most.
        measure: a forward pass with given bits (`Passes.distance`), of which a solver makes as many as `effort` says.
        refine: bits -> the losses around them (`passes.at_solution`).
        rng: of what is drawn.
        effort: rounds.
    """

    problem: Problem
    limits: Mapping[str, float]
    measure: Measure
    refine: Refine
    rng: np.random.Generator
    effort: int


Solver = Callable[[Task], Bits]


def check_reachable(problem: Problem, limits: Mapping[str, float]) -> None:
    """Refuse budgets below what the cheapest choice costs.

    Raises:
        ConfigError: names the budget, and the least.
    """
    for resource, limit in limits.items():
        if problem.least(resource) > limit:
            raise ConfigError(
                f"{resource}={limit:,.6g} cannot be reached: the smallest choice of bits takes about "
                f"{problem.least(resource):,.6g}. Raise the budget, or allow fewer bits with another target."
            )


def separable(problem: Problem, limits: Mapping[str, float]) -> Bits:
    """The bits of the least sum of losses within the limits, exactly.

    Raises:
        ConfigError: no choice is within the limits.
    """
    check_reachable(problem, limits)
    sizes = [len(g.bits) for g in problem.groups]
    starts = np.cumsum([0, *sizes])
    one_each = np.zeros((len(sizes), starts[-1]))
    for k, (start, size) in enumerate(zip(starts, sizes, strict=False)):
        one_each[k, start : start + size] = 1
    loss = np.concatenate(problem.loss)
    constraints = [LinearConstraint(one_each, 1, 1)]
    for resource, limit in limits.items():
        row = np.concatenate(problem.costs[resource])
        constraints.append(LinearConstraint(row[None] / limit, -np.inf, (limit - problem.rest[resource]) / limit))
    largest = float(loss.max(initial=0.0)) or 1.0
    tie = 1e-9 * np.concatenate([np.asarray(g.bits, float) for g in problem.groups])  # fewer bits where nothing is lost
    found = milp(
        loss / largest + tie,
        constraints=constraints,
        integrality=np.ones_like(loss),
        bounds=Bounds(0, 1),
        options={"time_limit": _SECONDS, "mip_rel_gap": 1e-6},
    )
    if found.x is None:
        raise ConfigError(f"No choice of bits is within all budgets {dict(limits)}: {found.message} Raise one of them.")
    return tuple(
        g.bits[int(np.argmax(found.x[s : s + n]))] for g, s, n in zip(problem.groups, starts, sizes, strict=False)
    )


def _milp(task: Task) -> Bits:
    problem, limits, measure = task.problem, task.limits, task.measure
    found = separable(problem, limits)
    best = min([found, *_from_uniform(problem, limits)], key=measure)
    tried, current = {best}, best
    for _ in range(task.effort):
        problem = replace(problem, loss=task.refine(current))
        current = separable(problem, limits)
        if current in tried:
            break
        tried.add(current)
        if measure(current) < measure(best):
            best = current
    return _swapped(problem, limits, measure, best, 8 * task.effort)


def _from_uniform(problem: Problem, limits: Mapping[str, float]) -> list[Bits]:
    """The same number of bits for all groups, as far as they may have it, lowered where that exceeds a limit.

    Where sums of losses mislead, they mislead least here: few groups differ from their neighbours.
    """
    starts = dict.fromkeys(uniform(problem.groups, b) for b in sorted({b for g in problem.groups for b in g.bits}))
    found = []
    for start in starts:
        try:
            found.append(_lowered(problem, limits, start))
        except ConfigError:  # nothing lower fits; other starts may
            continue
    return found


def _swapped(problem: Problem, limits: Mapping[str, float], measure: Measure, bits: Bits, passes: int) -> Bits:
    """A choice after single changes and exchanges that a pass shows to be better, the most promising first."""
    best, value = bits, measure(bits)
    tried = {best}
    while passes > 0:
        options = [b for b in _neighbours(problem, best) if b not in tried and problem.excess(b, limits) == 0]
        options = sorted(options, key=lambda b: problem.picked(problem.loss, b))[:4]
        better = None
        for option in options[:passes]:
            tried.add(option)
            passes -= 1
            if (found := measure(option)) < value:
                better, value = option, found
                break
        if better is None:
            break
        best = better
    return best


def _neighbours(problem: Problem, bits: Bits) -> list[Bits]:
    """One group changed, or one raised and one lowered."""
    moves = [
        (k, g.bits[j]) for k, g in enumerate(problem.groups) for i in [g.bits.index(bits[k])]
        for j in (i - 1, i + 1) if 0 <= j < len(g.bits)
    ]  # fmt: skip

    def moved(*pairs: tuple[int, int]) -> Bits:
        changed = dict(pairs)
        return tuple(changed.get(k, b) for k, b in enumerate(bits))

    up, down = ([m for m in moves if (m[1] > bits[m[0]]) is way] for way in (True, False))
    return [moved(m) for m in up] + [moved(a, b) for a in up for b in down if a[0] != b[0]]


def _greedy(task: Task) -> Bits:
    check_reachable(task.problem, task.limits)
    return _lowered(task.problem, task.limits, tuple(g.bits[-1] for g in task.problem.groups))


def _lowered(problem: Problem, limits: Mapping[str, float], bits: Bits) -> Bits:
    """Bits that are within the limits, from others: always the group is lowered that loses least for what it saves.

    Raises:
        ConfigError: no lower choice is within the limits.
    """
    while (excess := problem.excess(bits, limits)) > 0:
        options = []
        for k, group in enumerate(problem.groups):
            for b in group.bits[: group.bits.index(bits[k])]:
                lower = (*bits[:k], b, *bits[k + 1 :])
                saved = excess - problem.excess(lower, limits)
                lost = problem.picked(problem.loss, lower) - problem.picked(problem.loss, bits)
                if saved > 0:
                    options.append((max(lost, 0.0) / saved, lower))
        if not options:
            raise ConfigError(f"No choice of bits is within all budgets {dict(limits)}: raise one of them.")
        bits = min(options)[1]
    return bits


def _evolution(task: Task) -> Bits:
    """Half of each generation is kept; children are crossed and mutated, and made cheaper until they fit."""
    problem, limits, measure, rng = task.problem, task.limits, task.measure, task.rng
    size, start = 12, _greedy(task)
    population = [start] + [_cheaper(problem, limits, _mutated(problem, start, rng, 0.3), rng) for _ in range(size - 1)]
    for _ in range(2 * task.effort):
        kept = sorted(dict.fromkeys(population), key=measure)[: size // 2]
        children = []
        for _ in range(size - len(kept)):
            a, b = (kept[int(i)] for i in rng.integers(len(kept), size=2))
            mask = rng.random(len(a)) < 0.5
            child = tuple(x if m else y for x, y, m in zip(a, b, mask, strict=True))
            children.append(_cheaper(problem, limits, _mutated(problem, child, rng, 0.1), rng))
        population = [*kept, *children]
    return min(population, key=measure)


def _mutated(problem: Problem, bits: Bits, rng: np.random.Generator, rate: float) -> Bits:
    return tuple(
        int(rng.choice(g.bits)) if rng.random() < rate else b for g, b in zip(problem.groups, bits, strict=True)
    )


def _cheaper(problem: Problem, limits: Mapping[str, float], bits: Bits, rng: np.random.Generator) -> Bits:
    """The bits, those of random groups taken away until all budgets hold."""
    for k in rng.permutation(len(bits)).repeat(max(len(g.bits) for g in problem.groups)):
        if problem.excess(bits, limits) == 0:
            break
        group = problem.groups[k]
        lower = group.bits[max(0, group.bits.index(bits[k]) - 1)]
        bits = (*bits[:k], lower, *bits[k + 1 :])
    return bits if problem.excess(bits, limits) == 0 else separable(problem, limits)


SOLVERS: Mapping[str, Solver] = {"milp": _milp, "greedy": _greedy, "evolution": _evolution}
