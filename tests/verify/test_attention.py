"""Attention from Keras to the file: integers from end to end, masks that hide what they should, and parity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops as K

import kquant
from kquant.graph.ops import evaluate
from kquant.graph.tracing.trace import trace_model

SAMPLES, T, S, C = 48, 6, 8, 16
RNG = np.random.default_rng(0)
QUERY = RNG.normal(size=(SAMPLES, T, C)).astype(np.float32)
MEMORY = RNG.normal(size=(SAMPLES, S, C)).astype(np.float32)
SEEN = (np.arange(S)[None] < RNG.integers(3, S + 1, SAMPLES)[:, None]).astype(np.float32)
KNOWN = np.tril(np.ones((1, T, S), bool))
FUTURE = np.triu(np.full((S, S), -1e9, np.float32), 1)


def seen(m: Any) -> Any:
    return K.cast(K.reshape(m, (-1, 1, S)), "bool")


def scores(x: Any, m: Any) -> Any:
    return K.matmul(x, K.transpose(m, (0, 2, 1))) * 0.25


# f(query, memory, mask): masks are the third input, of zeros and ones
ATTENTION: dict[str, Callable[[Any, Any, Any], Any]] = {
    "layer, boolean mask": lambda x, m, k: L.MultiHeadAttention(4, 4)(x, m, attention_mask=seen(k)),
    "layer, causal and mask": lambda x, m, k: L.MultiHeadAttention(2, 8, dropout=0.1)(
        m, m, attention_mask=seen(k), use_causal_mask=True
    ),
    "grouped, mask": lambda x, m, k: L.GroupQueryAttention(8, 4, 2)(x, m, attention_mask=seen(k)),
    "softmax with a mask": lambda x, m, k: K.matmul(L.Softmax()(scores(m, m), mask=seen(k) & (FUTURE[None] == 0)), m),
    "where": lambda x, m, k: K.matmul(K.softmax(K.where(seen(k), scores(x, m), -float("inf"))), m),
    "added": lambda x, m, k: K.matmul(K.softmax(scores(x, m) + (1 - K.reshape(k, (-1, 1, S))) * -1e9), m),
    "added, and causal": lambda x, m, k: K.matmul(
        K.softmax(scores(m, m) + FUTURE + (1 - K.reshape(k, (-1, 1, S))) * -1e9), m
    ),
}
UNMASKED: dict[str, Callable[[Any, Any], Any]] = {
    "layer": lambda x, m: L.MultiHeadAttention(2, 8)(x, m),
    "layer, narrow values": lambda x, m: L.MultiHeadAttention(2, 8, value_dim=3)(x, m),
    "layer, causal": lambda x, m: L.MultiHeadAttention(2, 8)(m, m, use_causal_mask=True),
    "layer, known mask": lambda x, m: L.MultiHeadAttention(2, 8)(x, m, attention_mask=KNOWN),
    "grouped, known mask": lambda x, m: L.GroupQueryAttention(8, 4, 2)(x, m, attention_mask=KNOWN),
    "grouped": lambda x, m: L.GroupQueryAttention(8, 4, 2)(x, m),
    "dot": lambda x, m: L.Attention(use_scale=True)([x, m]),
    "dot, causal": lambda x, m: L.Attention()([m, m], use_causal_mask=True),
    "concat": lambda x, m: L.Attention(score_mode="concat")([x, m]),
    "additive": lambda x, m: L.AdditiveAttention()([x, m]),
    "over another axis": lambda x, m: L.Softmax(axis=1)(L.Dense(4)(x) + 0.0 * m[:, :T, :4]),
}


def model_of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = [keras.Input(s) for s in shapes]
    model = keras.Model(inputs, L.Dense(5)(L.Concatenate(1)([function(*inputs)[:, :, :4], inputs[0][:, :, :4]])))
    for w in model.weights:
        w.assign(w + RNG.normal(size=w.shape) * 0.05)
    return model


def db(want: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.square(want).sum() / np.square(want - found).sum()))


def check(model: keras.Model, data: list[np.ndarray], config: str, least: float) -> kquant.TFLiteModel:
    qmodel = kquant.quantize_model(model, data, config, progress=False)
    report = kquant.export_tflite(qmodel, allow_float=False)
    parity = kquant.verify_tflite(qmodel, report.content, data)
    assert parity.ok and parity.reference_max_lsb == 0 and parity.op_by_op_max_lsb <= 1, str(parity)
    runner = kquant.TFLiteModel(report.content)
    assert db(model.predict(data, verbose=0), runner.predict(data)[0]) > least
    return runner


@pytest.mark.parametrize("scale", [None, 2.0])
def test_the_scale_of_an_operation_is_that_of_its_call(scale: float | None) -> None:
    inputs = keras.Input((T, 2, 4))
    model = keras.Model(inputs, K.dot_product_attention(inputs, inputs, inputs, scale=scale))
    x = RNG.normal(size=(4, T, 2, 4)).astype(np.float32)
    graph = trace_model(model)
    assert "float" not in [n.op for n in graph]
    scored = np.einsum("bqhd,bkhd->bhqk", x, x) * (0.5 if scale is None else scale)
    weights = np.exp(scored) / np.exp(scored).sum(-1, keepdims=True)
    np.testing.assert_allclose(evaluate(graph, [x])[0], np.einsum("bhqk,bkhd->bqhd", weights, x), rtol=0, atol=1e-5)


WIDE = ("layer, boolean mask", "added, and causal", "layer", "additive")
QUICK = ("layer, boolean mask", "softmax with a mask", "added", "additive")  # others are slow tests
SETTINGS = [pytest.param("w8a8", 27.0, n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in (*ATTENTION, *UNMASKED)]
SETTINGS += [pytest.param("w8a16", 38.0, n, marks=pytest.mark.slow) for n in WIDE]


@pytest.mark.parametrize("config, least, name", SETTINGS)
def test_runs_in_integers(config: str, least: float, name: str) -> None:
    shapes, data = [(T, C), (S, C), (S,)], [QUERY, MEMORY, SEEN]
    count = 3 if name in ATTENTION else 2
    check(model_of({**ATTENTION, **UNMASKED}[name], *shapes[:count]), data[:count], config, least)


@pytest.mark.parametrize("name", ["layer, boolean mask", "where"])
def test_hidden_keys_have_no_say(name: str) -> None:
    runner = check(model_of(ATTENTION[name], (T, C), (S, C), (S,)), [QUERY, MEMORY, SEEN], "w8a8", 27.0)
    other = np.where(SEEN[:, :, None] == 0, -MEMORY, MEMORY)
    found = [runner.predict([QUERY, m, SEEN])[0] for m in (MEMORY, other)]
    assert db(*found) > 40


@pytest.mark.usefixtures("eagerly")
def test_a_mask_at_the_floor_is_exact_in_16_bits() -> None:
    """What is hidden saturates, at -32768, though the bound that stands for it is -32767."""
    model = model_of(UNMASKED["layer, known mask"], (T, C), (S, C))
    qmodel = kquant.quantize_model(model, [QUERY, MEMORY], "w8a16", progress=False)
    parity = kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, [QUERY, MEMORY])
    assert [t.simulation_max for t in parity.tensors if "masked_by_constant" in t.name and t.op == "add"] == [0.0]


@pytest.mark.slow
def test_the_mask_keeps_its_meaning_where_the_data_has_other_numbers() -> None:
    mask = SEEN * RNG.uniform(1.0, 3.0, SEEN.shape).astype(np.float32)
    check(model_of(ATTENTION["layer, boolean mask"], (T, C), (S, C), (S,)), [QUERY, MEMORY, mask], "w8a8", 27)


@pytest.mark.slow
def test_masked_attention_trains() -> None:
    model, data = model_of(ATTENTION["added"], (T, C), (S, C), (S,)), [QUERY, MEMORY, SEEN]
    qat = kquant.prepare_qat(model, data, "w8a8", progress=False)
    qat.compile(keras.optimizers.Adam(0.01), "mse")
    losses = qat.fit(data, RNG.normal(size=(SAMPLES, 2 * T, 5)), epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert kquant.verify_tflite(qat, kquant.export_tflite(qat).content, data).ok


def _embedded(ids: Any) -> Any:
    """The mask goes along with the tensors: no argument of a call."""
    x = L.Embedding(50, C, mask_zero=True)(ids)
    return L.Dense(3)(L.LayerNormalization()(x + L.MultiHeadAttention(2, 8)(x, x)))


def _explicit(ids: Any) -> Any:
    x, mask = L.Embedding(50, C)(ids), K.not_equal(ids, 0)
    weights = K.softmax(K.where(K.expand_dims(mask, 1), scores(x, x), -1e9))
    seen_ids = K.cast(mask, "float32")[:, :, None]
    return K.sum(K.matmul(weights, x) * seen_ids, 1) / K.sum(seen_ids, 1)


@pytest.mark.slow
@pytest.mark.parametrize("function, dtype", [(_embedded, "int32"), (_embedded, "float32"), (_explicit, "int32")])
def test_masks_of_ids(function: Callable[[Any], Any], dtype: str) -> None:
    inputs = keras.Input((S,), dtype=dtype)
    model = keras.Model(inputs, function(inputs))
    ids = np.where(SEEN > 0, RNG.integers(1, 50, SEEN.shape), 0).astype(dtype)
    runner = check(model, [ids], "w8a8", 27.0)
    out_of_range = ids.copy()
    out_of_range[0, 0] = 50
    with pytest.raises(Exception, match="(?i)gather|invoke|index"):
        runner.predict(out_of_range)


@pytest.mark.parametrize("kind", [L.Attention, L.AdditiveAttention])
def test_masks_of_ids_reach_the_layers_that_take_a_list(kind: type[L.Layer]) -> None:
    """Hidden keys have no say, hidden queries get zero, and the mask goes on to the pooling."""
    inputs = keras.Input((S,), dtype="int32")
    x = L.Embedding(50, C, mask_zero=True)(inputs)
    model = keras.Model(inputs, L.GlobalAveragePooling1D()(x + kind()([x, L.Dense(C)(x)])))
    ids = np.where(SEEN > 0, RNG.integers(1, 50, SEEN.shape), 0).astype("int32")
    graph = trace_model(model)
    assert "float" not in [n.op for n in graph]
    np.testing.assert_allclose(evaluate(graph, [ids])[0], model(ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [L.Attention, L.AdditiveAttention])
@pytest.mark.parametrize("hides_queries", [False, True])
def test_a_mask_that_is_given_goes_on_in_place_of_that_of_the_ids(kind: type[L.Layer], hides_queries: bool) -> None:
    """Keras passes on what was given for the queries, none for None."""
    inputs = keras.Input((S,), dtype="int32")
    x, seen = L.Embedding(50, C, mask_zero=True)(inputs), K.not_equal(inputs, 0)
    y = kind()([x, x], mask=[inputs > 20 if hides_queries else None, seen])
    model = keras.Model(inputs, L.MultiHeadAttention(2, 8, name="behind")(y, y))
    ids = np.where(SEEN > 0, RNG.integers(1, 50, SEEN.shape), 0).astype("int32")
    np.testing.assert_allclose(evaluate(trace_model(model), [ids])[0], model(ids), rtol=0, atol=1e-5)


def test_a_mask_that_cannot_be_followed_is_refused() -> None:
    x = L.Masking()(keras.Input((T, C), name="x"))
    y = L.MultiHeadAttention(2, 8, name="attention")(x, x)
    with pytest.raises(kquant.ModelError, match="attention.*attention_mask"):
        kquant.quantize_model(keras.Model(x._keras_history.operation.input, y), QUERY, "w8a8", progress=False)
