"""A zoo of small Keras models, one per kind of model that users have, with inputs for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

Tensor = Any
Data = list[np.ndarray]
MODELS: dict[str, Callable[[], keras.Model]] = {}
SAMPLES = 24


def entry(build: Callable[[], keras.Model]) -> Callable[[], keras.Model]:
    """Put a builder on the list."""
    MODELS[build.__name__] = build
    return build


def conv_block(x: Tensor, filters: int, strides: int = 1) -> Tensor:
    """Convolution, batch normalization, ReLU."""
    x = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
    return layers.ReLU()(layers.BatchNormalization()(x))


def classifier(x: Tensor, classes: int = 5) -> Tensor:
    """Global average and a dense layer with softmax."""
    return layers.Dense(classes, activation="softmax")(layers.GlobalAveragePooling2D()(x))


@entry
def sequential() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((10, 10, 3)),
            layers.Rescaling(1 / 127.5, offset=-1),
            layers.Conv2D(6, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Dropout(0.3),
            layers.GaussianNoise(0.1),
            layers.Flatten(),
            layers.Dense(8, activation="tanh"),
            layers.Dense(4, activation="softmax"),
        ]
    )


@entry
def shared_submodel() -> keras.Model:
    inner = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()])
    trunk_in = keras.Input((8, 8, 3))
    trunk = keras.Model(trunk_in, layers.GlobalAveragePooling2D()(inner(trunk_in)), name="trunk")
    a, b = keras.Input((8, 8, 3), name="left"), keras.Input((8, 8, 3), name="right")
    distance = ops.absolute(trunk(a) - trunk(b))
    return keras.Model([a, b], layers.Dense(1, activation="sigmoid")(distance))


@entry
def shared_layer() -> keras.Model:
    x = inputs = keras.Input((8, 8, 4))
    conv = layers.Conv2D(4, 3, padding="same", activation="relu")
    return keras.Model(inputs, classifier(conv(conv(x)) + conv(x)))


@entry
def dict_inputs_and_outputs() -> keras.Model:
    image, meta = keras.Input((8, 8, 3), name="image"), keras.Input((5,), name="meta")
    x = layers.GlobalAveragePooling2D()(conv_block(image, 6))
    x = layers.Concatenate()([x, layers.Dense(4, activation="relu")(meta)])
    outputs = {"score": layers.Dense(1, activation="sigmoid")(x), "kind": layers.Dense(3)(x)}
    return keras.Model({"image": image, "meta": meta}, outputs)


class Subclassed(keras.Model):
    """A subclassed model whose call is a graph."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.convs = [layers.Conv2D(4, 3, padding="same", activation="relu") for _ in range(2)]
        self.pool, self.head = layers.GlobalAveragePooling2D(), layers.Dense(3)

    def call(self, x: Tensor, training: bool = False) -> Tensor:
        y = self.convs[0](x)
        return self.head(self.pool(y + self.convs[1](y)))


@entry
def subclassed() -> keras.Model:
    model = Subclassed()
    model(np.zeros((1, 8, 8, 3), np.float32))
    return model


