"""Seeded random Keras models drawn from everything that kquant supports."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers, ops

from tests.support.drawer import Drawer, Step, Tensor
from tests.support.random_sequences import VOCABULARY, embedded, recurrent, sequence_step, vectors


def _conv(d: Drawer, x: Tensor) -> Tensor:
    strides, dilation = d.pick((1, 1), (1, 2), (2, 1))
    kernel = d.pick(1, 2, 3, (1, 3), (3, 2))
    if dilation * (np.max(kernel) - 1) + 1 > min(x.shape[1:3]):
        kernel, dilation = 1, 1
    groups = d.pick(*[g for g in (1, 1, 2, 3) if x.shape[-1] % g == 0])
    y = layers.Conv2D(
        groups * d.size(1, 4),
        kernel,
        strides,
        d.pick("same", "valid"),
        dilation_rate=dilation,
        groups=groups,
        use_bias=d.chance(0.6),
        activation=d.pick(None, None, d.activation()),
    )(x)
    return _norm_and_activation(d, y) if d.chance(0.5) else y


def _norm_and_activation(d: Drawer, x: Tensor) -> Tensor:
    x = layers.BatchNormalization()(x)
    return d.pick(layers.ReLU(), layers.ReLU(6.0), layers.LeakyReLU(0.1), layers.Activation("linear"))(x)


def _depthwise(d: Drawer, x: Tensor) -> Tensor:
    kernel = min(d.pick(1, 2, 3), *x.shape[1:3])
    y = layers.DepthwiseConv2D(
        kernel, d.pick(1, 2), d.pick("same", "valid"), depth_multiplier=d.pick(1, 1, 2), use_bias=d.chance(0.5)
    )(x)
    return _norm_and_activation(d, y) if d.chance(0.6) else y


def _separable(d: Drawer, x: Tensor) -> Tensor:
    return layers.SeparableConv2D(d.size(1, 6), min(3, *x.shape[1:3]), padding="same", activation=d.pick(None, "relu"))(
        x
    )


def _transposed(d: Drawer, x: Tensor) -> Tensor:
    if max(x.shape[1:3]) > 12:
        return x
    return layers.Conv2DTranspose(d.size(1, 4), d.pick(2, 3), d.pick(1, 2), d.pick("same", "valid"))(x)


def _pool(d: Drawer, x: Tensor) -> Tensor:
    if min(x.shape[1:3]) < 3:
        return x
    kind = d.pick(layers.MaxPooling2D, layers.AveragePooling2D)
    return kind(d.pick(2, 3, (2, 1)), d.pick(1, 2), d.pick("same", "valid"))(x)


def _pad(d: Drawer, x: Tensor) -> Tensor:
    if max(x.shape[1:3]) > 14:
        return x
    if d.chance(0.3):
        return ops.pad(x, [[0, 0], [0, 1], [1, 0], [0, d.pick(0, 1)]])
    return layers.ZeroPadding2D(d.pick(1, ((0, 1), (1, 0))))(x)


def _crop(d: Drawer, x: Tensor) -> Tensor:
    if min(x.shape[1:3]) < 4:
        return x
    return d.pick(lambda t: t[:, ::2, 1:], lambda t: layers.Cropping2D(1)(t), lambda t: t[:, 1:, :-1, :])(x)


def _resize(d: Drawer, x: Tensor) -> Tensor:
    if max(x.shape[1:3]) > 9:
        return x
    return layers.UpSampling2D(2, interpolation=d.pick("nearest", "bilinear"))(x)


def _residual(d: Drawer, x: Tensor) -> Tensor:
    y = layers.Conv2D(x.shape[-1], min(3, *x.shape[1:3]), padding="same", use_bias=d.chance(0.5))(x)
    y = layers.BatchNormalization()(y) if d.chance(0.5) else y
    joined = d.pick(lambda a, b: a + b, lambda a, b: layers.Add()([a, b]), lambda a, b: a - b)(x, y)
    return d.pick(layers.ReLU(), layers.Activation("linear"))(joined)


def _branches(d: Drawer, x: Tensor) -> Tensor:
    branches = [layers.Conv2D(d.size(1, 3), 1, activation=d.pick(None, "relu", "sigmoid"))(x) for _ in range(2)]
    branches = [x, *branches] if d.chance(0.5) else branches
    return layers.Concatenate(axis=d.pick(-1, 3))(branches)


def _extremes(d: Drawer, x: Tensor) -> Tensor:
    y = layers.DepthwiseConv2D(1)(x)
    return ops.maximum(x, y) if d.chance(0.5) else ops.minimum(x, y)


def _squeeze_excite(d: Drawer, x: Tensor) -> Tensor:
    s = layers.GlobalAveragePooling2D(keepdims=True)(x)
    s = layers.Conv2D(x.shape[-1], 1, activation=d.pick("sigmoid", "hard_sigmoid"))(s)
    return layers.Multiply()([x, s]) if d.chance(0.5) else x * s


def _prelu(d: Drawer, x: Tensor) -> Tensor:
    return layers.PReLU(shared_axes=[1, 2], alpha_initializer=keras.initializers.RandomUniform(-0.2, 0.5))(x)


def _constant(d: Drawer, x: Tensor) -> Tensor:
    return d.pick(lambda t: t + 0.5, lambda t: t * 2.0, lambda t: 1.0 - t, lambda t: -t)(x)


def _nested(d: Drawer, x: Tensor) -> Tensor:
    block = keras.Sequential([keras.Input(x.shape[1:]), layers.Conv2D(d.size(1, 4), 1), layers.ReLU()])
    return block(x)


def _shared(d: Drawer, x: Tensor) -> Tensor:
    layer = layers.Conv2D(x.shape[-1], 1, activation="relu")
    return layer(layer(x))


def _norm(d: Drawer, x: Tensor) -> Tensor:
    return layers.BatchNormalization()(x)


def _activation(d: Drawer, x: Tensor) -> Tensor:
    return layers.Activation(d.activation() or "relu")(x)


def _function(d: Drawer, x: Tensor) -> Tensor:
    """Functions of one tensor, in layers and in plain operations."""
    return d.pick(
        lambda t: layers.Activation(d.pick("mish", "softplus", "selu", "softsign", "celu", "log_sigmoid"))(t),
        lambda t: layers.ReLU(threshold=0.3, negative_slope=d.pick(0.0, 0.1))(t),
        lambda t: ops.sqrt(ops.abs(t) + 0.1),
        lambda t: t * ops.tanh(ops.log(1.0 + ops.exp(ops.clip(t, -4.0, 4.0)))),
        lambda t: ops.sin(t) + d.pick(0.0, 1.0) * t,
        lambda t: ops.where(t > 0.2, t, 0.3 * t),
        lambda t: t / (1.0 + ops.square(t)),
        lambda t: ops.power(ops.abs(t), 1.5) * ops.sign(t),
    )(x)


def _selection(d: Drawer, x: Tensor) -> Tensor:
    """Entries along an axis, in other orders and numbers."""
    axis = d.pick(1, 2, 3)
    return d.pick(
        lambda t: ops.flip(t, axis),
        lambda t: ops.roll(t, d.pick(-1, 1), axis),
        lambda t: ops.take(t, [0, -1, 0], axis),
        lambda t: ops.tile(t, (1, 1, 1, 2)) if t.shape[-1] < 9 else t,
        lambda t: ops.where(ops.flip(t, axis) > 0.0, t, t + 0.1 * layers.Conv2D(t.shape[-1], 1)(t)),
        lambda t: ops.sort(t, axis),
        lambda t: ops.take_along_axis(t, ops.argmax(t, axis, keepdims=True), axis),
    )(x)


def _statistic(d: Drawer, x: Tensor) -> Tensor:
    """Reductions, and what becomes of a tensor beside them."""
    axis = d.pick(1, 2, 3)
    return d.pick(
        lambda t: t - ops.min(t, axis, keepdims=True),
        lambda t: t + ops.var(t, axis, keepdims=True),
        lambda t: ops.cumsum(t, axis) * 0.5,
        lambda t: ops.log_softmax(t, axis),
        lambda t: ops.max(t, axis, keepdims=True) - t,
        lambda t: layers.Resizing(5, 4, interpolation=d.pick("bicubic", "lanczos3"))(t),
        lambda t: layers.Conv2D(t.shape[-1], 1)(t) / (1.5 + ops.abs(t)),
    )(x)


IMAGE_STEPS: tuple[Step, ...] = (
    *(_conv, _conv, _conv, _depthwise, _depthwise, _separable, _transposed, _pool, _pad, _crop, _resize, _residual),
    *(_residual, _branches, _extremes, _squeeze_excite, _prelu, _constant, _nested, _shared, _norm, _activation),
    *(_function, _function, _selection, _statistic),
)


def _volume_step(d: Drawer, x: Tensor) -> Tensor:
    """Three dimensions, or frames of two."""
    frames = layers.TimeDistributed
    return d.pick(
        lambda t: layers.Conv3D(d.size(1, 4), d.pick(1, 2, (2, 1, 2)), d.pick(1, 2), d.pick("same", "valid"))(t),
        lambda t: layers.Conv3D(d.size(1, 4), 3, padding="same", activation="relu")(t),
        lambda t: layers.Conv3DTranspose(d.size(1, 3), 2, padding=d.pick("same", "valid"))(t),
        lambda t: d.pick(layers.MaxPooling3D, layers.AveragePooling3D)(2, d.pick(1, 2), "same")(t),
        lambda t: layers.ReLU()(layers.BatchNormalization()(t)),
        lambda t: frames(layers.Conv2D(d.size(1, 4), d.pick(1, 3), padding="same"))(t),
        lambda t: t + layers.Conv3D(t.shape[-1], 1, activation=d.pick(None, "tanh"))(t),
        lambda t: layers.ZeroPadding3D(((1, 0), (0, 0), (0, 1)))(t) if max(t.shape[1:4]) < 6 else t,
    )(x)


def _head(d: Drawer, x: Tensor) -> Tensor:
    rank = len(x.shape)
    if rank > 3 and d.chance(0.2):
        return x
    if rank == 5:
        x = d.pick(layers.GlobalAveragePooling3D(), layers.GlobalMaxPooling3D(), layers.Flatten())(x)
    elif rank == 4:
        x = d.pick(layers.GlobalAveragePooling2D(), layers.GlobalMaxPooling2D(), layers.Flatten())(x)
    elif d.heavy and d.chance(0.2):
        d.heavy -= 1
        x = recurrent(d, x, sequences=d.chance(0.5))
    elif d.chance(0.8):  # else one output for every step
        first = lambda t: t[:, 0]  # noqa: E731
        x = d.pick(layers.GlobalAveragePooling1D(), layers.GlobalMaxPooling1D(), layers.Flatten(), first)(x)
    x = layers.Dropout(0.5)(x)
    return layers.Dense(d.size(2, 7), activation=d.pick(None, "softmax", "sigmoid"))(x)


def _beginning(d: Drawer) -> tuple[list[Tensor], Tensor, Step, int]:
    """Inputs, what the first step reads, what draws a step, and the most steps."""
    family = d.rng.random()
    if family < 0.45:
        inputs = [keras.Input((d.size(3, 9), d.size(3, 9), d.size(1, 4)))]
        return inputs, inputs[0], lambda d, x: IMAGE_STEPS[d.rng.integers(len(IMAGE_STEPS))](d, x), 8
    if family < 0.53:
        inputs = [keras.Input((d.size(2, 4), d.size(3, 5), d.size(3, 5), d.size(1, 3)))]
        return inputs, inputs[0], _volume_step, 4
    return *(vectors(d) if family < 0.77 else embedded(d)), sequence_step, 4


def random_model(seed: int) -> keras.Model:
    """A model of 1 to 8 random steps with random weights and batch-norm statistics."""
    keras.utils.set_random_seed(seed)
    d = Drawer(seed)
    inputs, x, step, most = _beginning(d)
    for _ in range(d.size(most // 4, most)):
        x = step(d, x)
    outputs = [_head(d, x)] + ([_head(d, x)] if d.chance(0.15) else [])
    model = keras.Model(inputs, outputs if len(outputs) > 1 else outputs[0], name=f"random_{seed}")
    for weight in model.weights:
        low, high = (0.3, 2.0) if "variance" in weight.path else (-0.6, 0.6)
        if weight.path.endswith(("gamma", "scale")):
            low, high = 0.4, 1.6
        weight.assign(d.rng.uniform(low, high, weight.shape))
    return model


def random_data(seed: int, model: keras.Model, samples: int = 32) -> list[np.ndarray]:
    """Inputs of the model: standard normal, ids with padding behind them, zeros and ones that tell what is padding."""
    rng = np.random.default_rng(seed + 1000)
    found = []
    for x in model.inputs:
        shape = (samples, *x.shape[1:])
        seen = np.arange(shape[1]) < rng.integers(1, shape[1] + 1, (samples, 1))
        if x.name == "ids":
            value = rng.integers(1, VOCABULARY, shape) * seen
        elif x.name == "kinds":
            value = rng.integers(0, 2, shape)
        else:
            value = seen if x.name == "seen" else rng.normal(size=shape)
        found.append(value.astype(x.dtype))
    return found
