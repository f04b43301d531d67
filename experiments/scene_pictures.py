r"""docs/scenes.png: masks of some test scenes, by the float network and by files.

python -m experiments.scene_pictures --output=docs/scenes.png

Only these masks are drawn: scenes and labels are not the project's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags
from PIL import Image, ImageDraw

import kquant
from kquant.diagnosis.drawing import COVER, colour
from models import camvid

from .scenes import calibration, float_model

OUTPUT = flags.DEFINE_string("output", "docs/scenes.png", "The file to write.")
SCENES = (20, 90, 160)  # of the test scenes
MARGIN, HEADING = 6, 16
CONFIGS = ("w8a8", "w4a8", "w4a4")


def main(argv: list[str]) -> None:
    """Quantize, run, draw."""
    scenes, model = camvid.load("test"), float_model("segmentation")
    inputs = scenes.inputs[list(SCENES)]
    columns = {"float": np.asarray(model.predict_on_batch(inputs))}
    for config in CONFIGS:
        qmodel = kquant.quantize_model(model, calibration(), config, progress=False)
        file = kquant.TFLiteModel(kquant.export_tflite(qmodel).content)
        columns[config] = file.predict(inputs)[0]
    page(columns).save(OUTPUT.value, optimize=True)


def page(columns: dict[str, Any]) -> Image.Image:
    """A grid of masks: one column for each who made them, its name above."""
    height, width = camvid.HEIGHT + MARGIN, camvid.WIDTH + MARGIN
    rows = len(SCENES)
    paper = Image.new("RGB", (len(columns) * width - MARGIN, HEADING + rows * height - MARGIN), "white")
    pen = ImageDraw.Draw(paper)
    for k, (name, masks) in enumerate(columns.items()):
        pen.text((k * width, 2), name, fill="black")
        for row, mask in enumerate(masks):
            paper.paste(Image.fromarray(painted(mask)), (k * width, HEADING + row * height))
    return paper.quantize(32)


def painted(mask: np.ndarray, shade: Callable[[int], tuple[int, int, int]] = colour) -> np.ndarray:
    """Classes [h, w] in their colours on white."""
    colours = np.array([shade(k) for k in range(len(camvid.CLASSES))])
    return np.rint((COVER * colours + (1 - COVER) * 255)[mask]).astype(np.uint8)


if __name__ == "__main__":
    app.run(main)
