"""What Keras users do with a model, and that it learns: the file that comes out computes what was trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kquant
from kquant.config.quant_config import QuantConfig
from kquant.config.specs import QuantSpec, Training
from kquant.graph.ops import weight_of, weight_view
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import grid_from_range
from kquant.keras import layer as simulation
from kquant.keras.model import Learning, QuantizedModel, extract, insert
from kquant.qat.learning import learning_of
from kquant.qat.prepare import prepare_qat
from tests.support.quantizers import TQT, layer_table, outputs, weights
from tests.support.toy import asked

CLASSES = 3


def user_model(seed: int = 0) -> keras.Model:
    """A layer that is called twice, a concatenation, an addition; logits."""
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="stem")(x)
    shared = layers.Conv2D(4, 3, padding="same", name="shared")
    x = layers.Concatenate(name="cat")([shared(x), x + shared(shared(x))])
    x = layers.GlobalAveragePooling2D(name="pool")(layers.DepthwiseConv2D(3, activation="relu6", name="depthwise")(x))
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x))


def small_model(seed: int = 0) -> keras.Model:
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((6, 6, 2), name="image")
    x = layers.Flatten()(layers.Conv2D(4, 3, activation="relu", name="conv")(x))
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x))


def data(samples: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, 6, 6, 2)).astype(np.float32)
    return x, np.argmax(x.mean((1, 2)) @ rng.normal(size=(2, CLASSES)), -1)


def loss() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def prepared(
    model: keras.Model | None = None, config: Any = "w8a8", gradient: str = "lsq", **settings: Any
) -> QuantizedModel:
    model = model or small_model()
    return prepare_qat(model, data()[0], config, training=Training(gradient=gradient, **settings), progress=False)


def compiled(model: QuantizedModel, optimizer: Any = None, **settings: Any) -> QuantizedModel:
    model.compile(optimizer or keras.optimizers.Adam(0.01), loss(), **settings)
    return model


def state(model: keras.Model) -> list[np.ndarray]:
    """All variables, those of the optimizer too."""
    return [np.asarray(v) for v in (*model.variables, *model.optimizer.variables)]


def assert_same_state(a: keras.Model, b: keras.Model) -> None:
    assert len(state(a)) == len(state(b))
    for v, x, y in zip((*a.variables, *a.optimizer.variables), state(a), state(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=v.path)


def steps(model: QuantizedModel, optimizer: keras.optimizers.Optimizer, count: int, x: Any, y: Any) -> list[float]:
    """A training loop of one's own on one batch; the losses."""

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            value = loss()(y, model(x, training=True))
        optimizer.apply(tape.gradient(value, [v.value for v in model.trainable_variables]), model.trainable_variables)
        return value

    optimizer.build(model.trainable_variables)
    return [float(step()) for _ in range(count)]


# --- fit, evaluate, save, load ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fit_learns_weights_and_grids():
    model, (x, y) = compiled(prepared(config="w4a4", gradient="lsq+"), metrics=["accuracy"]), data(64)
    before = extract(model)
    history = model.fit(x, y, epochs=10, batch_size=16, verbose=0).history["loss"]
    assert history[-1] < 0.8 * history[0]
    value, accuracy = model.evaluate(x, y, verbose=0)
    logits = model.predict(x, batch_size=64, verbose=0)
    assert value == pytest.approx(float(loss()(y, logits)), rel=1e-5)
    assert accuracy == pytest.approx(np.mean(np.argmax(logits, -1) == y)) and accuracy > 0.5
    after = extract(model)
    still = {"input", "const"}
    for name, q in before.activations.items():
        moved = float(after.activations[name].scale) != float(q.scale)
        assert moved == (after.graph[name].op not in still), name
    for name, q in before.weights.items():
        assert not np.array_equal(after.weights[name].scale, q.scale)
        key = weight_of(after.graph[name]).name
        assert not np.array_equal(after.graph[name].weights[key], before.graph[name].weights[key])


