"""A quantized model without some of its outputs computes what it computed before."""

import keras
import numpy as np
import pytest
from keras import layers

import kquant

RNG = np.random.default_rng(5)
DATA = RNG.normal(size=(24, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> keras.Model:
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(6, 3, activation="relu", name="trunk")(inputs)
    logits = layers.Conv2D(4, 1, name="head")(x)
    aside = layers.Dense(3, name="aside")(layers.GlobalAveragePooling2D()(layers.Conv2D(5, 3, name="only")(x)))
    return keras.Model(inputs, {"logits": logits, "mask": keras.ops.argmax(logits, -1), "aside": aside})


@pytest.fixture(scope="module")
def qmodel(model: keras.Model) -> kquant.QuantizedModel:
    return kquant.quantize_model(model, DATA, "w4a8", progress=False)


@pytest.mark.parametrize("names", [["mask"], ["aside", "logits"], ["mask", "aside", "logits"]])
def test_the_outputs_are_those_of_the_whole(qmodel: kquant.QuantizedModel, names: list[str]) -> None:
    whole, part = qmodel.predict(DATA, verbose=0), kquant.select_outputs(qmodel, names)
    found = part.predict(DATA, verbose=0)
    found = {names[0]: found} if len(names) == 1 else found
    assert list(found) == names
    for name in names:
        np.testing.assert_array_equal(found[name], whole[name])
    report = kquant.verify_tflite(part, kquant.export_tflite(part).content, DATA, samples=8)
    assert report.ok


def test_nothing_else_is_computed(qmodel: kquant.QuantizedModel, tmp_path) -> None:
    part = kquant.select_outputs(qmodel, "mask")
    assert "only" in qmodel.quantized_layers and "only" not in part.quantized_layers and "only" not in part.report
    file = kquant.export_tflite(part)
    assert "only" not in {row.node for row in file.rows}
    assert kquant.TFLiteModel(file.content).outputs[0]["shape_signature"].tolist() == [-1, 6, 6]
    part.save(tmp_path / "part.keras")
    loaded = keras.saving.load_model(tmp_path / "part.keras")
    np.testing.assert_array_equal(loaded.predict(DATA, verbose=0), part.predict(DATA, verbose=0))
    assert loaded.report == part.report


def test_names_are_checked(qmodel: kquant.QuantizedModel) -> None:
    for names in ("masks", ["mask", "mask"], []):
        with pytest.raises(kquant.ModelError, match="'logits', 'mask'"):
            kquant.select_outputs(qmodel, names)


def test_what_was_trained_with_a_loss_of_logits_is_deployed_with_its_mask(model: keras.Model) -> None:
    prepared = kquant.prepare_qat(model, DATA, "w8a8", progress=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    prepared.compile("adam", {"logits": loss})
    prepared.fit(DATA, {"logits": RNG.integers(0, 4, (24, 6, 6))}, epochs=1, verbose=0)
    deployed = kquant.select_outputs(prepared, "mask")
    whole = prepared.predict(DATA, verbose=0)
    np.testing.assert_array_equal(deployed.predict(DATA, verbose=0), whole["mask"])
    file = kquant.export_tflite(deployed, allow_float=False)
    np.testing.assert_array_equal(kquant.TFLiteModel(file.content, "reference").predict(DATA)[0], whole["mask"])
