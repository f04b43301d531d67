"""Weights on tables and blocks, from `quantize_model` to the file and its parity, on stock int8 kernels."""

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.grids.grid import fake_quantize
from kquant.keras.model import extract
from kquant.targets.litert.flatbuffer import read_tensors

X = np.random.default_rng(1).normal(size=(64, 8, 8, 3)).astype(np.float32)
ALL = {"preset": "w8a8"}  # without the rules of presets that keep some layers at 8 bits
CONFIGS = {
    "ternary": {**ALL, "weights": {"bits": 2, "format": "ternary"}},
    "binary": {**ALL, "weights": {"bits": 1, "format": "binary"}},
    "16 centroids": {**ALL, "weights": {"bits": 4, "format": "kmeans"}},
    "4 centroids, one scale": {**ALL, "weights": {"bits": 2, "format": "kmeans", "per_channel": False}},
    "powers of two": {**ALL, "weights": {"bits": 4, "format": "power_of_two"}},
    "sums of two powers": {**ALL, "weights": {"bits": 4, "format": "apot"}},
    "3 binary bases": {**ALL, "weights": {"bits": 3, "format": "binary_bases"}},
    "blocks of 32": {"preset": "w4a8-b32"},
    "ternary blocks of 32": {**ALL, "weights": {"bits": 2, "format": "ternary", "block": 32}},
    "16 centroids, nearest": {**ALL, "weights": {"bits": 4, "format": "kmeans"}, "adaround": False},
    "16 centroids, 16 bits": {"preset": "w8a16", "weights": {"bits": 4, "format": "kmeans"}},
}
FAST = ("ternary", "16 centroids", "blocks of 32")
LEAST_DB = {"ternary": 8, "binary": 5, "ternary blocks of 32": 8, "4 centroids, one scale": 8}


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(48, 3, strides=2, padding="same", activation="relu", name="conv")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="relu", name="depthwise")(x)
    x = layers.Conv2D(32, 1, activation="relu", name="pointwise")(x)
    x = layers.Flatten()(x)
    return keras.Model(inputs, layers.Dense(5, name="dense")(x))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in CONFIGS])
def test_integers_are_allowed_ones_and_the_file_computes_what_is_simulated(name, tmp_path):
    model = network()
    qmodel = kquant.quantize_model(model, X, CONFIGS[name], progress=False)
    path = tmp_path / "model.tflite"
    report = kquant.export_tflite(qmodel, path)
    qgraph, tensors = extract(qmodel), read_tensors(path)
    assert not report.float_ops
    for node in ("conv", "depthwise", "pointwise", "dense"):
        grid, integers = qgraph.weights[node], qgraph.integers[node]
        assert grid.table is not None
        levels = np.stack([np.broadcast_to(v, integers.shape) for v in grid.levels(integers.shape)])
        assert (integers == levels).any(axis=0).all()
        assert sorted(np.unique(tensors[f"{node}/kernel"].data)) == sorted(np.unique(integers))
    parity = kquant.verify_tflite(qmodel, path, X[:32])
    assert parity.ok and parity.reference_max_lsb == 0, str(parity)
    want, found = model.predict(X, verbose=0), kquant.TFLiteModel(path).predict(X)[0]
    assert 10 * np.log10(np.square(want).sum() / np.square(want - found).sum()) > LEAST_DB.get(name, 18)
    qmodel.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert kquant.export_tflite(loaded).content == report.content


def test_int8_tensors_hold_tables_wider_than_their_codes():
    qmodel = kquant.quantize_model(network(), X, CONFIGS["16 centroids"], progress=False)
    stored = read_tensors(kquant.export_tflite(qmodel).content)
    assert {stored[f"{n}/kernel"].type for n in ("conv", "pointwise", "dense")} == {"INT8"}
    assert len(np.unique(stored["pointwise/kernel"].data)) <= 16


def test_presets_with_a_format_keep_the_first_layer_depthwise_ones_and_a_small_last_one_at_8_bits():
    weights = extract(kquant.quantize_model(network(), X, "w2a8-kmeans", progress=False)).weights
    assert {n: q.table is None for n, q in weights.items()} == {
        "conv": True, "depthwise": True, "pointwise": False, "dense": False,
    }  # fmt: skip
    config = kquant.QuantConfig.preset("w2a8-kmeans")
    small, large = (config.resolve("x", "Dense", last=True, small_last=small).weights.bits for small in (True, False))
    assert (small, large) == (8, 2)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["w4a8-kmeans", "w4a8-b32", "w2a8-ternary", "w1a8-binary"])