@keras.saving.register_keras_serializable("zoo")
class SqueezeExcite(layers.Layer):
    """A composite layer with layers of its own."""

    def build(self, shape: Any) -> None:
        self.squeeze = layers.Dense(max(1, shape[-1] // 2), activation="relu")
        self.excite = layers.Dense(shape[-1], activation="sigmoid")
        self.squeeze.build((None, shape[-1]))
        self.excite.build((None, max(1, shape[-1] // 2)))

    def call(self, x: Tensor) -> Tensor:
        gate = self.excite(self.squeeze(ops.mean(x, axis=(1, 2))))
        return x * ops.expand_dims(ops.expand_dims(gate, 1), 1)


@entry
def composite_layer() -> keras.Model:
    x = inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, classifier(SqueezeExcite(name="se")(conv_block(x, 6))))


@entry
def text_cnn() -> keras.Model:
    ids = keras.Input((12,), dtype="int32", name="ids")
    x = layers.Conv1D(6, 3, activation="relu")(layers.Embedding(20, 8)(ids))
    x = layers.Dense(6, activation="relu")(layers.GlobalMaxPooling1D()(x))
    return keras.Model(ids, layers.Dense(2, activation="softmax")(x))


@entry
def text_average() -> keras.Model:
    ids = keras.Input((12,), dtype="int32", name="ids")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(20, 8, mask_zero=True)(ids))
    return keras.Model(ids, layers.Dense(3)(x))


def _recurrent(kind: type) -> keras.Model:
    x = inputs = keras.Input((5, 4))
    x = layers.Conv1D(6, 3, padding="causal", activation="relu")(x)
    return keras.Model(inputs, layers.Dense(3)(kind(5)(x)))


@entry
def lstm() -> keras.Model:
    return _recurrent(layers.LSTM)


@entry
def gru() -> keras.Model:
    return _recurrent(layers.GRU)


@entry
def bidirectional() -> keras.Model:
    x = inputs = keras.Input((4, 4))
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(layers.Dense(4)(x))
    return keras.Model(inputs, layers.TimeDistributed(layers.Dense(3))(x))


@entry
def transformer() -> keras.Model:
    ids = keras.Input((8,), dtype="int32")
    x = layers.Embedding(16, 8)(ids) + layers.Embedding(8, 8)(ops.arange(8))
    y = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(2, 4)(y, y)
    y = layers.Dense(16, activation="gelu")(layers.LayerNormalization()(x))
    x = x + layers.Dense(8)(y)
    return keras.Model(ids, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


@entry
def vision_transformer() -> keras.Model:
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Reshape((16, 8))(layers.Conv2D(8, 2, 2)(x))
    x = layers.LayerNormalization()(x)
    q, k, v = (layers.Dense(8)(x) for _ in range(3))
    scores = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 2, 1))) * 0.35)
    x = x + ops.matmul(scores, v)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


@entry
def unet() -> keras.Model:
    inputs = keras.Input((8, 8, 2))
    a = conv_block(inputs, 4)
    b = conv_block(layers.MaxPooling2D()(a), 9)
    x = layers.Conv2DTranspose(9, 3, 2, padding="same", activation="relu")(b)
    x = conv_block(layers.Concatenate()([a, x]), 4)
    return keras.Model(inputs, layers.Conv2D(1, 1, activation="sigmoid")(x))


@entry
def detector() -> keras.Model:
    x = inputs = keras.Input((16, 16, 3))
    boxes, scores = [], []
    for filters in (6, 8):
        x = conv_block(x, filters, 2)
        boxes.append(layers.Reshape((-1, 4))(layers.Conv2D(8, 3, padding="same")(x)))
        scores.append(layers.Reshape((-1, 3))(layers.Conv2D(6, 3, padding="same")(x)))
    boxes, scores = layers.Concatenate(axis=1)(boxes), layers.Concatenate(axis=1)(scores)
    return keras.Model(inputs, [boxes, layers.Softmax()(scores)])


@entry
def operations() -> keras.Model:
    x = inputs = keras.Input((8, 8, 4))
    x = ops.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
    a, b = ops.split(layers.Conv2D(6, 3)(x), 2, axis=-1)
    x = ops.stack([a, ops.relu(b)], axis=1)
    x = ops.einsum("bkhwc,cd->bhwkd", x, ops.convert_to_tensor(np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5)))
    x = ops.reshape(x, (-1, 8, 8, 10))[:, 1:-1, ::2, :]
    x = ops.maximum(ops.swapaxes(x, 1, 2), ops.flip(ops.swapaxes(x, 1, 2), axis=1))
    x = ops.concatenate([ops.squeeze(ops.mean(x, axis=1, keepdims=True), 1), ops.max(x, axis=1)], axis=-1)
    return keras.Model(inputs, ops.sum(ops.clip(x, -1.0, 2.0) * 0.5 - 0.1, axis=1))


@entry
def autoencoder() -> keras.Model:
    x = inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, 2, padding="same", activation="relu")(x)
    x = layers.Dense(6, name="code")(layers.Flatten()(x))
    x = layers.Reshape((4, 4, 4))(layers.Dense(64, activation="relu")(x))
    x = layers.UpSampling2D(interpolation="bilinear")(x)
    return keras.Model(inputs, layers.Conv2D(2, 3, padding="same")(x))


