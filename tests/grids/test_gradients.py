"""Values of the computed, gradients of the ideal."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from kquant.config.specs import QuantSpec
from kquant.grids.gradients import (
    checked_loss,
    exact,
    fake_quant,
    grid_of_range,
    power_of_two,
    round_ste,
    scaled_gradient,
)
from kquant.grids.grid import Grid, fake_quantize, grid_from_range

RUNS = {
    "eager": lambda f: f,
    "graph": tf.function,
    "xla": lambda f: tf.function(f, jit_compile=True),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_round_ste_rounds_half_to_even_and_passes_gradients(run):
    x = tf.constant([-2.5, -1.5, -0.5, 0.5, 1.5, 2.4])
    weight = tf.constant([1.0, -2.0, 3.0, 4.0, 5.0, -6.0])

    def value_and_gradient(v):
        with tf.GradientTape() as tape:
            tape.watch(v)
            y = round_ste(v)
        return y, tape.gradient(y, v, weight)

    y, gradient = run(value_and_gradient)(x)
    np.testing.assert_array_equal(y, [-2, -2, 0, 0, 2, 2])
    np.testing.assert_array_equal(gradient, weight)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_exact_has_the_value_of_one_and_the_gradient_of_the_other(run):
    x = tf.constant([-2.0, 0.3, 1.7])

    def value_and_gradient(v):
        with tf.GradientTape() as tape:
            tape.watch(v)
            y = exact(v**2, tf.floor(v) * 100.0 * v)  # the computed has a gradient of its own, which must not count
        return y, tape.gradient(y, v)

    y, gradient = run(value_and_gradient)(x)
    np.testing.assert_allclose(y, np.floor(x) * 100 * x)
    np.testing.assert_allclose(gradient, 2 * x)


def test_gradients_of_exact_chain():
    x = tf.constant(3.0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = exact(5.0 * round_ste(2.0 * x), tf.constant(-1.0)) * 7.0
    assert (float(y), float(tape.gradient(y, x))) == (-7.0, 70.0)


# --- quantization to a grid: values -----------------------------------------------------------------------------------

PER_TENSOR = (np.float32(0.0731), np.float32(3))
PER_CHANNEL = (np.float32([0.02, 0.11, 0.5, 0.0731]), np.float32([-7, 3, 0, 2]))
CAPS = (0.0, np.float32([1.0, 0.33, 6.0, 0.5]))
CASES = {
    "per tensor": (*PER_TENSOR, -8, 7, (None, None)),
    "per channel": (*PER_CHANNEL, -8, 7, (None, None)),
    "relu": (*PER_TENSOR, -8, 7, (0.0, None)),
    "clip": (*PER_TENSOR, -128, 127, (-0.5, 1.0)),
    "clip beyond the grid": (*PER_TENSOR, -8, 7, (-100.0, 100.0)),
    "caps": (*PER_CHANNEL, -8, 7, CAPS),
    "2 bits": (*PER_TENSOR, 2, 5, (None, None)),
    "16 bits": (np.float32(1e-4), np.float32(0), -32768, 32767, (None, None)),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
EACH_RUN = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


def values(scale: Any, seed: int = 0) -> np.ndarray:
    """[500, 4]: from far below to far above any of the grids, with halves of the scale among them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(500, 4)) * rng.choice([0.1, 1.0, 10.0], (500, 1))
    x[:50] = (np.arange(50)[:, None] - 25.5) * scale
    return x.astype(np.float32)


def in_numpy(x: np.ndarray, scale: Any, zero_point: Any, qmin: int, qmax: int, clip: Any) -> np.ndarray:
    """The values by integers, in float32 as the target has it; a fused activation clamps integers."""
    low, high = qmin - zero_point, qmax - zero_point
    low = low if clip[0] is None else np.maximum(low, np.rint(np.float32(clip[0]) / scale))
    high = high if clip[1] is None else np.minimum(high, np.rint(np.float32(clip[1]) / scale))
    return np.clip(np.rint(x / scale), low, high).astype(np.float32) * scale


@EACH_RUN
@EACH_CASE
def test_fake_quant_equals_numpy_however_it_runs(run, case):
    scale, zero_point, *rest = case
    x = values(scale)
    found = run(lambda v, s, z: fake_quant(v, s, z, *rest))(x, scale, zero_point)
    np.testing.assert_array_equal(found, in_numpy(x, scale, zero_point, *rest))


def test_without_a_clip_it_is_the_arithmetic_of_the_target():
    for (scale, zero_point), axis in ((PER_TENSOR, None), (PER_CHANNEL, 1)):
        q = Grid(scale, zero_point.astype(np.int32), -8, 7, axis)
        x = values(scale)
        np.testing.assert_array_equal(fake_quant(x, scale, zero_point, -8, 7), fake_quantize(x, q))


# --- its gradients ----------------------------------------------------------------------------------------------------