def test_training_keeps_to_the_table_and_moves_scales(config):
    qat = kquant.prepare_qat(network(), X, config, progress=False)
    before = extract(qat)
    qat.compile(keras.optimizers.Adam(0.02), "mse")
    qat.fit(X, np.random.default_rng(2).normal(size=(64, 5)), epochs=2, verbose=0)
    after = extract(qat)
    assert any(grid.table is not None for grid in after.weights.values())
    for node, grid in after.weights.items():
        np.testing.assert_array_equal(grid.table, before.weights[node].table)
        assert np.any(grid.scale != before.weights[node].scale)
    # four steps lead across half a step of the grid where weights are small: in the layer with the most inputs
    assert np.any(after.integers["dense"] != before.integers["dense"])
    assert kquant.verify_tflite(qat, kquant.export_tflite(qat).content, X[:32]).ok


@pytest.mark.slow
def test_the_simulation_has_the_values_of_the_integers():
    qmodel = kquant.quantize_model(network(), X, "w4a8-b32", progress=False)
    layer, qgraph = qmodel.get_layer("dense"), extract(qmodel)
    real = np.asarray(layer._real_weights()["kernel"])
    np.testing.assert_array_equal(real, fake_quantize(real, qgraph.weights["dense"]))
    np.testing.assert_array_equal(real, qgraph.integers["dense"] * qgraph.weights["dense"].scale)


def tokens() -> keras.Model:
    keras.utils.set_random_seed(0)
    ids = keras.Input((6,), dtype="int32", name="ids")
    x = layers.Embedding(50, 64, name="table")(ids)
    x = layers.Dense(48, activation="relu", name="hidden")(layers.GlobalAveragePooling1D()(x))
    return keras.Model(ids, layers.Dense(40, name="scores")(layers.Dense(96, name="middle")(x)))


IDS = np.random.default_rng(3).integers(0, 50, (200, 6)).astype(np.int32)


@pytest.mark.parametrize("mode", ["dynamic_range", "weight_only"])
def test_weight_files_have_scales_of_blocks_where_kernels_read_them(mode):
    """hidden reads 64 inputs in two blocks; middle 48, which is no multiple of 32: a table on int8."""
    qmodel = kquant.quantize_model(tokens(), IDS, "w4-b32", progress=False)
    qgraph = extract(qmodel)
    assert qgraph.weights["hidden"].scale.shape == (48, 2) and qgraph.weights["table"].scale.shape == (50, 2)
    assert qgraph.weights["middle"].scale.shape == (96,) and qgraph.weights["scores"].scale.shape == (40, 3)
    content = kquant.export_tflite(qmodel, mode=mode).content
    stored = read_tensors(content)
    assert {t.type for t in stored.values() if t.name.endswith("scales")} == {"FLOAT16"}
    want, found = qmodel.predict(IDS, verbose=0), kquant.TFLiteModel(content).predict(IDS)[0]
    noise = np.square(want - found).sum() / np.square(want).sum()
    assert noise < (1e-3 if mode == "dynamic_range" else 1e-9)  # which quantizes the activations, too
    table = next(t for t in stored.values() if t.name == "table/table")
    assert table.type == "INT4"
    np.testing.assert_array_equal(table.data, qgraph.integers["table"])


@pytest.mark.slow
def test_rounding_with_scales_of_blocks_beats_nearest_and_saves():
    model = tokens()
    errors = {}
    for rounding in (None, False):
        qmodel = kquant.quantize_model(model, IDS, {"preset": "w4-b32", "adaround": rounding}, progress=False)
        errors[rounding] = np.square(qmodel.predict(IDS, verbose=0) - model.predict(IDS, verbose=0)).sum()
        grid, integers = extract(qmodel).weights["hidden"], extract(qmodel).integers["hidden"]
        assert np.abs(integers).max() <= 7 and (grid.scale == grid.scale.astype(np.float16)).all()
    assert errors[None] < 0.6 * errors[False]