@pytest.mark.slow
def test_a_model_loaded_in_the_middle_of_training_goes_on_bit_for_bit(tmp_path):
    """With tied variables and the moments of the optimizer; the original is what training without a break gives."""
    model, (x, y) = compiled(prepared(user_model(), "w4a8", "lsq+")), data()
    model.fit(x, y, epochs=2, batch_size=16, shuffle=False, verbose=0)
    model.save(tmp_path / "half.keras")
    loaded = keras.saving.load_model(tmp_path / "half.keras")
    assert_same_state(loaded, model)
    assert len(loaded.trainable_variables) == len(model.trainable_variables)
    assert int(loaded.optimizer.iterations) == 4
    for m in (model, loaded):
        m.fit(x, y, epochs=2, batch_size=16, shuffle=False, verbose=0)
    assert_same_state(loaded, model)
    assert kquant.export_tflite(loaded).content == kquant.export_tflite(model).content


@pytest.mark.slow
def test_training_is_resumed_after_an_interruption(tmp_path):
    x, y = data()

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise KeyboardInterrupt

    def fit(epochs: int, *callbacks: keras.callbacks.Callback) -> QuantizedModel:
        model = compiled(prepared(user_model(), gradient="min_max"))
        model.fit(x, y, epochs=epochs, batch_size=16, shuffle=False, verbose=0, callbacks=list(callbacks))
        return model

    def backup() -> keras.callbacks.Callback:
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    with pytest.raises(KeyboardInterrupt):
        fit(4, backup(), Interrupt())
    resumed = fit(4, backup())
    assert int(resumed.optimizer.iterations) == 8
    assert_same_state(resumed, fit(4))


