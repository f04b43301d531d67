"""A grid as variables: the arithmetic it stands for, how it learns, and that no step leads off the grid."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from kquant.config.specs import QuantSpec
from kquant.grids.grid import Grid, fake_quantize, grid_from_range
from kquant.keras.fake_quant import LEARNED_VARIABLES, FakeQuant

RUNS = {"eager": lambda f: f, "graph": tf.function, "xla": lambda f: tf.function(f, jit_compile=True)}
EACH_RUN = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
EACH_GRADIENT = pytest.mark.parametrize("gradient", LEARNED_VARIABLES)
LEARNING = [g for g in LEARNED_VARIABLES if g != "ste"]


def grid(bits: int = 4, per_channel: bool = False, low: float = -0.7, high: float = 1.3, **spec: Any) -> Grid:
    """A grid of `bits` bits, of 3 channels on axis 1 or of a whole tensor."""
    sizes = np.float64([1.0, 0.3, 2.0]) if per_channel else np.float64(1.0)
    return grid_from_range(low * sizes, high * sizes, QuantSpec(bits=bits, **spec), 1 if per_channel else None)


def layer_of(q: Grid, gradient: str = "ste", **settings: Any) -> FakeQuant:
    channels = None if q.axis is None else len(q.scale)
    levels = q.qmax - int(np.max(q.zero_point))
    layer = FakeQuant(q.qmin, q.qmax, channels, q.axis, gradient, **{"levels": levels, **settings})
    layer.assign(q)
    return layer


def a_grid_for(gradient: str, bits: int = 4, per_channel: bool = False) -> Grid:
    """A grid that a gradient can start from: the scales of TQT are powers of two."""
    return grid(bits, per_channel, symmetric=gradient == "tqt" or bits == 16, power_of_two=gradient == "tqt")


def samples(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(64, 3)).astype(np.float32) * 1.5


def assert_same_grid(a: Grid, b: Grid) -> None:
    np.testing.assert_array_equal(a.scale, b.scale)
    np.testing.assert_array_equal(a.zero_point, b.zero_point)
    assert (a.qmin, a.qmax, a.axis) == (b.qmin, b.qmax, b.axis)


# --- the grid that it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@EACH_GRADIENT
def test_learning_starts_at_the_grid_that_is_assigned(gradient, per_channel):
    for bits in (2, 3, 4, 5, 6, 7, 8, 16):
        q = a_grid_for(gradient, bits, per_channel)
        layer = layer_of(q, gradient)
        assert_same_grid(layer.to_grid(), q)
        np.testing.assert_array_equal(layer(samples()), fake_quantize(samples(), q))
        assert layer.width == bits
        assert len(layer.trainable_variables) == len(LEARNED_VARIABLES[gradient])


@EACH_RUN
@EACH_GRADIENT
def test_what_is_learned_is_what_is_exported_however_it_runs(run, gradient):
    """The grid that runs is, bit for bit, the one that `to_grid` gives: exponentials are as exact everywhere."""
    layer = layer_of(a_grid_for(gradient, per_channel=True), gradient)
    run_layer, x = run(lambda v: (layer(v), *layer.parameters())), tf.constant(samples())
    rng = np.random.default_rng(0)
    for _ in range(10):
        for v in layer.trainable_variables:
            v.assign(rng.normal(size=v.shape) * 0.3)
        y, scale, zero_point = run_layer(x)
        q = layer.to_grid()
        np.testing.assert_array_equal(scale, q.scale)
        np.testing.assert_array_equal(zero_point, q.zero_point)
        np.testing.assert_array_equal(y, fake_quantize(x, q))


def test_assigning_a_grid_starts_anew():
    layer = layer_of(grid(), "lsq+")
    for v in layer.trainable_variables:
        v.assign(0.3)
    layer.assign(grid(low=-2.0))
    assert_same_grid(layer.to_grid(), grid(low=-2.0))


# --- how it learns ---------------------------------------------------------------------------------------------------


def slopes(layer: FakeQuant, x: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients of sum(weight * layer(x)) by the names of the learned variables."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(weight * layer(tf.constant(x)))
    variables = {k: v.value for k, v in layer.learned.items()}
    return {k: np.asarray(g) for k, g in tape.gradient(loss, variables).items()}


def closed_forms(q: Grid, x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dL/dscale and dL/dzero_point as section 4.1 of the white paper has them, in float64."""
    steps = np.float64(x) / q.scale
    integers = np.rint(steps) + q.zero_point
    below, above = integers < q.qmin, integers > q.qmax
    by_scale = np.select([below, above], [q.qmin - q.zero_point, q.qmax - q.zero_point], np.rint(steps) - steps)
    by_zero_point = np.where(below | above, -np.float64(q.scale), 0.0)
    axes = None if q.axis is None else 0
    return np.sum(weight * by_scale, axes), np.sum(weight * by_zero_point, axes)


