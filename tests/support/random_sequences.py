"""Steps of random models on sequences: attention, recurrence, normalization, embeddings."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers, ops

from tests.support.drawer import Drawer, Tensor

VOCABULARY = 11  # ids 1 to 10; 0 is padding
RECURRENT_STEPS = 3  # every step is written out, with some 20 operations


def sequence_step(d: Drawer, x: Tensor) -> Tensor:
    """One step from [batch, steps, channels] to the same."""
    step, weight = SEQUENCE_STEPS[d.rng.integers(len(SEQUENCE_STEPS))]
    if weight > d.heavy:
        step, weight = _plain, 0
    d.heavy -= weight
    return step(d, x)


def _plain(d: Drawer, x: Tensor) -> Tensor:
    return d.pick(
        lambda t: layers.Conv1D(d.size(1, 6), 3, padding=d.pick("same", "causal"), activation=d.pick(None, "relu"))(t),
        lambda t: layers.DepthwiseConv1D(3, padding="same")(t),
        lambda t: layers.SeparableConv1D(d.size(1, 4), 2, padding="same")(t),
        lambda t: layers.MaxPooling1D(2, padding="same")(t),
        lambda t: layers.AveragePooling1D(2, padding="same")(t),
        lambda t: layers.Dense(d.size(1, 8), activation=d.pick(None, "relu", "gelu"))(t),
        lambda t: layers.EinsumDense("abc,cd->abd", (t.shape[1], d.size(1, 6)), bias_axes="d")(t),
        lambda t: layers.BatchNormalization()(t),
        lambda t: layers.Permute((2, 1))(t),
        lambda t: layers.UpSampling1D(2)(t) if t.shape[1] < 8 else t,
        lambda t: layers.ZeroPadding1D(1)(t),
        lambda t: layers.Activation(d.pick("mish", "log_softmax", "exponential"))(ops.clip(t, -3.0, 3.0)),
        lambda t: ops.top_k(t, d.pick(1, t.shape[-1]))[0],
        lambda t: ops.cumsum(t, 1),
        lambda t: ops.einsum("bij,bkj->bik", t, ops.tanh(t)),
        lambda t: layers.TimeDistributed(layers.Dense(d.size(2, 6), activation=d.pick(None, "relu")))(t),
    )(x)


def _normalization(d: Drawer, x: Tensor) -> Tensor:
    """In layers, and written out."""
    channels = x.shape[-1]
    groups = d.pick(*[g for g in (1, 2, 3) if channels % g == 0])
    return d.pick(
        lambda t: layers.LayerNormalization()(t),
        lambda t: layers.LayerNormalization(axis=[1, 2], center=False)(t),
        lambda t: layers.RMSNormalization()(t),
        lambda t: layers.GroupNormalization(groups)(t),
        lambda t: layers.UnitNormalization()(t),
        lambda t: (t - ops.mean(t, -1, keepdims=True)) / ops.sqrt(ops.var(t, -1, keepdims=True) + 1e-3),
        lambda t: t * ops.rsqrt(ops.mean(ops.square(t), -1, keepdims=True) + 1e-3),
    )(x)


def _masks(d: Drawer, queries: int, keys: int) -> Tensor | None:
    """What hides keys: [1 or batch, queries or 1, keys], true where one is seen, or None."""
    causal = np.tril(np.ones((1, queries, keys), bool))
    found = [causal] if d.chance(0.4) else []
    if d.seen is not None and d.seen.shape[1] == keys and d.chance(0.8):
        found.append(ops.cast(ops.reshape(d.seen, (-1, 1, keys)), "bool"))
    if len(found) == 2:
        return ops.logical_and(*found)
    return found[0] if found else None


def _layer_of_attention(d: Drawer, x: Tensor, memory: Tensor) -> Tensor:
    mask = _masks(d, x.shape[1], memory.shape[1])
    causal = mask is None and d.chance(0.3)
    if d.chance(0.7) or x.shape[-1] != memory.shape[-1]:
        layer = layers.MultiHeadAttention(d.size(1, 2), d.size(2, 4), d.pick(None, 3), use_bias=d.chance(0.7))
    else:
        layer = layers.GroupQueryAttention(d.size(2, 4), *d.pick((2, 1), (4, 2), (2, 2)))
    return layer(x, memory, attention_mask=mask, use_causal_mask=causal)


def _scored_attention(d: Drawer, x: Tensor, memory: Tensor) -> Tensor:
    """The layers without weights, which score queries against keys of the same width."""
    keys = layers.Dense(x.shape[-1])(memory)
    masks = None
    if d.seen is not None and d.seen.shape[1] == keys.shape[1] and d.chance(0.5):
        masks = [None, ops.cast(d.seen, "bool")]
    causal = d.chance(0.3)
    layer = d.pick(layers.Attention(use_scale=True), layers.Attention(score_mode="concat"), layers.AdditiveAttention())
    return layer([x, keys], mask=masks, use_causal_mask=causal)


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions: pairs of channels turn by an angle that grows with the step."""
    _, steps, channels = x.shape
    half = channels // 2
    angles = np.arange(steps)[:, None] / 10.0 ** (2 * np.arange(half) / max(channels, 1))[None]
    cos, sin = (np.tile(f(angles), 2)[None].astype(np.float32) for f in (np.cos, np.sin))
    turned = ops.concatenate([-x[:, :, half:], x[:, :, :half]], -1)
    return x * cos + turned * sin