# --- how a step is run ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["lsq", "min_max"])
def test_xla_trains_the_same(gradient):
    x, y = data()
    states = []
    for jit in (False, True):
        model = compiled(prepared(gradient=gradient), keras.optimizers.SGD(1e-3, momentum=0.9), jit_compile=jit)
        model.fit(x, y, epochs=2, batch_size=16, shuffle=False, verbose=0)
        states.append(state(model))
    for a, b in zip(*states, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_loop_of_ones_own_trains_as_fit_does():
    x, y = data(16)
    ours, theirs = (prepared(gradient="min_max") for _ in range(2))
    compiled(theirs, keras.optimizers.SGD(0.05))
    losses = steps(ours, keras.optimizers.SGD(0.05), 3, x, y)
    history = theirs.fit(x, y, epochs=3, batch_size=16, verbose=0).history["loss"]
    np.testing.assert_allclose(losses, history, rtol=1e-5)
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    x, y = data(16)
    whole, parts = (prepared(gradient="min_max") for _ in range(2))
    compiled(whole, keras.optimizers.SGD(0.1), run_eagerly=True)
    compiled(parts, keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), run_eagerly=True)
    before = whole.get_weights()
    whole.fit(x, y, batch_size=16, verbose=0, shuffle=False)
    parts.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    for a, b in zip(whole.get_weights(), parts.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert any(not np.array_equal(a, b) for a, b in zip(before, whole.get_weights(), strict=True))


def test_frozen_layers_and_frozen_quantizers_stay():
    model, (x, y) = prepared(gradient="lsq+"), data(16)
    table = layer_table(model)
    table["conv"].trainable = False
    table["head"].output_quantizer.trainable = False
    compiled(model, keras.optimizers.Adam(0.1), run_eagerly=True)
    frozen = [*table["conv"].variables, *table["head"].output_quantizer.variables]
    assert not {id(v) for v in frozen} & {id(v) for v in model.trainable_variables}
    before, all_before = [v.numpy() for v in frozen], [v.numpy() for v in model.trainable_variables]
    model.fit(x, y, epochs=2, verbose=0)
    for v, value in zip(frozen, before, strict=True):
        np.testing.assert_array_equal(v, value)
    for v, value in zip(model.trainable_variables, all_before, strict=True):
        if v.path.split("/")[-1] in ("kernel", "bias"):
            assert not np.array_equal(v, value)


# --- mixed precision --------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy("float32")


def test_mixed_precision_trains_operations_in_bfloat16_and_nothing_else(mixed_precision, tmp_path, monkeypatch):
    keras.config.set_dtype_policy("float32")
    user = small_model()
    in_float32 = prepared(user)
    keras.config.set_dtype_policy("mixed_bfloat16")
    mixed, (x, y) = prepared(user), data(16)
    assert {v.dtype for v in mixed.variables} == {"float32"}
    np.testing.assert_array_equal(mixed(x), in_float32(x))  # inference is that of the target, in float32
    seen = set()
    real = simulation.compute
    monkeypatch.setattr(simulation, "compute", lambda n, i, w=None: seen.add((n.op, i[0].dtype)) or real(n, i, w))
    for model in (mixed, reloaded(mixed, tmp_path)):
        seen.clear()
        y_mixed, y_float = model(x, training=True), in_float32(x, training=True)
        assert y_mixed.dtype == tf.float32
        assert {op for op, dtype in seen if dtype == tf.bfloat16} == {"conv2d", "dense"}
        # 8 bits of mantissa: at most a few steps of the grid, and not all are zero
        scale = extract(mixed).activations["head"].scale
        assert 0 < np.abs(y_mixed - y_float).max() <= 6 * scale
    monkeypatch.undo()
    losses = [steps(m, keras.optimizers.SGD(0.05), 5, x, y) for m in (mixed, in_float32)]
    np.testing.assert_allclose(*losses, rtol=0.05)
    assert {v.dtype for v in mixed.variables} == {"float32"}
    assert kquant.verify_tflite(mixed, kquant.export_tflite(mixed).content, x).ok


def reloaded(model: keras.Model, tmp_path: Any) -> keras.Model:
    model.save(tmp_path / "m.keras")
    keras.config.set_dtype_policy("float32")  # what is in the file does not depend on the policy of the day
    return keras.saving.load_model(tmp_path / "m.keras")


# --- learning is real -------------------------------------------------------------------------------------------------


def with_16_bits(model: QuantizedModel, training: Training) -> QuantizedModel:
    """A model prepared with 16-bit weights, which no target has: its grids put in by hand."""
    config = QuantConfig.load("w8a16")
    qgraph = extract(model)
    grids = {}
    for name, q in qgraph.weights.items():
        view = weight_view(qgraph.graph[name])
        most = np.abs(view).max(tuple(k for k in range(view.ndim) if k != q.axis))
        grids[name] = grid_from_range(-most, most, QuantSpec(bits=16, symmetric=True, narrow_range=True), q.axis)
    qgraph = QuantizedGraph(qgraph.graph, qgraph.activations, grids)
    return insert(qgraph, asked(config.target), learning_of(qgraph, config, training))


def without_grids(model: QuantizedModel, training: Training) -> QuantizedModel:
    """The same network and the same variables of weights, in float."""
    graph, none = extract(model).graph, dict.fromkeys(extract(model).graph.nodes)
    learning = Learning(relative_weights=training.relative_weights)
    return insert(QuantizedGraph(graph, none, none), asked(model.target.name), learning)


@pytest.mark.parametrize("relative", [False, True], ids=["weights as they are", "weights in units"])
def test_with_all_bits_at_16_it_trains_like_the_float_model(relative):
    """As the user's model with weights as they are; in units, as it does in these units."""
    user, (x, y) = small_model(), data(64)
    y = np.where(np.arange(64) % 4, y, 0)  # some are wrong, so that the loss has some way to go
    steps(user, keras.optimizers.Adam(0.01), 30, x, y)
    quantized, training = kquant.quantize_model(user, x, "w8a16", progress=False), Training(relative_weights=relative)
    model = with_16_bits(quantized, training)
    assert {q.width for q in (*weights(model).values(), *outputs(model).values())} == {16}
    reference = without_grids(quantized, training) if relative else user
    optimizers = [keras.optimizers.Adam(5e-4) for _ in range(2)]
    expected, found = (steps(m, o, 40, x, y) for m, o in zip((reference, model), optimizers, strict=True))
    assert expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=0.01)


def two_layers(x: np.ndarray, config: Any, scale: float) -> tuple[QuantizedModel, Any]:
    """x -> relu(1 x), on a grid of 4 bits that learns by LSQ from three times the scale -> 1 x, all else given."""
    inputs = keras.Input((1,), name="x")
    hidden = layers.Dense(1, activation="relu", name="hidden")
    model = keras.Model(inputs, layers.Dense(1, name="last")(hidden(inputs)))
    for layer in (hidden, model.get_layer("last")):
        layer.set_weights([np.ones((1, 1), np.float32), np.zeros(1, np.float32)])
    rules = [{"name": "last", "activations": {"bits": 8, "range": [0, 16]}}]
    model = prepare_qat(model, x, {**config, "rules": rules}, training=Training(), progress=False)
    quantizer = outputs(model)["hidden"]
    quantizer.assign(replace(quantizer.to_grid(), scale=np.float32(3 * scale)))
    return model, quantizer