def lsq_factor(elements, top):
    """LSQ's g = 1 / sqrt(N Q_p), damped where a grid is fine."""
    return np.minimum(1.0, 4.0 / top) / np.sqrt(elements * top)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("gradient", LEARNING)
def test_gradients_of_what_is_learned(gradient, per_channel):
    """By the chain rule from the closed forms; LSQ's with its g, as a step of the scale itself."""
    q, rate, elements, x = a_grid_for(gradient, 4, per_channel), 2.0, 50, samples()
    weight = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    found = slopes(layer_of(q, gradient, rate=rate, elements=elements), x, weight)
    ds, dz = closed_forms(q, x, weight)
    scale, levels, z = np.float64(q.scale), q.qmax - q.qmin, q.zero_point
    low, high = scale * (q.qmin - z), scale * (q.qmax - z)
    lsq, lsq_plus = lsq_factor(elements, q.qmax - z), lsq_factor(elements, levels)
    zero_by_scale = low / scale**2  # of qmin - low / scale
    expected = {
        "lsq": {"log_scale": ds * lsq / scale},
        "lsq+": {"log_scale": ds * lsq / scale, "shift": dz * lsq_plus / (levels * scale**2)},
        "symmetric": {"log_scale": ds * scale * rate},
        "min_max": {
            "log_low": (-(ds + dz * zero_by_scale) / levels - dz / scale) * low * rate,
            "log_high": (ds + dz * zero_by_scale) / levels * high * rate,
        },
        "tqt": {"log2_scale": ds * scale * np.log(2) * rate},
    }[gradient]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5 * np.abs(value).max(), err_msg=name)
        assert np.abs(found[name]).min() > 0


def test_a_step_of_gradient_descent_on_lsq_is_the_papers_step_on_the_scale():
    """Delta s = -rate * learning_rate * g * dL/ds, and for LSQ+ the same for the offset -s z."""
    q, x, lr, rate, elements = grid(8), samples(), 1e-6, 3.0, 192
    weight = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    layer = layer_of(q, "lsq+", rate=rate, elements=elements)
    found = slopes(layer, x, weight)
    for name, variable in layer.learned.items():
        variable.assign(variable - lr * found[name])
    ds, dz = closed_forms(q, x, weight)
    g_scale, g_offset = (lsq_factor(elements, top) for top in (q.qmax - q.zero_point, q.qmax - q.qmin))
    step = float(layer.to_grid().scale) - float(q.scale)
    assert step == pytest.approx(-rate * lr * g_scale * ds, rel=1e-2)
    offset_step = -rate * lr * g_offset * (-dz / q.scale)  # dL/doffset = dL/dz dz/doffset
    shift = (q.qmax - q.qmin) * rate * float(layer.learned["shift"])  # in steps of the grid, before it is rounded
    assert -shift * q.scale == pytest.approx(offset_step, rel=1e-3)


