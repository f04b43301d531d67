"""Programs of elementary functions: their values, their text, their composition."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tensorflow as tf

from kquant.graph.ops.functions import ELEMENTARY, Term, erf, inline, program, run

X = np.linspace(-3, 3, 41)


def softplus(x: Term) -> Term:
    return (1.0 + x.exp()).log()


def value(steps: object, *xs: np.ndarray) -> np.ndarray:
    return np.asarray(run(steps, [tf.constant(x) for x in xs]))


def test_an_expression_is_written_down_step_by_step() -> None:
    assert program(softplus) == (("exp", 0), ("add", 1.0, 1), ("log", 2))
    np.testing.assert_allclose(value(program(softplus), X), np.log1p(np.exp(X)))


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda x: 2.0 - x * 3.0 + x, 2 - 2 * X),
        (lambda x: -(1.0 / (x + 4.0)) / 2.0 - 1.0, -0.5 / (X + 4) - 1),
        (lambda x: x.call("select", x.greater(0.5), x, -1.0), np.where(X > 0.5, X, -1)),
        (lambda x: x.maximum(-1.0).minimum(x.abs()), np.minimum(np.maximum(X, -1), np.abs(X))),
    ],
)
def test_operators_compute_what_they_say(write: object, expected: np.ndarray) -> None:
    np.testing.assert_allclose(value(program(write), X), expected)


def test_programs_are_plain_data() -> None:
    steps = program(lambda x: x.call("select", x.less(0.0), 0.25 * x, x))
    np.testing.assert_array_equal(value(json.loads(json.dumps(steps)), X), value(steps, X))


def test_the_type_is_that_of_the_input() -> None:
    for dtype in ("float32", "float64"):
        assert run(program(lambda x: x + 1.0), [tf.constant(X, dtype)]).dtype == dtype


def test_inlining_composes_and_computes_nothing_twice() -> None:
    outer = (("tanh", 0), ("mul", 1, 2))
    composed = inline(outer, [program(softplus), 0], 1)
    np.testing.assert_allclose(value(composed, X), np.tanh(np.log1p(np.exp(X))) * X)
    twice = inline((("mul", 0, 1),), [program(softplus), program(softplus)], 1)
    assert len(twice) == 4
    np.testing.assert_allclose(value(twice, X), np.log1p(np.exp(X)) ** 2)


def test_a_number_is_no_value_of_the_same_number() -> None:
    """x * 1.0 is not x * (value 1)."""
    both = inline((("mul", 0, 1.0), ("mul", 0, 1), ("add", 2, 3)), [0, program(lambda x: x + 1.0)], 1)
    np.testing.assert_allclose(value(both, X), X + X * (X + 1))


def test_the_error_function() -> None:
    expected = [math.erf(x) for x in X]
    np.testing.assert_allclose(value(program(erf), X), expected, atol=2e-7)


def test_names_are_those_of_elementary_functions() -> None:
    with pytest.raises(AttributeError, match="sinus"):
        program(lambda x: x.sinus())
    assert {"exp", "select", "logical_not"} <= set(ELEMENTARY)