def gradients(f: Callable[..., Any], arguments: Sequence[Any], weight: Any) -> list[np.ndarray]:
    """Of sum(weight * f), by TensorFlow."""
    arguments = [tf.constant(a, tf.float32) for a in arguments]
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        y = f(*arguments)
    return [np.asarray(g) for g in tape.gradient(y, arguments, tf.constant(weight, tf.float32))]


def finite_differences(f: Callable[..., Any], arguments: Sequence[Any], weight: Any) -> list[np.ndarray]:
    """Of sum(weight * f), central, entry by entry, in float64."""
    arguments = [np.array(a, np.float64) for a in arguments]
    found = []
    for a in arguments:
        gradient = np.zeros_like(a)
        for index in np.ndindex(a.shape):
            before, h = a[index], 1e-6 * max(abs(a[index]), 1e-3)
            losses = []
            for sign in (1, -1):
                a[index] = before + sign * h
                losses.append(np.sum(weight * f(*arguments)))
            a[index] = before
            gradient[index] = (losses[0] - losses[1]) / (2 * h)
        found.append(gradient)
    return found


def soft_fake_quant(
    x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int, clip: Any
) -> tuple[Callable[..., Any], Any]:
    """Quantization with every round(u) replaced by u + c, where c is round(u) - u at the point (x, scale).

    Returns:
        The function, differentiable but where it clamps, and where the point is away from there.
    """
    x, scale, zero_point = (np.array(a, np.float64) for a in (x, scale, zero_point))
    offsets = {name: np.rint(v / scale) - v / scale for name, v in [("x", x), *bounds(clip)]}

    def edges(s: Any, z: Any) -> tuple[Any, Any]:
        low, high = qmin - z, qmax - z
        for name, bound in bounds(clip):
            edge = bound / s + offsets[name]
            low, high = (np.maximum(low, edge), high) if name == "lo" else (low, np.minimum(high, edge))
        return low, high

    def soft(x: Any, s: Any, z: Any) -> Any:
        return s * np.clip(x / s + offsets["x"], *edges(s, z))

    steps = x / scale
    clear = np.all([np.abs(np.rint(steps) - edge) > 0.5 for edge in edges(scale, zero_point)], axis=0)
    return soft, clear & (np.abs(np.abs(offsets["x"]) - 0.5) > 1e-3)


def bounds(clip: Any) -> list[tuple[str, np.ndarray]]:
    return [(name, np.float64(b)) for name, b in zip(("lo", "hi"), clip, strict=True) if b is not None]


@EACH_CASE
def test_gradients_of_fake_quant_are_the_slopes_of_its_soft_parts(case):
    scale, zero_point, *rest = case
    x = values(scale)[::5]
    soft, clear = soft_fake_quant(x, scale, zero_point, *rest)
    weight = np.random.default_rng(1).normal(size=x.shape) * clear
    found = gradients(lambda v, s, z: fake_quant(v, s, z, *rest), (x, scale, zero_point), weight)
    for ours, expected in zip(found, finite_differences(soft, (x, scale, zero_point), weight), strict=True):
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-4 * max(1, np.abs(expected).max()))
    assert all(np.abs(g).max() > 0 for g in found[:2])


def test_gradients_of_fake_quant_at_the_ends_of_the_grid():
    """The documented forms, on a grid of -2 to 1 with scale 0.5 and zero point 1."""
    x = np.float32([-1.9, -1.74, -1.5, 0.2, 0.24, 0.26, 9.0])  # q - z is -3 from -1.75 and 0 up to 0.25
    inside = np.bool_([False, True, True, True, True, False, False])
    steps = x / 0.5
    by_scale = np.where(inside, np.rint(steps) - steps, [-3] * 3 + [0] * 4)
    by_zero_point = np.where(inside, 0, -0.5)
    for k in range(len(x)):
        one = np.eye(len(x))[k]
        dx, ds, dz = gradients(lambda v, s, z: fake_quant(v, s, z, -2, 1), (x, 0.5, 1.0), one)
        np.testing.assert_array_equal(dx, one * inside)
        np.testing.assert_allclose([ds, dz], [by_scale[k], by_zero_point[k]], atol=1e-6)


def test_gradients_where_a_fused_activation_clamps():
    """Beyond a cap of 1.1 on a scale of 0.25 (4.4 steps) the value is 4 steps: dy/ds = 4 - 4.4, and z has no say."""
    f = lambda v, s, z: fake_quant(v, s, z, -128, 127, (0.0, 1.1))  # noqa: E731
    for x, slopes in ((3.0, (0, -0.4, 0)), (0.95, (1, 0.2, 0)), (-2.0, (0, 0, 0))):
        np.testing.assert_allclose(gradients(f, ([x], 0.25, -128.0), [1.0])[0], slopes[0])
        np.testing.assert_allclose(gradients(f, ([x], 0.25, -128.0), [1.0])[1:], slopes[1:], atol=1e-6)
    # the grid ends at 0.75, before the cap: it is the grid that clamps
    f = lambda v, s, z: fake_quant(v, s, z, 0, 3, (0.0, 1.1))  # noqa: E731
    assert [float(g) for g in gradients(f, ([3.0], 0.25, 0.0), [1.0])[1:]] == [3.0, -0.25]