def _written_attention(d: Drawer, x: Tensor, memory: Tensor) -> Tensor:
    """In plain operations, with the mask added or selected."""
    width = d.pick(2, 4)
    q, k, v = (layers.Dense(width)(t) for t in (x, memory, memory))
    if d.chance(0.3):
        q, k = _rotated(q), _rotated(k)
    scores = ops.matmul(q, ops.transpose(k, (0, 2, 1))) / float(np.sqrt(width))
    mask = _masks(d, x.shape[1], memory.shape[1])
    if mask is not None:
        # `cast` by numpy where the mask is known: a mask that varies is a tensor of the model
        known = isinstance(mask, np.ndarray)
        number = mask.astype(np.float32) if known else ops.cast(mask, "float32")
        scores = d.pick(
            lambda s: s + (1.0 - number) * -1e9,
            lambda s: ops.where(mask, s, -1e9),
            lambda s: ops.where(mask, s, -float("inf")),
        )(scores)
    return ops.matmul(layers.Dropout(0.1)(ops.softmax(scores)), v)


def attention(d: Drawer, x: Tensor, memory: Tensor | None = None) -> Tensor:
    """Of any kind, over the sequence itself or over another."""
    kind = d.pick(_layer_of_attention, _layer_of_attention, _scored_attention, _written_attention)
    return kind(d, x, x if memory is None else memory)


def _attention(d: Drawer, x: Tensor) -> Tensor:
    other = layers.Dense(d.size(2, 4))(x)[:, ::-1] if d.chance(0.3) else None
    return attention(d, x, other)


def _transformer(d: Drawer, x: Tensor) -> Tensor:
    """A block with the normalization in front of its parts, or behind their sums."""
    norm = d.pick(layers.LayerNormalization, layers.RMSNormalization)
    channels, before = x.shape[-1], d.chance(0.5)

    def attend(t: Tensor) -> Tensor:
        return layers.Dense(channels)(attention(d, t))

    def feed(t: Tensor) -> Tensor:
        return layers.Dense(channels)(layers.Dense(2 * channels, activation=d.pick("gelu", "relu", "swish"))(t))

    for part in (attend, feed):
        x = x + layers.Dropout(0.1)(part(norm()(x))) if before else norm()(x + layers.Dropout(0.1)(part(x)))
    return x


def recurrent(d: Drawer, x: Tensor, sequences: bool = True) -> Tensor:
    """A recurrent layer; short sequences only."""
    if x.shape[1] > RECURRENT_STEPS:
        x = x[:, :RECURRENT_STEPS]
    units, kind = d.size(2, 3), d.pick(layers.LSTM, layers.GRU, layers.SimpleRNN)
    options = {"reset_after": d.chance(0.5)} if kind is layers.GRU else {}
    layer = kind(units, return_sequences=sequences, use_bias=d.chance(0.8), **options)
    if d.heavy and d.chance(0.3):
        d.heavy -= 1
        return layers.Bidirectional(layer, merge_mode=d.pick("concat", "sum", "ave"))(x)
    layer.go_backwards = d.chance(0.2)
    return layer(x)


def _pooled_back(d: Drawer, x: Tensor) -> Tensor:
    """What the whole sequence says, told to every step."""
    mean = layers.GlobalAveragePooling1D(keepdims=True)(x)
    if d.seen is not None and d.seen.shape[1] == x.shape[1] and d.chance(0.6):
        shown = ops.expand_dims(d.seen, -1)
        mean = ops.sum(x * shown, 1, keepdims=True) / ops.maximum(ops.sum(shown, 1, keepdims=True), 1.0)
    return d.pick(lambda t: t - mean, lambda t: t * ops.sigmoid(mean), lambda t: ops.concatenate([mean, t], 1))(x)


# with what they take of `Drawer.heavy`
SEQUENCE_STEPS = (
    *((_plain, 0), (_plain, 0), (_plain, 0), (_normalization, 0), (_pooled_back, 0)),
    *((_attention, 1), (_attention, 1), (recurrent, 1), (_transformer, 2)),
)


@keras.saving.register_keras_serializable("tests")
class Positions(layers.Layer):
    """Adds a vector for every place."""

    def build(self, shape: tuple[int, ...]) -> None:
        self.table = self.add_weight(shape=shape[1:], name="table")

    def call(self, x: Tensor) -> Tensor:
        return x + self.table


def embedded(d: Drawer) -> tuple[list[Tensor], Tensor]:
    """Inputs of ids, and their vectors [batch, steps, channels] with positions and kinds."""
    steps, channels = d.size(3, 5), d.pick(2, 4, 6)
    inputs = [keras.Input((steps,), dtype=d.pick("int32", "int32", "float32"), name="ids")]
    x = layers.Embedding(VOCABULARY, channels, mask_zero=d.chance(0.5))(inputs[0])
    if d.chance(0.25):
        inputs.append(keras.Input((steps,), dtype="int32", name="kinds"))
        x = layers.Add()([x, layers.Embedding(2, channels)(inputs[1])])
    if d.chance(0.3):
        d.seen = ops.cast(ops.not_equal(inputs[0], 0), "float32")
    if d.chance(0.5):
        x = Positions()(x)
    return inputs, layers.LayerNormalization()(x) if d.chance(0.4) else x


def vectors(d: Drawer) -> tuple[list[Tensor], Tensor]:
    """An input of vectors [batch, steps, channels], and perhaps one that tells which steps are padding."""
    inputs = [keras.Input((d.size(3, 6), d.size(2, 6)), name="vectors")]
    if d.chance(0.4):
        d.seen = keras.Input((inputs[0].shape[1],), name="seen")
        inputs.append(d.seen)
        if d.chance(0.5):
            return inputs, inputs[0] * ops.expand_dims(d.seen, -1)
    return inputs, inputs[0]
