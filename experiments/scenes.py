"""Segmentation and detection of street scenes: the white paper's table 6 beyond classification.

Masks are scored by mean IoU, boxes by mAP (IoU 0.5:0.95), on the 233 test scenes and from the files; calibration reads
100 training scenes. With `--files=DIR` the float files and the calibration scenes are left there for
`experiments/peers/aeq_files.py`, whose results are scored where they are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kquant
from kquant.errors import KQuantError
from kquant.targets.litert.flatbuffer import only_integer_ops
from models import camvid, camvid_detector, camvid_segmenter

from . import zoo
from .tables import OneTable, Options, converted_with

CALIBRATED = 100  # training scenes
WAYS = {"per channel": "", "per tensor": "-per_tensor"}  # how weights have scales -> suffix of a preset
PEERS = {"w8a8": "static_wi8_ai8", "w4a8": "static_wi4_ai8"}  # preset -> what aeq_files.py calls it
PARITY = 8  # scenes


@dataclass(frozen=True)
class Task:
    """A model and how it is scored.

    Attributes:
        load: the float model, as it is deployed.
        metric: of the labels and outputs.
        labels: scenes -> labels.
    """

    load: Callable[[], keras.Model]
    metric: kquant.OutputMetric
    labels: Callable[[camvid.Scenes], np.ndarray]


def _segmenter() -> keras.Model:
    return camvid_segmenter.deployed(keras.saving.load_model(camvid_segmenter.PATH, compile=False))


def _detector() -> keras.Model:
    return keras.saving.load_model(camvid_detector.PATH, compile=False)


TASKS = {
    "segmentation": Task(_segmenter, camvid_segmenter.metric(), lambda scenes: scenes.masks),
    "detection": Task(_detector, camvid_detector.metric(), lambda scenes: scenes.boxes),
}


def calibration() -> np.ndarray:
    """Training scenes, spread evenly: [100, 180, 240, 3]."""
    scenes = camvid.load("train")
    return scenes.inputs[np.linspace(0, len(scenes) - 1, CALIBRATED).astype(int)]


def score(task: Task, predict: Callable[[np.ndarray], Any], scenes: camvid.Scenes) -> float:
    """The metric of a model on some scenes."""
    return task.metric(task.labels(scenes), camvid.predictions(predict, scenes))


def file_score(task: Task, content: bytes, scenes: camvid.Scenes) -> float:
    """The metric of a file on LiteRT."""
    model = kquant.TFLiteModel(content, threads=zoo.cpus() if only_integer_ops(content) else 1)
    return score(task, lambda x: model.predict(x, batch_size=len(x)), scenes)


def rows(_: str, options: Options) -> Iterator[Sequence[Any]]:
    """Every setting of both tasks that the options want: kquant's files, the converter's, ai-edge-quantizer's."""
    scenes = camvid.load("test", options.samples)
    for name, task in TASKS.items():
        model = task.load()
        expected = score(task, model.predict_on_batch, scenes)
        for way, suffix in WAYS.items():
            for data in ("data", "no data"):
                for config in options.configs:
                    if options.wants(f"{name}, {way}, {data}"):
                        found = _ours(task, model, f"{config}{suffix}", data == "data", scenes)
                        yield name, f"{way}, {data}", config, len(scenes), expected, *found
        for config in options.configs:
            if options.wants(f"{name}, converter") and config == "w8a8":
                for way in WAYS:
                    content = converted_with(model, [calibration()], per_channel=way == "per channel")
                    cells = _of_peer(task, content, scenes)
                    yield name, f"converter, {way}", config, len(scenes), expected, *cells
            if options.wants(f"{name}, ai-edge-quantizer") and options.files is not None and config in PEERS:
                yield from _theirs(name, task, model, config, scenes, expected, options.files)


def _ours(task: Task, model: keras.Model, config: str, data: bool, scenes: camvid.Scenes) -> Sequence[Any]:
    """Score, bytes, whether all is in integers, and the contract of a file of ours."""
    try:
        qmodel = kquant.quantize_model(model, calibration() if data else None, config, progress=False)
    except KQuantError as error:
        return f"refused: {str(error).splitlines()[0][:80]}", "-", "-", "-"
    content = kquant.export_tflite(qmodel).content
    report = kquant.verify_tflite(qmodel, content, scenes.inputs[:PARITY], samples=PARITY)
    integer = "yes" if only_integer_ops(content) else "no"
    return file_score(task, content, scenes), len(content), integer, "holds" if report.ok else "FAILS"


def _theirs(
    name: str, task: Task, model: keras.Model, config: str, scenes: camvid.Scenes, expected: float, folder: Path
) -> Iterator[Sequence[Any]]:
    """What ai-edge-quantizer made of the float file, where it has run; the file is left for it where it has not."""
    source, made = folder / f"{name}.tflite", folder / f"{name}.{PEERS[config]}.tflite"
    if not source.exists():
        source.write_bytes(float_file(model))
        np.savez(folder / f"{name}.npz", x=calibration())
    if made.exists():
        cells = _of_peer(task, made.read_bytes(), scenes)
        yield name, "ai-edge-quantizer, per channel", config, len(scenes), expected, *cells


def _of_peer(task: Task, content: bytes, scenes: camvid.Scenes) -> Sequence[Any]:
    """The cells of a file that another tool made."""
    return file_score(task, content, scenes), len(content), "yes" if only_integer_ops(content) else "no", "-"


def float_file(model: keras.Model) -> bytes:
    """TensorFlow's float file of a model, for batches of one."""
    import tensorflow as tf

    shape = (1, camvid.HEIGHT, camvid.WIDTH, 3)

    @tf.function(input_signature=[tf.TensorSpec(shape, name="image")])
    def run(image: Any) -> Any:
        return model(image, training=False)

    return tf.lite.TFLiteConverter.from_concrete_functions([run.get_concrete_function()], model).convert()


TABLES = {
    "scenes": OneTable(
        rows,
        ("task", "setting", "config", "frames", "float", ".tflite", "bytes", "integer only", "contract"),
        ("task", "setting", "config"),
    )
}
