"""Segmentation and detection of street scenes trained with quantization, against the float model trained alike.

Both go on from the float model with its own recipe and losses; what is scored is the exported file, on all test scenes.
"Distilled" learns from the float model that comes along, too, where an output has a score for every class.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

import kquant
from models import camvid

from .paper_tables import spread
from .scenes import PARITY, TASKS, calibration, file_score, score
from .tables import OneTable, Options

LEARNING_RATE = 1e-3
KEPT = {"segmentation": "mask"}  # the only output of what is deployed
TAUGHT = {"segmentation": ("logits",)}  # the outputs that learn from the float model
TEMPERATURE, ALPHA = 2.0, 0.7  # of the distillation


def rows(_: str, options: Options) -> Iterator[Sequence[Any]]:
    """For each task a row of the float model trained on, and one of every config."""
    scenes = camvid.load("test", options.samples)
    for name, task in TASKS.items():
        taught = [f"{config}, distilled" for config in options.configs if name in TAUGHT]
        wanted = [v for v in (*options.configs, *taught) if options.wants(f"{name}, {v}")]
        if not wanted:
            continue
        source = task.load()
        before = score(name, task.deployed(source).predict_on_batch, scenes)
        floats, seconds = [], 0.0
        for seed in range(options.seeds):
            model = keras.models.clone_model(source)
            model.set_weights(source.get_weights())
            seconds = _fit(name, model, options.epochs, seed)
            floats.append(score(name, task.deployed(model).predict_on_batch, scenes))
        yield name, "float", options.epochs, len(scenes), before, spread(floats), 0.0, "-", f"{seconds:.0f}"
        for variant in wanted:
            yield _trained(name, source, variant, options, scenes, floats)


def _trained(
    name: str,
    source: keras.Model,
    variant: str,
    options: Options,
    scenes: camvid.Scenes,
    floats: Sequence[float],
) -> Sequence[Any]:
    """The row of a variant: scores before and after training, and the contract of the last file."""
    config, _, distilled = variant.partition(", ")
    begun, ended, seconds, ok = [], [], 0.0, True
    for seed in range(options.seeds):
        model = kquant.prepare_qat(source, calibration(), config, seed=seed, progress=False)
        begun.append(_file_score(name, model, scenes))
        fitted = _learner(name, model, source) if distilled else model
        seconds = _fit(name, fitted, options.epochs, seed)
        ended.append(_file_score(name, model, scenes))
        whole = in_integers(name, model)
        content = kquant.export_tflite(whole, allow_float=False).content
        ok = ok and kquant.verify_tflite(whole, content, scenes.inputs[:PARITY], samples=PARITY).ok
    difference = float(np.mean(ended) - np.mean(floats))
    contract = "holds" if ok else "FAILS"
    return (
        *(name, variant, options.epochs, len(scenes), spread(begun)),
        *(spread(ended), difference, contract, f"{seconds:.0f}"),
    )


def _learner(name: str, model: kquant.QuantizedModel, teacher: keras.Model) -> keras.Model:
    """What is fitted where the float model teaches."""
    return kquant.Distiller(model, teacher, temperature=TEMPERATURE, alpha=ALPHA, outputs=TAUGHT[name])


def _fit(name: str, model: keras.Model, epochs: int, seed: int) -> float:
    """Train in place; the seconds of an epoch."""
    keras.utils.set_random_seed(seed)
    started = time.perf_counter()
    TASKS[name].fit(model, epochs, learning_rate=LEARNING_RATE, seed=seed)
    return (time.perf_counter() - started) / epochs


def in_integers(name: str, model: kquant.QuantizedModel) -> kquant.QuantizedModel:
    """The quantized model of a task with the outputs that are deployed."""
    return kquant.select_outputs(model, KEPT[name]) if name in KEPT else model


def _file_score(name: str, model: kquant.QuantizedModel, scenes: camvid.Scenes) -> float:
    content = kquant.export_tflite(in_integers(name, model), allow_float=False).content
    return file_score(name, content, scenes)


TABLES = {
    "scenes_training": OneTable(
        rows,
        ("task", "variant", "epochs", "frames", "before", "after", "difference", "contract", "s per epoch"),
        ("task", "variant", "epochs"),
    )
}