@EACH_RUN
def test_gradients_are_the_same_however_they_run(run):
    scale, zero_point, *rest = CASES["caps"]
    x = values(scale)

    def slopes(x: Any, scale: Any, zero_point: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch((x, scale, zero_point))
            y = tf.reduce_sum(tf.sin(fake_quant(x, scale, zero_point, *rest)))
        return tape.gradient(y, (x, scale, zero_point))

    arguments = [tf.constant(a) for a in (x, scale, zero_point)]
    for found, expected in zip(run(slopes)(*arguments), slopes(*arguments), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


# --- what is put in for scale and zero point -------------------------------------------------------------------------


def test_scaled_gradient_changes_nothing_but_the_gradient():
    x = np.float32([1.5, -2.0])
    np.testing.assert_array_equal(scaled_gradient(x, 0.25), x)
    np.testing.assert_allclose(gradients(lambda v: scaled_gradient(v, 0.25) ** 2, (x,), [1, 1])[0], 0.25 * 2 * x)


@EACH_RUN
def test_power_of_two_rounds_up_exactly_and_stays_a_normal_number(run):
    exponents = np.float32([-200, -126.5, -3.999, -3.0, -2.1, 0.0, 1e-6, 0.5, 10.0, 126.5, 400])
    found = run(power_of_two)(tf.constant(exponents)).numpy()
    np.testing.assert_array_equal(found, np.ldexp(1.0, np.clip(np.ceil(exponents), -126, 127).astype(int)))


def test_the_gradient_of_power_of_two_is_that_of_the_power_it_rounds_to():
    """TQT, eq. 7: with ceil(t) replaced by t + c, d/dt 2^(t + c) = 2^(t + c) ln 2."""
    t, weight = np.float32([-3.4, 0.2, 2.0]), np.float32([1, -2, 3])
    offset = np.ceil(np.float64(t)) - t
    expected = finite_differences(lambda v: np.exp2(v + offset), (t,), weight)[0]
    np.testing.assert_allclose(gradients(power_of_two, (t,), weight)[0], expected, rtol=1e-5)


RANGES = (np.float32([-1.0, -0.3, 0.0, -2.7]), np.float32([2.0, 0.71, 6.0, 0.0]))


def test_grid_of_range_is_the_grid_that_calibration_makes():
    spec = QuantSpec(bits=4)
    q = grid_from_range(*RANGES, spec, axis=0)
    scale, zero_point = grid_of_range(*map(tf.constant, RANGES), -8, 7)
    np.testing.assert_allclose(scale, q.scale, rtol=1e-6)
    np.testing.assert_array_equal(zero_point, q.zero_point)


def test_min_max_gradients_are_those_of_the_chain_through_scale_and_zero_point():
    """Every round replaced by u + c; at an edge, then, dy/dlow is 1 up to the rounding of the zero point."""
    low, high = np.float64(-1.0), np.float64(2.03)
    scale = (high - low) / 15
    zero_offset = np.rint(-8 - low / scale) - (-8 - low / scale)
    x = np.float32([-3.0, -0.52, 0.06, 0.83, 1.71, 5.0])
    offset = np.rint(x / scale) - x / scale

    def soft(x: Any, low: Any, high: Any) -> Any:
        s = (high - low) / 15
        z = -8 - low / s + zero_offset
        return s * np.clip(x / s + offset, -8 - z, 7 - z)

    def ours(x: Any, low: Any, high: Any) -> Any:
        return fake_quant(x, *grid_of_range(low, high, -8, 7), -8, 7)

    for one in np.eye(len(x)):
        found = gradients(ours, (x, low, high), one)
        for a, b in zip(found, finite_differences(soft, (x, low, high), one), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    by_low, by_high = (float(g) for g in gradients(ours, ([-3.0], low, high), [1.0])[1:])
    assert by_low == pytest.approx(1 + zero_offset / 15, rel=1e-4)
    assert by_high == pytest.approx(-zero_offset / 15, abs=1e-4)


# --- losses that are not finite --------------------------------------------------------------------------------------


@EACH_RUN
def test_a_finite_loss_passes(run):
    def value_and_gradient(v: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(v)
            y = checked_loss(3.0 * v, "no")
        return y, tape.gradient(y, v)

    assert [float(t) for t in run(value_and_gradient)(tf.constant(2.0))] == [6.0, 3.0]


@pytest.mark.parametrize("run", [RUNS["eager"], RUNS["graph"]], ids=["eager", "graph"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_has_no_gradient(run, value):
    variable = tf.Variable(value)

    @run
    def step() -> Any:
        with tf.GradientTape() as tape:
            y = checked_loss(3.0 * variable, "the message")
        variable.assign_sub(tape.gradient(y, variable))

    with pytest.raises(tf.errors.InvalidArgumentError, match="the message"):
        step()
    np.testing.assert_array_equal(variable.numpy(), np.float32(value))
    assert not np.isfinite(float(checked_loss(variable, "no")))  # the loss itself can be looked at
