"""Models of TFMOT and what becomes of them, beside TFMOT's own simulation and the file that the converter makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import kquant
from kquant.graph.ops import weight_view
from kquant.grids.grid import Array, Grid, fake_quantize, quantize
from kquant.keras.model import extract
from kquant.keras.tfmot import from_tfmot
from kquant.keras.tfmot.saved_model import Range
from kquant.targets.litert.reader import Operator, read
from kquant.verify.end_to_end import same_decision

CLASSES = 5


@pytest.fixture(scope="module")
def tfmot() -> Any:
    return pytest.importorskip("tensorflow_model_optimization", reason="TFMOT is not installed: pip install .[tfmot]")


@pytest.fixture(scope="module")
def layers(tfmot: Any) -> Any:
    import tf_keras

    return tf_keras.layers


def sequential(L: Any) -> Any:
    """Convolutions with and without batch normalization, ReLU, ReLU6, pooling, dense."""
    import tf_keras

    stack = [
        L.Input((12, 12, 3)),
        L.Conv2D(8, 3, strides=2, padding="same", activation="relu", name="conv"),
        L.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="multiplied"),
        L.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise"),
        L.BatchNormalization(momentum=0.5, name="depthwise_bn"),
        L.ReLU(6.0, name="relu6"),
        L.Conv2D(12, 1, use_bias=False, name="pointwise"),
        L.BatchNormalization(momentum=0.5, name="pointwise_bn"),
        L.MaxPooling2D(name="pool"),
        L.Flatten(name="flatten"),
        L.Dense(16, activation="relu", name="hidden"),
        L.Dropout(0.2, name="dropout"),
        L.Dense(CLASSES, name="logits"),
    ]
    return tf_keras.Sequential(stack, name="sequential")


def residual(L: Any) -> Any:
    """A residual block, padding, pooling that changes the grid, and a concatenation of two grids."""
    import tf_keras

    image = L.Input((12, 12, 3), name="image")
    x = L.ZeroPadding2D(1, name="pad")(image)
    x = L.Conv2D(8, 3, strides=2, use_bias=False, name="stem")(x)
    x = L.BatchNormalization(momentum=0.5, name="stem_bn")(x)
    x = skip = L.ReLU(name="stem_relu")(x)
    x = L.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(x)
    x = L.BatchNormalization(momentum=0.5, name="depthwise_bn")(x)
    x = L.ReLU(6.0, name="relu6")(x)
    x = L.Conv2D(8, 1, use_bias=False, name="project")(x)
    x = L.BatchNormalization(momentum=0.5, name="project_bn")(x)
    x = L.Activation("relu", name="relu")(L.Add(name="add")([x, skip]))
    average = L.Conv2D(6, 3, padding="same", activation="relu", name="conv")(L.AveragePooling2D(name="average")(x))
    x = L.Concatenate(name="concat")([average, L.MaxPooling2D(name="largest")(x)])
    x = L.GlobalAveragePooling2D(name="mean")(x)
    return tf_keras.Model(image, L.Dense(CLASSES, name="logits")(x), name="residual")


def plain(L: Any) -> Any:
    """ReLU layers behind layers with a bias, whose kernels TFMOT leaves in float."""
    import tf_keras

    stack = [
        L.Input((6, 6, 3)),
        L.Conv2D(8, 3, name="conv"),
        L.ReLU(name="relu"),
        L.GlobalAveragePooling2D(name="mean"),
    ]
    stack += [L.Dense(8, name="hidden"), L.ReLU(6.0, name="relu6"), L.Dense(CLASSES, name="logits")]
    return tf_keras.Sequential(stack, name="plain")


def unusual(L: Any) -> Any:
    """One of most other layers that TFMOT takes, two outputs, a final softmax."""
    import tf_keras

    image = L.Input((8, 8, 3), name="image")
    x = L.SeparableConv2D(6, 3, activation="relu", name="separable")(image)
    x = L.Conv2DTranspose(4, 3, strides=2, padding="same", name="transposed")(x)
    x = L.LeakyReLU(0.1, name="leaky")(x)
    x = L.UpSampling2D(2, name="up")(x)
    x = L.Cropping2D(2, name="crop")(x)
    x = L.Permute((2, 1, 3), name="permute")(x)
    x = L.Conv2D(4, 3, activation="tanh", name="tanh")(x)
    pooled = L.GlobalMaxPooling2D(name="max")(x)
    x = L.Dense(8, activation="sigmoid", name="sigmoid")(L.Reshape((4,), name="reshape")(pooled))
    return tf_keras.Model(image, [L.Dense(CLASSES, activation="softmax", name="scores")(x), pooled], name="unusual")


def branches(L: Any) -> Any:
    """Two inputs on one grid, a tensor read by a concatenation and a layer, Dense with batch normalization."""
    import tf_keras

    images = [L.Input((6, 6, 3), name="a"), L.Input((6, 6, 2), name="b")]
    x = L.Concatenate(name="images")(images)
    one, two = (L.Conv2D(4, 3, padding="same", name=name)(x) for name in ("one", "two"))
    x = L.Flatten(name="flatten")(L.Concatenate(name="branches")([one, two, x]))
    x = L.BatchNormalization(momentum=0.5, name="dense_bn")(L.Dense(6, use_bias=False, name="dense")(x))
    x = L.Dense(CLASSES, name="logits")(L.ReLU(name="relu")(x))
    return tf_keras.Model(images, [x, L.Conv2D(4, 1, name="map")(two)], name="branches")


def inputs(model: Any, samples: int = 256, seed: int = 1) -> Any:
    """Noise around some random patterns; a list of arrays where the model has several inputs."""
    rng = np.random.default_rng(seed)
    found = []
    for tensor in model.inputs:
        patterns = np.random.default_rng(0).normal(size=(CLASSES, *tensor.shape[1:]))
        noise = rng.normal(size=(samples, *tensor.shape[1:]))
        found.append((patterns[rng.integers(0, CLASSES, samples)] + noise).astype(np.float32))
    return found[0] if len(found) == 1 else found


def trained(tfmot: Any, model: Any) -> Any:
    """`model` quantized by TFMOT, after some steps of training, with ranges as a long training leaves them."""
    import tf_keras

    for layer in model.layers:
        if type(layer).__name__ == "BatchNormalization":
            sign = np.where(np.arange(layer.gamma.shape[0]) % 3 == 0, -1, 1)
            layer.gamma.assign(sign * np.linspace(0.5, 2, len(sign)))
    quantized = tfmot.quantization.keras.quantize_model(model)
    optimizer = tf_keras.optimizers.SGD(0.01)
    x = inputs(model, 64)
    for _ in range(3):
        with tf.GradientTape() as tape:
            y = tf.nest.flatten(quantized(x, training=True))
            loss = tf.add_n([tf.reduce_mean((t[..., 0] - 1) ** 2) + tf.reduce_mean(t[..., 1:] ** 2) for t in y])
        variables = quantized.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    settle(quantized, x)
    return quantized


def settle(quantized: Any, x: Any) -> None:
    """Move the averaged ranges, which TFMOT starts at -6..6 and moves by 0.1 % a step, to those of `x`."""
    names = ("activation_min", "activation_max", "output_min", "output_max")
    ranges = [v for v in quantized.variables if v.name.split(":")[0].endswith(names)]
    before = [v.numpy() for v in ranges]
    quantized(x, training=True)
    for variable, old in zip(ranges, before, strict=True):
        variable.assign((variable.numpy() - 0.999 * old) / 0.001)


Pair = tuple[Any, kquant.QuantizedModel]


def both(tfmot: Any, layers: Any, make: Callable[[Any], Any]) -> Pair:
    """A model of TFMOT and the kquant model of it."""
    keras.utils.set_random_seed(0)
    quantized = trained(tfmot, make(layers))
    return quantized, from_tfmot(quantized)


@pytest.fixture(scope="module", params=[sequential, residual, plain], ids=lambda f: f.__name__)
def pair(request: pytest.FixtureRequest, tfmot: Any, layers: Any) -> Pair:
    return both(tfmot, layers, request.param)


@pytest.fixture(scope="module")
def small(tfmot: Any, layers: Any) -> Pair:
    return both(tfmot, layers, plain)


def steps(a: Array, b: Array, q: Grid) -> Array:
    """Distance in steps of the grid."""
    return np.abs(np.rint((a - b) / q.scale))


def output_grids(model: kquant.QuantizedModel) -> list[Grid]:
    qgraph = extract(model)
    return [q for name in qgraph.graph.outputs if (q := qgraph.activations[name]) is not None]


def test_simulation_is_that_of_tfmot(pair: Pair) -> None:
    quantized, model = pair
    x = inputs(quantized, 512, seed=2)
    ours, theirs = np.asarray(model(x)), np.asarray(quantized(x))
    away = steps(ours, theirs, output_grids(model)[0])
    # TFMOT averages without rounding to the grid of the input, and leaves the kernels of "plain" in float
    exact = quantized.name == "sequential"
    assert (away <= (1 if exact else 2)).mean() >= 0.99 and away.max() <= 3
    assert same_decision(ours, theirs) >= 0.99
    assert len(np.unique(theirs)) > 50  # the outputs use their grid


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_grid_is_nudged_as_fake_quant_does_it(narrow: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = -np.float32(rng.gamma(1.0)), np.float32(rng.gamma(1.0))
    q = Range(np.asarray(low), np.asarray(high), narrow).grid()
    real = q.scale * (np.arange(q.qmin, q.qmax + 1) - q.zero_point)
    x = np.float32([-1e3, 1e3, *(real + 0.4 * q.scale), *(real - 0.4 * q.scale)])
    theirs = tf.quantization.fake_quant_with_min_max_vars(x, low, high, narrow_range=narrow)
    np.testing.assert_allclose(fake_quantize(x, q), theirs, rtol=1e-5, atol=1e-5 * q.scale)


def test_integers_of_kernels_are_those_of_fake_quant(pair: Pair) -> None:
    quantized, model = pair
    qgraph = extract(model)
    batch_norms = {"depthwise": "depthwise_bn", "pointwise": "pointwise_bn", "stem": "stem_bn", "project": "project_bn"}
    for layer in quantized.layers:
        for weight, _, variables in getattr(layer, "_weight_vars", ()):
            name = layer.layer.name
            low, high = variables["min_var"], variables["max_var"]
            fake = tf.quantization.fake_quant_with_min_max_vars
            fake = tf.quantization.fake_quant_with_min_max_vars_per_channel if low.shape.rank else fake
            step = ((high - low) / 254).numpy()
            expected = weight_view(qgraph.graph[name], np.rint(fake(weight, low, high, narrow_range=True) / step))
            if name in batch_norms and f"quant_{batch_norms[name]}" in {other.name for other in quantized.layers}:
                expected = expected * np.sign(quantized.get_layer(f"quant_{batch_norms[name]}").layer.gamma)
            ours = quantize(weight_view(qgraph.graph[name]), qgraph.weights[name])
            np.testing.assert_array_equal(ours, expected, err_msg=name)


def test_kernels_keep_their_float_values(pair: Pair) -> None:
    quantized, model = pair
    kernel = quantized.get_layer("quant_conv").get_weights()[0]
    ours = extract(model).graph["conv"].weights["kernel"]
    assert (kernel == ours).mean() > 0.99  # all but those whose rounding differs


@pytest.mark.parametrize("make", [unusual, branches])
def test_unusual_models(tfmot: Any, layers: Any, make: Callable[[Any], Any]) -> None:
    quantized, model = both(tfmot, layers, make)
    assert not model.quantization.skipped
    x = inputs(quantized, 256, seed=2)
    # TFMOT does not quantize the outputs of softmax and tanh, whose grids the target dictates
    for a, b, q in zip(model(x), quantized(x), output_grids(model), strict=True):
        assert (steps(np.asarray(a), np.asarray(b), q) <= 2).mean() >= 0.99


def test_layers_that_are_not_annotated_stay_float(tfmot: Any, layers: Any) -> None:
    import tf_keras

    annotate = tfmot.quantization.keras.quantize_annotate_layer
    stack = [
        layers.Input((8, 8, 3)),
        layers.Conv2D(4, 3, activation="relu", name="first"),
        annotate(layers.Conv2D(4, 3, activation="relu", name="second")),
        layers.Flatten(name="flatten"),
        layers.Dense(CLASSES, name="logits"),
    ]
    quantized = tfmot.quantization.keras.quantize_apply(tf_keras.Sequential(stack))
    x = inputs(quantized, 64)
    settle(quantized, x)
    model = from_tfmot(quantized)
    assert {s.layer for s in model.quantization.skipped} >= {"first", "logits"}
    assert "second" not in {s.layer for s in model.quantization.skipped}
    ours, theirs = np.asarray(model(x)), np.asarray(quantized(x))
    np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["model.h5", "folder"])
def test_saved_models_are_read(small: Pair, name: str, tmp_path: Path) -> None:
    quantized, model = small
    quantized.save(tmp_path / name)
    x = inputs(quantized, 16)
    np.testing.assert_array_equal(from_tfmot(tmp_path / name)(x), model(x))


def test_files_that_cannot_be_read_are_refused(small: Pair, tmp_path: Path) -> None:
    small[0].save(tmp_path / "model.keras")
    for name in ("model.keras", "absent.h5"):
        with pytest.raises(kquant.ModelError, match="Cannot read"):
            from_tfmot(tmp_path / name)


@pytest.mark.slow
def test_training_goes_on(small: Pair) -> None:
    quantized, model = small
    x = inputs(quantized, 64)
    y = np.argmax(model(x), axis=1)
    trainable = kquant.prepare_qat(model)
    np.testing.assert_array_equal(trainable(x), model(x))
    trainable.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = [trainable.train_on_batch(x, y) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]
    assert kquant.export_tflite(trainable, allow_float=False).bytes > 0


def test_the_result_is_saved_and_loaded(small: Pair, tmp_path: Path) -> None:
    quantized, model = small
    model.save(tmp_path / "model.keras")
    x = inputs(quantized, 16)
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(x), model(x))


def converted(quantized: Any) -> bytes:
    converter = tf.lite.TFLiteConverter.from_keras_model(quantized)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    return bytes(converter.convert())


def kernels(content: bytes) -> Iterator[Operator]:
    """The operators with weights, in order."""
    found = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
    return (o for o in read(content).operators if o.code in found)


@pytest.mark.slow
def test_file_is_that_of_the_converter(pair: Pair) -> None:
    quantized, model = pair
    theirs, ours = converted(quantized), kquant.export_tflite(model, allow_float=False).content
    ties, count = 0, 0
    for a, b in zip(kernels(ours), kernels(theirs), strict=True):
        for k, what in ((1, "weights"), (2, "bias")):
            u, v = (np.asarray(o.given(k).data, np.int64).reshape(-1) for o in (a, b))
            assert np.abs(u - v).max() <= 1, f"{what} of {a}"
            ties, count = ties + int((u != v).sum()), count + u.size
        for k in (1, 2):
            np.testing.assert_allclose(*(np.broadcast_arrays(*(o.given(k).scale for o in (a, b)))), rtol=3e-7)
    assert ties <= 0.001 * count
    x = inputs(quantized, 1000, seed=3)
    u, v = (kquant.TFLiteModel(content).predict(x)[0] for content in (ours, theirs))
    away = steps(u, v, output_grids(model)[0])
    assert (away <= 1).mean() >= 0.99 and away.max() <= 2
    assert same_decision(u, v) >= 0.995
    trained_for = np.asarray(quantized(x))
    assert np.abs(u - trained_for).mean() <= 1.05 * np.abs(v - trained_for).mean()


Change = Callable[[Any, Any], Any]


def _float_model(tfmot: Any, layers: Any) -> Any:
    return sequential(layers)


def _annotated(tfmot: Any, layers: Any) -> Any:
    return tfmot.quantization.keras.quantize_annotate_model(sequential(layers))


def _quantized(tfmot: Any, layers: Any, *extra: Any) -> Any:
    import tf_keras

    stack = [layers.Input((4, 4, 3)), layers.Conv2D(4, 3, name="conv"), *extra]
    quantized = tfmot.quantization.keras.quantize_model(tf_keras.Sequential(stack))
    quantized.layers[0].quantizer_vars["max_var"].assign(1.0)
    return quantized


def _no_data(tfmot: Any, layers: Any) -> Any:
    quantized = _quantized(tfmot, layers)
    quantized.layers[0].quantizer_vars["max_var"].assign(0.0)
    return quantized


def _four_bits(tfmot: Any, layers: Any) -> Any:
    quantized = _quantized(tfmot, layers)
    quantized.layers[1]._weight_vars[0][1].num_bits = 4
    return quantized


def _not_symmetric(tfmot: Any, layers: Any) -> Any:
    quantized = _quantized(tfmot, layers)
    quantized.layers[1]._weight_vars[0][2]["max_var"].assign([1.0, 1.0, 1.0, 1.0])
    return quantized


def _lambda(tfmot: Any, layers: Any) -> Any:
    import tf_keras

    quantized = _quantized(tfmot, layers)
    return tf_keras.Model(quantized.input, layers.Lambda(abs, name="mine")(quantized.output))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_float_model, "no layer of it is quantized"),
        (_annotated, "quantize_apply"),
        (_no_data, "'quantize_layer.*range is empty"),
        (_four_bits, "'quant_conv'.*num_bits=4"),
        (_not_symmetric, "'quant_conv'.*not symmetric"),
        (_lambda, r"'mine' \(Lambda\)"),
    ],
)
def test_what_cannot_be_translated_is_refused(tfmot: Any, layers: Any, make: Change, message: str) -> None:
    with pytest.raises(kquant.ModelError, match=message):
        from_tfmot(make(tfmot, layers))


def test_a_keras_3_model_is_refused() -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(kquant.ModelError, match="use kquant.quantize_model"):
        from_tfmot(model)


def test_a_path_needs_tfmot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_model_optimization", None)
    with pytest.raises(kquant.MissingPackageError, match=r"pip install 'kquant\[tfmot\]'"):
        from_tfmot("model.h5")