@entry
def regression() -> keras.Model:
    layers_ = [keras.Input((7,)), layers.Normalization(mean=[0.1] * 7, variance=[2.0] * 7)]
    return keras.Sequential([*layers_, layers.Dense(16, activation="relu"), layers.Dense(9, "elu"), layers.Dense(1)])


@entry
def input_returned() -> keras.Model:
    x = inputs = keras.Input((6, 6, 3))
    return keras.Model(inputs, [inputs, layers.Conv2D(2, 1)(x)])


@entry
def input_reshaped_and_returned() -> keras.Model:
    inputs = keras.Input((6, 6, 3))
    return keras.Model(inputs, [layers.Reshape((36, 3))(inputs), layers.Flatten()(layers.Conv2D(2, 1)(inputs))])


@entry
def output_read_inside() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    features = layers.Conv2D(4, 3, activation="relu", name="features")(inputs)
    x = layers.Concatenate()([features, layers.Conv2D(3, 1)(features)])
    return keras.Model(inputs, [features, x, layers.GlobalAveragePooling2D()(x)])


@entry
def same_output_twice() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    y = layers.Dense(3)(layers.GlobalAveragePooling2D()(conv_block(inputs, 4)))
    return keras.Model(inputs, [y, y])


@entry
def linear_and_activated_output() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    y = layers.BatchNormalization()(layers.Conv2D(4, 3)(inputs))
    logits = layers.Dense(3, name="logits")(layers.Flatten()(layers.ReLU()(y)))
    return keras.Model(inputs, [y, logits, layers.Softmax()(logits)])


@entry
def fixed_batch() -> keras.Model:
    x = inputs = keras.Input(batch_shape=(4, 8, 8, 3))
    return keras.Model(inputs, classifier(conv_block(x, 4)))


@entry
def mixed_precision() -> keras.Model:
    before = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16")
    try:
        x = inputs = keras.Input((8, 8, 3))
        x = layers.GlobalAveragePooling2D()(conv_block(x, 4))
        return keras.Model(inputs, layers.Activation("softmax", dtype="float32")(layers.Dense(3)(x)))
    finally:
        keras.mixed_precision.set_dtype_policy(before)


@entry
def preactivation() -> keras.Model:
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same")(x)
    y = layers.ReLU()(layers.BatchNormalization()(x))
    y = layers.Conv2D(6, 3, padding="same")(y)
    x = x + layers.Conv2D(6, 3, padding="same")(layers.ReLU()(layers.BatchNormalization()(y)))
    return keras.Model(inputs, classifier(layers.ReLU()(layers.BatchNormalization()(x))))


@entry
def affine_after_add() -> keras.Model:
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Add()([layers.Conv2D(4, 1)(x), layers.Conv2D(4, 3, padding="same")(x)])
    return keras.Model(inputs, classifier(layers.ReLU(6.0)(layers.BatchNormalization()(x))))


@entry
def activations() -> keras.Model:
    x = inputs = keras.Input((6, 6, 3))
    kinds = [layers.LeakyReLU(0.2), layers.ELU(), layers.Activation("gelu"), layers.Activation("hard_swish")]
    kinds += [layers.PReLU(shared_axes=[1, 2]), layers.Activation("swish"), layers.ReLU(negative_slope=0.1)]
    kinds += [layers.ReLU(threshold=0.2), layers.Activation("softplus"), layers.Activation("selu")]
    kinds += [layers.Activation("relu6"), layers.Activation("softsign"), layers.Activation("exponential")]
    kinds += [layers.Activation("mish"), layers.Activation("hard_tanh"), layers.Activation("log_softmax")]
    return keras.Model(inputs, layers.Concatenate()([kind(layers.Conv2D(2, 1)(x)) for kind in kinds]))


@entry
def upsampling() -> keras.Model:
    x = inputs = keras.Input((5, 4, 3))
    a = layers.UpSampling2D(2)(layers.Conv2D(3, 1)(x))
    b = layers.UpSampling2D((2, 2), interpolation="bilinear")(layers.Conv2D(3, 1)(x))
    c = layers.Resizing(10, 8)(x)
    return keras.Model(inputs, layers.Conv2D(2, 1)(layers.Concatenate()([a, b, c])))


