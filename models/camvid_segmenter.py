r"""Segmentation of street scenes in the manner of DeepLabV3+ (arXiv 1802.02611): a depthwise network for CamVid.

python -m models.camvid_segmenter --output=models/camvid_segmenter.keras

trains it anew on the training scenes of the evaluation data (KQUANT_DATA). The file holds weights trained on CamVid,
whose terms are CC BY-NC.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

import kquant

from . import camvid
from .camvid_training import BATCH_SIZE, Recipe
from .mobilenet_v2_backbone import convolution, features, separable

Labels = dict[str, np.ndarray]
RATES = (2, 4)  # of the atrous pyramid, on features of 12 x 15


def _pyramid(x: Any) -> Any:
    """Features [n, h, w, c] as seen from near, from afar and from everywhere: [n, h, w, 96]."""
    height, width = x.shape[1:3]
    whole = convolution(layers.GlobalAveragePooling2D(keepdims=True, name="average")(x), 48, "whole")
    whole = layers.UpSampling2D((height, width), name="everywhere")(whole)
    seen = [convolution(x, 48, "near"), *(separable(x, 48, f"atrous{rate}", rate=rate) for rate in RATES), whole]
    return convolution(layers.Concatenate(name="pyramid")(seen), 96, "gather")


def build() -> keras.Model:
    """Images [n, 180, 240, 3] in -1..1 -> {"logits": [n, 180, 240, 11], "mask": their classes [n, 180, 240] int32}.

    A loss reads the logits; what is deployed returns the mask alone.

    Raises:
        MissingData: the evaluation data with the backbone is not there.
    """
    inputs = keras.Input((camvid.HEIGHT, camvid.WIDTH, 3), name="image")
    seen = features(inputs)
    fine = convolution(seen[4], 24, "fine")
    coarse = layers.Resizing(*fine.shape[1:3], interpolation="bilinear", name="coarse")(_pyramid(seen[16]))
    x = layers.Concatenate(name="both")([coarse, fine])
    x = separable(separable(x, 64, "decode1"), 64, "decode2")
    x = layers.Conv2D(len(camvid.CLASSES), 1, name="classes")(x)
    logits = layers.Resizing(camvid.HEIGHT, camvid.WIDTH, interpolation="bilinear", name="logits")(x)
    outputs = {"logits": logits, "mask": keras.ops.argmax(logits, -1)}
    return keras.Model(inputs, outputs, name="camvid_segmenter")


def deployed(model: keras.Model) -> keras.Model:
    """The float network with the mask as its only output; `kquant.select_outputs` does it for a quantized one."""
    return keras.Model(model.input, model.output["mask"], name=model.name)


def class_weights(masks: np.ndarray) -> np.ndarray:
    """What an error costs, by class [12]: rare ones more, by the root of their frequency; void nothing."""
    counts = np.maximum(np.bincount(masks.ravel(), minlength=camvid.VOID + 1)[: camvid.VOID], 1)
    weights = np.sqrt(counts.max() / counts)
    return np.append(weights / np.average(weights, weights=counts), 0.0).astype(np.float32)


def batches(epochs: int, seed: int, limit: int | None = None) -> Iterator[tuple[np.ndarray, Labels, Labels]]:
    """Training batches (images, classes, weights) of the augmented training scenes; void is class 0 of no weight."""
    scenes = camvid.load("train", limit)
    weights = class_weights(scenes.masks)
    for images, masks in camvid.batches(scenes, lambda masks: masks, BATCH_SIZE, epochs, seed):
        yield images, {"logits": np.where(masks == camvid.VOID, 0, masks)}, {"logits": weights[masks]}


def metric() -> kquant.OutputMetric:
    """Mean IoU of the eleven classes."""
    return kquant.mean_iou(len(camvid.CLASSES))


RECIPE = Recipe(
    path=Path(__file__).with_suffix(".keras"),
    build=build,
    deployed=deployed,
    losses={"logits": keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
    batches=batches,
    metrics=(metric(),),
    labels=lambda scenes: scenes.masks,
    epochs=50,
)

if __name__ == "__main__":
    RECIPE.run()
