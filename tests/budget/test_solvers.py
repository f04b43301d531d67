"""Solvers on problems whose answer is known: by trying all choices, or by planting it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kquant.budget.groups import Bits, Group
from kquant.budget.solvers import SOLVERS, Measure, Problem, Refine, Task, separable
from kquant.errors import ConfigError

BITS = (2, 4, 8)


def problem(seed: int, groups: int = 5, planted: int | None = None) -> Problem:
    """Losses that fall with the bits, bytes that rise; a planted group loses a thousandfold."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(50, 500, groups)
    scale = rng.lognormal(0, 1, groups)
    if planted is not None:
        scale[planted] = 1000 * scale.max()
    return Problem(
        groups=tuple(
            Group(layer=f"l{k}", nodes=(f"l{k}",), bits=BITS, size=int(n), macs=int(n)) for k, n in enumerate(sizes)
        ),
        loss=[s * np.array([1.0, 0.06, 0.0002]) for s in scale],
        costs={"max_bytes": [n * np.array(BITS) / 8 for n in sizes]},
        rest={"max_bytes": 100.0},
    )


def budget(p: Problem, share: float) -> dict[str, float]:
    """A part of the way from the smallest file to the largest."""
    most = p.cost("max_bytes", (8,) * len(p.groups))
    return {"max_bytes": p.least("max_bytes") + share * (most - p.least("max_bytes"))}


def solved(name: str, p: Problem, limits: dict[str, float], seed: int = 0) -> Bits:
    """A network without cross terms: what a pass measures is the sum of the losses."""
    return asked(name, p, limits, lambda bits: p.picked(p.loss, bits), lambda bits: p.loss, 2, seed)


def asked(
    name: str, p: Problem, limits: dict[str, float], measure: Measure, refine: Refine, effort: int, seed: int = 0
) -> Bits:
    rng = np.random.default_rng(seed)
    return SOLVERS[name](Task(problem=p, limits=limits, measure=measure, refine=refine, rng=rng, effort=effort))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_the_separable_part_is_solved_exactly(seed: int, share: float) -> None:
    p = problem(seed)
    limits = budget(p, share)
    best = min(
        (p.picked(p.loss, bits) for bits in itertools.product(BITS, repeat=5) if not p.excess(bits, limits)),
    )
    found = separable(p, limits)
    assert p.excess(found, limits) == 0
    assert p.picked(p.loss, found) == pytest.approx(best, rel=1e-5, abs=1e-7)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), name=st.sampled_from(sorted(SOLVERS)))
def test_no_solver_exceeds_a_budget_and_each_is_deterministic(seed: int, share: float, name: str) -> None:
    p = problem(seed)
    limits = budget(p, share)
    found = solved(name, p, limits)
    assert p.excess(found, limits) == 0 and found == solved(name, p, limits)
    assert p.picked(p.loss, found) >= p.picked(p.loss, separable(p, limits)) - 1e-6


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("planted", [0, 3])
def test_a_sensitive_layer_gets_the_bits(name: str, planted: int) -> None:
    p = problem(7, planted=planted)
    found = solved(name, p, budget(p, 0.45))
    assert found[planted] == 8 and min(found) < 8


def test_several_budgets_hold_at_once() -> None:
    p = problem(3)
    times = [np.array([2.6, 1.1, 1.0]) * n for n in (1.0, 5.0, 2.0, 1.0, 3.0)]
    p = Problem(
        groups=p.groups, loss=p.loss, costs={**p.costs, "max_latency": times}, rest={**p.rest, "max_latency": 1.0}
    )
    limits = {**budget(p, 0.4), "max_latency": 15.0}
    for name in SOLVERS:
        assert p.excess(solved(name, p, limits), limits) == 0


def test_cross_terms_are_found_by_passes() -> None:
    """Two layers that do no harm alone, and much together: the sum of the losses does not show it."""
    p = problem(1, groups=4)
    p = Problem(groups=p.groups, loss=[np.array([0.01, 0.001, 0.0])] * 4, costs=p.costs, rest=p.rest)

    def measure(bits: Bits) -> float:
        return p.picked(p.loss, bits) + 10.0 * (bits[0] < 8 and bits[1] < 8)

    def refine(bits: Bits) -> list[np.ndarray]:
        return [loss + (measure(bits) > 1) * np.array([10.0, 10.0, 0]) * (k < 2) for k, loss in enumerate(p.loss)]

    limits = {"max_bytes": p.cost("max_bytes", (8, 4, 4, 4)) + 20}
    found = asked("milp", p, limits, measure, refine, 3)
    assert measure(found) < 1 and p.excess(found, limits) == 0


@pytest.mark.parametrize("name", SOLVERS)
def test_a_budget_below_the_least_is_refused_with_it(name: str) -> None:
    p = problem(0)
    with pytest.raises(ConfigError, match="cannot be reached.*takes about"):
        solved(name, p, {"max_bytes": p.least("max_bytes") - 1})


def test_sums_that_mislead_are_no_reason_to_leave_the_uniform_choice() -> None:
    """Groups look harmless at 2 bits alone, and are not together; the uniform choice is a little too large."""
    p = problem(5)
    p = Problem(groups=p.groups, loss=[np.array([0.011, 0.01, 0.0])] * 5, costs=p.costs, rest=p.rest)

    def measure(bits: Bits) -> float:
        return p.picked(p.loss, bits) + sum(b == 2 for b in bits) ** 3

    limits = {"max_bytes": p.cost("max_bytes", (4,) * 5) - 1}
    found = asked("milp", p, limits, measure, lambda bits: p.loss, 1)
    assert sum(b == 2 for b in found) == 1 and p.excess(found, limits) == 0
