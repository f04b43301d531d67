"""Integers are decided once: what AdaRound or training decided is what the file holds."""

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.keras.model import extract
from kquant.quantize import pipeline
from kquant.targets.litert.flatbuffer import read_tensors


def network(seed: int) -> tuple[keras.Model, np.ndarray]:
    """Convolutions some of whose channels are dead (weights of zero or nearly so), with biases of any size."""
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((6, 6, 3), name="image")
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="conv")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Conv2D(6, 1, activation="relu6", name="pointwise")(x)
    x = layers.Dense(4, name="dense")(layers.GlobalAveragePooling2D(name="pool")(x))
    model = keras.Model(inputs, x)
    for name in ("conv", "depthwise", "pointwise", "dense"):
        kernel, bias = model.get_layer(name).get_weights()
        channels = bias.size
        factor = 10.0 ** rng.choice([-12, -7, 0, 0, 0, 0], channels)
        factor[rng.random(channels) < 0.15] = 0.0
        kernel = (kernel.reshape(-1, channels) * factor).reshape(kernel.shape)
        sizes = 10.0 ** rng.choice([-3, 0, 0, 2], channels)
        model.get_layer(name).set_weights([kernel, rng.normal(size=channels).astype(np.float32) * sizes])
    return model, rng.normal(size=(32, 6, 6, 3)).astype(np.float32)


def stored(content: bytes) -> dict[str, np.ndarray]:
    found = read_tensors(content)
    return {name[: -len("/kernel")]: t.data for name, t in found.items() if name.endswith("/kernel")}


def assert_in_file(integers: dict[str, np.ndarray], model: keras.Model) -> None:
    """Whatever the file's axes: the same integers per output channel, and the file computes what is simulated."""
    content = kquant.export_tflite(model).content
    file = stored(content)
    assert integers
    for name, want in integers.items():
        wanted = want.reshape(-1, want.shape[-1])
        axis = 3 if name == "depthwise" else 0
        found = np.moveaxis(file[name], axis, -1).reshape(wanted.shape)
        np.testing.assert_array_equal(found, wanted, err_msg=name)


@pytest.mark.parametrize("seed", [0, 2, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 3, 4, 5))])
def test_what_adaround_decides_is_what_the_file_holds(seed, monkeypatch):
    decided: dict[str, np.ndarray] = {}
    real = pipeline.adaround

    def recorded(*args, **kwargs):
        graph, rows = real(*args, **kwargs)
        decided.update({row.node: row.integers for row in rows})
        return graph, rows

    monkeypatch.setattr(pipeline, "adaround", recorded)
    model, data = network(seed)
    qmodel = kquant.quantize_model(model, data, ("w4a8", "w4a8-per_tensor", "w4a8-kmeans")[seed % 3], progress=False)
    qgraph = extract(qmodel)
    for name, integers in decided.items():
        np.testing.assert_array_equal(qgraph.integers[name], integers, err_msg=name)
    assert_in_file(decided, qmodel)
    assert kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, data).ok


@pytest.mark.slow
@pytest.mark.parametrize("config", ["w8a8", "w4a8", "w4a8-kmeans"])
def test_what_training_decides_is_what_the_file_holds(config, tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 3), name="image")
    x = layers.Conv2D(8, 3, activation="relu", name="conv")(inputs)
    model = keras.Model(inputs, layers.Dense(4, name="dense")(layers.Flatten()(x)))
    rng = np.random.default_rng(0)
    data, labels = rng.normal(size=(64, 6, 6, 3)).astype(np.float32), rng.normal(size=(64, 4))
    qat = kquant.prepare_qat(model, data, config, progress=False)
    qat.compile(keras.optimizers.Adam(0.01), "mse")
    qat.fit(data, labels, epochs=2, verbose=0)
    layer_integers = {
        name: np.asarray(qat.get_layer(name)._quantized_weight()[0]).astype(np.int8) for name in ("conv", "dense")
    }
    assert_in_file(layer_integers, qat)
    qat.save(tmp_path / "qat.keras")
    assert_in_file(layer_integers, keras.saving.load_model(tmp_path / "qat.keras"))


def test_a_model_that_is_decided_does_not_train():
    model, data = network(0)
    qmodel = kquant.quantize_model(model, data, progress=False)
    assert not qmodel.trainable_variables
    qmodel.compile("sgd", "mse")
    with pytest.raises(kquant.ModelError, match="prepare_qat"):
        qmodel.fit(data, np.zeros((32, 4)), verbose=0)
    distiller = kquant.Distiller(qmodel, model)
    distiller.compile("sgd")
    with pytest.raises(kquant.ModelError, match="prepare_qat"):
        distiller.fit(data, verbose=0)


def test_integers_take_a_byte_each_in_memory():
    model, data = network(0)
    layer = kquant.quantize_model(model, data, "w4a8", progress=False).get_layer("conv")
    assert layer.integers.dtype == "int8" and layer.integers.shape == (3, 3, 3, 8)


@pytest.mark.slow
def test_solvers_that_relax_refuse_a_table():
    model, data = network(0)
    config = {"preset": "w4a8-kmeans", "adaround": {"solver": "gram"}}
    with pytest.raises(kquant.ConfigError, match="'pointwise'.*descent"):
        kquant.quantize_model(model, data, config, progress=False)
