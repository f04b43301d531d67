"""Segmentation and detection from the files: scores near float, only integers, parity at every tensor."""

from functools import cache
from typing import Any

import keras
import numpy as np
import pytest

import kquant
from experiments import scenes, scenes_training
from kquant.targets.litert.flatbuffer import only_integer_ops
from models import camvid
from models.mobilenet_v2_backbone import with_batch_norm


@cache
def float_score(task: str) -> float:
    return scenes.score(task, scenes.float_model(task).predict_on_batch, camvid.load("test"))


WIDE_BOXES = {"preset": "w8a8", "rules": [{"name": "^boxes", "activations": {"bits": 16}}]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "config", "drop"),
    [
        ("segmentation", "w8a8", 0.5),
        ("segmentation", "w4a8", 1.5),
        # 13.25 to 13.58 of 13.76, whatever the boxes' bits: other roundings of the same config differ by that much
        ("detection", WIDE_BOXES, 1.0),
        ("detection", "w4a8", 1.5),
    ],
)
def test_files_keep_the_score_of_the_float_model(task: str, config: Any, drop: float) -> None:
    data, test = scenes.calibration(), camvid.load("test")
    qmodel = kquant.quantize_model(scenes.float_model(task), data, config, progress=False)
    content = kquant.export_tflite(qmodel, allow_float=False).content
    assert scenes.file_score(task, content, test) >= float_score(task) - drop
    if config != "w4a8":
        report = kquant.verify_tflite(qmodel, content, test.inputs[:8], samples=8)
        assert report.ok and report.reference_max_lsb == 0
        assert len(report.end_to_end) == (2 if task == "detection" else 1)
        types = [output["dtype"] for output in kquant.TFLiteModel(content).outputs]
        assert types == ([np.int16, np.int8] if task == "detection" else [np.int32])


@pytest.mark.slow
def test_the_models_that_come_along_are_those_of_their_recipes() -> None:
    images = camvid.load("train", 8).inputs
    for recipe in scenes.TASKS.values():
        model = recipe.load()
        built = recipe.build()
        made = with_batch_norm(built, images)
        assert [layer.name for layer in model.layers[1:]] == [layer.name for layer in made.layers[1:]]
        assert [v.shape for v in model.variables] == [v.shape for v in made.variables]
        assert recipe.path.stat().st_size <= 3e6
        outputs = zip(*(keras.tree.flatten(m.predict_on_batch(images)) for m in (built, made)), strict=True)
        for wanted, found in outputs:
            assert np.mean(np.abs(found - wanted) <= 1e-3 * max(1, np.abs(wanted).max())) > 0.999


@pytest.mark.slow
@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("name", scenes.TASKS)
def test_training_takes_names_of_outputs_and_deploys_what_is_needed(name: str) -> None:
    """Two steps: the losses find their outputs, and the file returns what is deployed."""
    recipe = scenes.TASKS[name]
    source = recipe.load()
    data = camvid.load("train", 16)
    qat = kquant.prepare_qat(source, data.inputs, "w4a8", progress=False)
    before = [np.array(w) for w in qat.get_weights()]
    recipe.fit(qat, 1, limit=16)
    assert any(not np.array_equal(a, b) for a, b in zip(before, qat.get_weights(), strict=True))
    deployed = scenes_training.in_integers(name, qat)
    content = kquant.export_tflite(deployed, allow_float=False).content
    assert only_integer_ops(content)
    outputs = kquant.TFLiteModel(content).outputs
    assert len(outputs) == (1 if name in scenes_training.KEPT else 2)
    assert kquant.verify_tflite(deployed, content, data.inputs[:4], samples=4).ok
