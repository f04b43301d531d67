"""Segmentation and detection of street scenes: the white paper's table 6 beyond classification.

Masks are scored by mean IoU, boxes by mAP (IoU 0.5:0.95), on the 233 test scenes and from the files; calibration reads
100 training scenes. With `--files=DIR` the float files and the calibration scenes are left there for
`experiments/peers/aeq_files.py`, whose results are scored where they are found.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
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
PEERS = {"w8a8": "static_wi8_ai8", "w4a8": "static_wi4_ai8"}  # preset -> what aeq_files.py calls it
PARITY = 8  # scenes
Cells = Sequence[Any]
Setting = Callable[[str, keras.Model, str, camvid.Scenes, Options], Cells | None]


TASKS = {"segmentation": camvid_segmenter.RECIPE, "detection": camvid_detector.RECIPE}


def float_model(name: str) -> keras.Model:
    """The float model of a task, as it is deployed."""
    return TASKS[name].deployed(TASKS[name].load())


def for_peers(name: str) -> keras.Model:
    """The same as TensorFlow's converter takes it.

    With TensorFlow's argmax: that of Keras becomes operations on bits, which no TFLite file has.
    """
    import tensorflow as tf

    model = TASKS[name].load()
    if "logits" not in model.output:
        return model
    mask = keras.layers.Lambda(lambda y: tf.argmax(y, -1, output_type=tf.int32), dtype="int32", name="mask")
    return keras.Model(model.input, mask(model.output["logits"]), name=model.name)


def calibration() -> np.ndarray:
    """Training scenes, spread evenly: [100, 180, 240, 3]."""
    scenes = camvid.load("train")
    return scenes.inputs[np.linspace(0, len(scenes) - 1, CALIBRATED).astype(int)]


def score(name: str, predict: Callable[[np.ndarray], Any], scenes: camvid.Scenes) -> float:
    """The metric of a task's model on some scenes."""
    task = TASKS[name]
    return task.metrics[0](task.labels(scenes), camvid.predictions(predict, scenes))


def file_score(name: str, content: bytes, scenes: camvid.Scenes) -> float:
    """The metric of a task's file on LiteRT."""
    model = kquant.TFLiteModel(content, threads=zoo.cpus() if only_integer_ops(content) else 1)
    return score(name, lambda x: model.predict(x, batch_size=len(x)), scenes)


def rows(_: str, options: Options) -> Iterator[Sequence[Any]]:
    """Every setting of both tasks that the options want: kquant's files, the converter's, ai-edge-quantizer's."""
    scenes = camvid.load("test", options.samples)
    for name in TASKS:
        wanted = [setting for setting in SETTINGS if options.wants(f"{name}, {setting}")]
        if not wanted:
            continue
        model = float_model(name)
        expected = score(name, model.predict_on_batch, scenes)
        for setting in wanted:
            for config in options.configs:
                cells = SETTINGS[setting](name, model, config, scenes, options)
                if cells is not None:
                    yield name, setting, config, len(scenes), expected, *cells


def _ours(suffix: str, data: bool) -> Setting:
    """Score, bytes, whether all is in integers, and the contract of a file of ours."""

    def cells(name: str, model: keras.Model, config: str, scenes: camvid.Scenes, _: Options) -> Cells:
        try:
            qmodel = kquant.quantize_model(model, calibration() if data else None, config + suffix, progress=False)
        except KQuantError as error:
            return f"refused: {str(error).splitlines()[0][:80]}", "-", "-", "-"
        content = kquant.export_tflite(qmodel).content
        report = kquant.verify_tflite(qmodel, content, scenes.inputs[:PARITY], samples=PARITY)
        return *_of_file(name, content, scenes), "holds" if report.ok else "FAILS"

    return cells


def _converter(per_channel: bool) -> Setting:
    """TensorFlow's converter, at 8 bits."""

    def cells(name: str, model: keras.Model, config: str, scenes: camvid.Scenes, _: Options) -> Cells | None:
        if config != "w8a8":
            return None
        return *_of_file(name, converted_with(for_peers(name), [calibration()], per_channel), scenes), "-"

    return cells


def _ai_edge(name: str, model: keras.Model, config: str, scenes: camvid.Scenes, options: Options) -> Cells | None:
    """What ai-edge-quantizer made of the float file, where it has run; that file is left for it where it has not."""
    if options.files is None or config not in PEERS:
        return None
    source, made = options.files / f"{name}.tflite", options.files / f"{name}.{PEERS[config]}.tflite"
    if not source.exists():
        source.write_bytes(float_file(for_peers(name)))
        np.savez(options.files / f"{name}.npz", x=calibration())
    return (*_of_file(name, made.read_bytes(), scenes), "-") if made.exists() else None


def _of_file(name: str, content: bytes, scenes: camvid.Scenes) -> Cells:
    """Score, bytes, and whether all is in integers."""
    return file_score(name, content, scenes), len(content), "yes" if only_integer_ops(content) else "no"


SETTINGS: dict[str, Setting] = {
    "per channel, data": _ours("", True),
    "per tensor, data": _ours("-per_tensor", True),
    "per channel, no data": _ours("", False),
    "per tensor, no data": _ours("-per_tensor", False),
    "converter, per channel": _converter(True),
    "converter, per tensor": _converter(False),
    "ai-edge-quantizer, per channel": _ai_edge,
}


def float_file(model: keras.Model) -> bytes:
    """TensorFlow's float file of a model."""
    import tensorflow as tf

    with contextlib.redirect_stdout(io.StringIO()):
        return tf.lite.TFLiteConverter.from_keras_model(model).convert()


TABLES = {
    "scenes": OneTable(
        rows,
        ("task", "setting", "config", "frames", "float", ".tflite", "bytes", "integer only", "contract"),
        ("task", "setting", "config"),
    )
}