@pytest.mark.parametrize("gradient", ["lsq", "symmetric"])
def test_a_step_of_adam_changes_every_scale_by_the_same_factor(gradient):
    q = grid(4, per_channel=True)
    layer = layer_of(q, gradient, rate=2.0)
    optimizer = keras.optimizers.Adam(0.01)
    found = slopes(layer, samples(), np.ones((64, 3), np.float32))
    optimizer.apply([tf.constant(found["log_scale"])], layer.trainable_variables)
    factors = layer.to_grid().scale / q.scale
    np.testing.assert_allclose(np.abs(np.log(factors)), 0.02, rtol=1e-3)
    np.testing.assert_array_equal(np.sign(np.log(factors)), -np.sign(found["log_scale"]))


@pytest.mark.parametrize("gradient", LEARNING)
def test_a_grid_learns_the_range_of_its_values(gradient):
    """Starting eight times too wide, it ends with a tenth of the error."""
    x = samples()
    wide = grid(4, low=-32.0, high=32.0, **{"symmetric": True, "power_of_two": gradient == "tqt"})
    layer = layer_of(wide, gradient, rate=1.0, elements=1)
    optimizer = keras.optimizers.Adam(0.1)

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((layer(x) - x) ** 2)
        optimizer.apply(tape.gradient(loss, [v.value for v in layer.trainable_variables]), layer.trainable_variables)
        return loss

    losses = [float(step()) for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]


# --- no step leads off the grid ---------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(1e8, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(50.0),
    "AdamW": lambda: keras.optimizers.AdamW(50.0, weight_decay=0.1),
    "RMSprop": lambda: keras.optimizers.RMSprop(1e4),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("gradient", LEARNING)
def test_any_step_leaves_a_positive_scale_and_zero_on_the_grid(gradient, optimizer):
    q = a_grid_for(gradient, 8, per_channel=True)
    layer, optimizer, rng = layer_of(q, gradient, rate=10.0), optimizer(), np.random.default_rng(0)
    x = tf.constant(samples())
    for _ in range(6):
        weight = rng.normal(size=x.shape).astype(np.float32) * 1e3
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(weight * layer(x))
        optimizer.apply(tape.gradient(loss, [v.value for v in layer.trainable_variables]), layer.trainable_variables)
        found = layer.to_grid()
        assert (found.scale >= 2.0**-63).all() and (found.scale < 2.0**64).all(), found
        assert (found.qmin <= found.zero_point).all() and (found.zero_point <= found.qmax).all(), found
        scale, zero_point = (np.asarray(v) for v in layer.parameters())
        np.testing.assert_array_equal(zero_point, np.rint(zero_point))
        assert np.isfinite(layer(x)).all()
        np.testing.assert_array_equal(layer(np.zeros((1, 3), np.float32)), np.zeros((1, 3)))


@pytest.mark.parametrize("value", [-1e30, -40.0, 40.0, 1e30])
@EACH_GRADIENT
def test_any_value_of_what_is_learned_is_a_grid(gradient, value):
    layer = layer_of(a_grid_for(gradient), gradient, rate=3.0)
    for v in layer.trainable_variables:
        v.assign(value)
    q = layer.to_grid()
    assert 2.0**-63 <= q.scale < 2.0**64 and q.qmin <= q.zero_point <= q.qmax


# --- switched off -----------------------------------------------------------------------------------------------------


@pytest.mark.compiled
@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
def test_what_is_off_leaves_values_as_they_are_and_has_a_grid_without_steps(per_channel):
    q, x = grid(4, per_channel), samples()
    layer, plain = layer_of(q, switchable=True), layer_of(q)
    traces = 0

    @tf.function
    def run(v: Any) -> Any:
        nonlocal traces
        traces += 1
        return layer(v), layer.fake_quantize(v, (0.0, 0.5))

    for on in (True, False, True):
        layer.on.assign(on)
        (y, (clipped, found)), (bounded, parameters) = run(x), plain.fake_quantize(x, (0.0, 0.5))
        np.testing.assert_array_equal(y, fake_quantize(x, q) if on else x)
        np.testing.assert_array_equal(clipped, bounded if on else np.clip(x, 0, 0.5))
        np.testing.assert_array_equal(found, parameters if on else np.zeros(found.shape))
    assert traces == 1