@entry
def separable_1d() -> keras.Model:
    x = inputs = keras.Input((16, 3))
    x = layers.SeparableConv1D(6, 3, padding="same", activation="relu")(x)
    x = layers.BatchNormalization()(layers.AveragePooling1D(2)(x))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalMaxPooling1D()(layers.Conv1DTranspose(4, 3)(x))))


@entry
def fire_and_pool() -> keras.Model:
    x = inputs = keras.Input((12, 12, 3))
    x = layers.ZeroPadding2D(((0, 1), (0, 1)))(x)
    x = layers.Conv2D(6, 3, 2, activation="relu")(x)
    a, b = layers.Conv2D(4, 1, activation="relu")(x), layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    pooled = layers.AveragePooling2D(3, 1, padding="same")(x)
    x = layers.Concatenate()([a, b, layers.MaxPooling2D(3, 1, padding="same")(x), pooled])
    return keras.Model(inputs, layers.Dense(4)(layers.Flatten()(layers.AveragePooling2D(2)(x))))


@entry
def volume() -> keras.Model:
    x = inputs = keras.Input((6, 6, 6, 2))
    x = layers.MaxPooling3D(2)(layers.Conv3D(4, 3, padding="same", activation="relu")(x))
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


@entry
def normalizations() -> keras.Model:
    x = inputs = keras.Input((6, 6, 4))
    x = layers.GroupNormalization(2)(layers.Conv2D(4, 3, padding="same")(x))
    x = layers.UnitNormalization()(layers.Conv2D(4, 1)(x))
    return keras.Model(inputs, classifier(layers.BatchNormalization(axis=-1, center=False, scale=False)(x)))


def build(name: str, seed: int = 0) -> keras.Model:
    """The model of a name, with random weights and batch-norm statistics."""
    keras.utils.set_random_seed(seed)
    model = MODELS[name]() if name in MODELS else APPLICATIONS[name]()
    randomize(model, seed)
    return model


def randomize(model: keras.Model, seed: int = 0) -> None:
    """Give batch normalizations statistics, and biases values, as training would."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        name = weight.path.split("/")[-1]
        low_high = {"gamma": (0.6, 1.4), "moving_variance": (0.5, 1.5), "alpha": (-0.1, 0.4)}.get(name)
        if name in ("beta", "moving_mean", "bias"):
            low_high = (-0.3, 0.3)
        if low_high is not None:
            weight.assign(rng.uniform(*low_high, weight.shape))


def inputs(model: keras.Model, seed: int = 1, samples: int = SAMPLES) -> Any:
    """Inputs of the model: a dict where it takes a dict, else an array or a list of arrays."""
    rng = np.random.default_rng(seed)
    if not isinstance(model, Subclassed):
        tensors = model.inputs
    else:
        tensors = [keras.KerasTensor((None, 8, 8, 3))]

    def draw(t: Any) -> np.ndarray:
        if "int" in str(t.dtype):
            return rng.integers(0, 8, (samples, *t.shape[1:])).astype(np.int32)
        return rng.normal(size=(samples, *t.shape[1:])).astype(np.float32)

    arrays = [draw(t) for t in tensors]
    if isinstance(getattr(model, "_inputs_struct", None), dict):
        return {t.name: a for t, a in zip(tensors, arrays, strict=True)}
    return arrays if len(arrays) > 1 else arrays[0]


def _application(name: str, size: int, **kwargs: Any) -> Callable[[], keras.Model]:
    return lambda: getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10, **kwargs)


APPLICATIONS: dict[str, Callable[[], keras.Model]] = {
    "MobileNetV3Small": _application("MobileNetV3Small", 32),
    "EfficientNetB0": _application("EfficientNetB0", 32),
    "EfficientNetV2B0": _application("EfficientNetV2B0", 32),
    "DenseNet121": _application("DenseNet121", 32),
    "ConvNeXtTiny": _application("ConvNeXtTiny", 32),
}
