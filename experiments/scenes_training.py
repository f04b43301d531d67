"""Segmentation and detection of street scenes trained with quantization, against the float model trained alike.

Both go on from the float model with its own recipe and losses; what is scored is the exported file, on all test scenes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

import kquant
from models import camvid, camvid_detector, camvid_segmenter

from .paper_tables import spread
from .scenes import PARITY, TASKS, calibration, file_score, score
from .tables import OneTable, Options

LEARNING_RATE = 2e-4
RECIPES = {"segmentation": camvid_segmenter, "detection": camvid_detector}
KEPT = {"segmentation": "mask"}  # the only output of what is deployed


def rows(_: str, options: Options) -> Iterator[Sequence[Any]]:
    """For each task a row of the float model trained on, and one of every config."""
    scenes = camvid.load("test", options.samples)
    for name, recipe in RECIPES.items():
        if not options.wants(name):
            continue
        source = keras.saving.load_model(recipe.PATH, compile=False)
        before = score(TASKS[name], _deployed(name, source).predict_on_batch, scenes)
        floats, seconds = [], 0.0
        for seed in range(options.seeds):
            model = keras.models.clone_model(source)
            model.set_weights(source.get_weights())
            seconds = _fit(recipe, model, options.epochs, seed)
            floats.append(score(TASKS[name], _deployed(name, model).predict_on_batch, scenes))
        yield name, "float", options.epochs, len(scenes), before, spread(floats), 0.0, "-", f"{seconds:.0f}"
        for config in options.configs:
            yield _trained(name, source, config, options, scenes, floats)


def _trained(
    name: str,
    source: keras.Model,
    config: str,
    options: Options,
    scenes: camvid.Scenes,
    floats: Sequence[float],
) -> Sequence[Any]:
    """The row of a config: scores before and after training, and the contract of the last file."""
    begun, ended, seconds, ok = [], [], 0.0, True
    for seed in range(options.seeds):
        model = kquant.prepare_qat(source, calibration(), config, seed=seed, progress=False)
        begun.append(_file_score(name, model, scenes))
        seconds = _fit(RECIPES[name], model, options.epochs, seed)
        ended.append(_file_score(name, model, scenes))
        whole = _integer(name, model)
        content = kquant.export_tflite(whole, allow_float=False).content
        ok = ok and kquant.verify_tflite(whole, content, scenes.inputs[:PARITY], samples=PARITY).ok
    difference = float(np.mean(ended) - np.mean(floats))
    contract = "holds" if ok else "FAILS"
    return (
        *(name, config, options.epochs, len(scenes), spread(begun)),
        *(spread(ended), difference, contract, f"{seconds:.0f}"),
    )


def _fit(recipe: Any, model: keras.Model, epochs: int, seed: int) -> float:
    """Train in place; the seconds of an epoch."""
    keras.utils.set_random_seed(seed)
    started = time.perf_counter()
    recipe.fit(model, epochs, learning_rate=LEARNING_RATE, seed=seed)
    return (time.perf_counter() - started) / epochs


def _deployed(name: str, model: keras.Model) -> keras.Model:
    return camvid_segmenter.deployed(model) if name in KEPT else model


def _integer(name: str, model: kquant.QuantizedModel) -> kquant.QuantizedModel:
    return kquant.select_outputs(model, KEPT[name]) if name in KEPT else model


def _file_score(name: str, model: kquant.QuantizedModel, scenes: camvid.Scenes) -> float:
    content = kquant.export_tflite(_integer(name, model), allow_float=False).content
    return file_score(TASKS[name], content, scenes)


TABLES = {
    "scenes_training": OneTable(
        rows,
        ("task", "variant", "epochs", "frames", "before", "after", "difference", "contract", "s per epoch"),
        ("task", "variant"),
    )
}