def test_only_what_can_be_switched_has_a_state():
    """Others compute and save as if there were no switches."""
    plain, switchable = layer_of(grid()), layer_of(grid(), switchable=True)
    assert plain.on is None and len(switchable.variables) == len(plain.variables) + 1
    assert plain.supports_jit and not switchable.supports_jit
    assert plain.settings == switchable.settings and "switchable" not in plain.get_config()
    operations = tf.function(plain).get_concrete_function(tf.TensorSpec((None, 3))).graph.get_operations()
    assert not [o.type for o in operations if o.type in ("If", "StatelessIf")]


def test_files_keep_the_state(tmp_path):
    layer = layer_of(grid(), switchable=True)
    layer.on.assign(False)
    inputs = keras.Input((3,))
    keras.Model(inputs, layer(inputs)).save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras").layers[-1]
    assert not loaded.on.numpy()
    np.testing.assert_array_equal(loaded(samples()), samples())


# --- one grid for two tensors, and files ------------------------------------------------------------------------------


def test_tied_quantizers_have_one_grid_and_add_their_gradients():
    a, b = (layer_of(g, "lsq+", elements=3, levels=10) for g in (grid(), grid(low=-3.0)))
    apart = [slopes(layer_of(grid(), "lsq+", elements=3, levels=10), samples(s), np.float32(1)) for s in (0, 1)]
    b.tie(a)
    assert_same_grid(b.to_grid(), grid())
    assert {id(v) for v in a.variables} == {id(v) for v in b.variables}
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(a(samples(0))) + tf.reduce_sum(b(samples(1)))
    found = tape.gradient(loss, {k: v.value for k, v in a.learned.items()})
    for name in found:
        np.testing.assert_allclose(found[name], apart[0][name] + apart[1][name], rtol=1e-4)
    b.learned["log_scale"].assign(0.5)
    assert a.to_grid().scale > grid().scale


@pytest.mark.parametrize(
    "other", [grid(8), grid(4, per_channel=True)], ids=["another number of bits", "another granularity"]
)
def test_grids_that_differ_in_kind_cannot_be_tied(other):
    with pytest.raises(ValueError, match="cannot share a grid"):
        layer_of(grid()).tie(layer_of(other))
    with pytest.raises(ValueError, match="cannot share a grid"):
        layer_of(grid()).tie(layer_of(grid(), "lsq"))


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@EACH_GRADIENT
def test_files_and_configs_keep_the_grid_and_how_it_learns(gradient, per_channel, tmp_path):
    layer = layer_of(a_grid_for(gradient, 4, per_channel), gradient, rate=0.5, elements=7)
    for v in layer.trainable_variables:
        v.assign(np.full(v.shape, 0.2))
    inputs = keras.Input((3,))
    keras.Model(inputs, layer(inputs)).save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras").layers[-1]
    assert loaded.settings == layer.settings
    assert_same_grid(loaded.to_grid(), layer.to_grid())
    for name, variable in layer.learned.items():
        np.testing.assert_array_equal(loaded.learned[name], variable)


def test_quantizers_compute_in_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        layer = layer_of(grid(8), "lsq")
        model_input = keras.Input((3,), dtype="float32")
        model = keras.Model(model_input, layer(model_input))
    finally:
        keras.config.set_dtype_policy("float32")
    x = samples()
    y = model(x)
    assert y.dtype == tf.float32
    np.testing.assert_array_equal(y, fake_quantize(x, grid(8)))