def learn(model: QuantizedModel, quantizer: Any, x: np.ndarray, y: np.ndarray, count: int = 300) -> float:
    """The scale that training ends with."""
    rate = keras.optimizers.schedules.CosineDecay(0.05, count)
    optimizer = keras.optimizers.Adam(rate)
    (variable,) = quantizer.trainable_variables

    @tf.function
    def step() -> None:
        with tf.GradientTape() as tape:
            value = tf.reduce_mean((model(x, training=True) - y) ** 2)
        optimizer.apply([tape.gradient(value, variable.value)], [variable])

    optimizer.build([variable])
    for _ in range(count):
        step()
    return float(quantizer.to_grid().scale)


FOUR_BITS = {"preset": "w8a4", "logits": None, "adaround": False}


def test_lsq_finds_the_scale_whose_largest_value_is_the_target():
    """Inputs of 0 and beyond the grid, targets of 0 and 3: the only scale without error is 3 / 15."""
    x = np.float32([[0.0], [20.0]] * 8)
    y = np.minimum(x, 3.0)
    model, quantizer = two_layers(x, {**FOUR_BITS, "inputs": {"range": [0, 20]}}, 3 / 15)
    assert learn(model, quantizer, x, y) == pytest.approx(3 / 15, rel=0.01)


def test_lsq_finds_the_scale_for_uniform_values():
    """Of values uniform in 0..1 on a grid of n + 1 levels.

    The error n s^3 / 12 + (1 - n s)^3 / 3 is least at s = 1 / (n + 1/2). LSQ's estimate of the gradient, with
    round(x / s) - x / s within and n beyond the grid, is zero in expectation at s = 1 / (n + r), where
    r^2 = 1/4 + (2 n + 1) / (12 n): for n = 15 that is 1 % less.
    """
    x = np.linspace(0, 1, 4001, dtype=np.float32)[:, None]
    n = 15
    best = 1 / (n + 0.5)
    model, quantizer = two_layers(x, {**FOUR_BITS, "inputs": {"bits": 8, "range": [0, 1]}}, best)
    found = learn(model, quantizer, x, x)
    assert found == pytest.approx(1 / (n + np.sqrt(0.25 + (2 * n + 1) / (12 * n))), rel=0.01)
    assert found == pytest.approx(best, rel=0.02)


# --- what is trained is what is exported ------------------------------------------------------------------------------

EXPORTS = [
    ("w8a8", "lsq"),
    ("w4a8", "lsq+"),
    ("w4a4", "lsq+"),
    ("w4a4", "min_max"),
    ("w8a8-per_tensor", "min_max"),
    (TQT, "tqt"),
    ("w8a16", "lsq"),
]


def assert_exports(model: QuantizedModel, x: np.ndarray) -> None:
    """Parity, op by op and end to end, and a file that is all integers."""
    content = kquant.export_tflite(model, allow_float=False).content
    report = kquant.verify_tflite(model, content, x, tensor_samples=4)
    assert report.ok and report.reference_max_lsb == 0, f"{report}"
    assert report.op_by_op_max_lsb <= 1, f"{report}"
    assert all(end.agreement >= 0.995 for end in report.end_to_end), f"{report}"


@pytest.mark.slow
@pytest.mark.parametrize(("config", "gradient"), EXPORTS, ids=[f"{c if c != TQT else 'pow2'}-{g}" for c, g in EXPORTS])
def test_the_file_computes_what_was_trained(config, gradient):
    model, (x, y) = prepared(user_model(), config, gradient), data(256)
    grids = extract(model).activations
    losses = steps(model, keras.optimizers.Adam(0.05), 25, x, y)
    assert losses[-1] < losses[0]
    moved = extract(model).activations
    assert any(float(moved[n].scale) != float(q.scale) for n, q in grids.items())
    assert_exports(model, x[:32] if config == "w8a16" else x)  # LiteRT's int16 kernels are not vectorized


@pytest.mark.parametrize("config", ["w8a8", "w4a4"])
@pytest.mark.parametrize("to", [-1.0, 1.0])
def test_zero_points_at_the_edge_are_exported(config, to):
    model, (x, _) = prepared(gradient="lsq+", config=config), data(64)
    moved = {n: q for n, q in outputs(model).items() if "shift" in q.learned}
    assert moved
    for q in moved.values():
        q.learned["shift"].assign(2.0 * to)
        grid = q.to_grid()
        assert int(grid.zero_point) == (grid.qmin if to < 0 else grid.qmax)
    assert_exports(model, x)
