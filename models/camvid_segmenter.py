r"""Segmentation of street scenes in the manner of DeepLabV3+ (arXiv 1802.02611): a depthwise network for CamVid.

python -m models.camvid_segmenter --epochs=40 --output=models/camvid_segmenter.keras

trains it anew on the training scenes of the evaluation data (KQUANT_DATA). The file holds weights trained on CamVid,
whose terms are CC BY-NC.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import app, flags
from keras import layers

import kquant
from kquant_tools.recipe import recipe

from . import camvid
from .data import save
from .mobilenet_v2_backbone import convolution, features, separable, with_batch_norm

PATH = Path(__file__).with_suffix(".keras")
SEED = 1
BATCH_SIZE = 8
Labels = dict[str, np.ndarray]
RATES = (2, 4)  # of the atrous pyramid, on features of 12 x 15
LEARNING_RATE = 5e-4


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


def batches(epochs: int, seed: int = SEED, limit: int | None = None) -> Iterator[tuple[np.ndarray, Labels, Labels]]:
    """Training batches (images, classes, weights) of the augmented training scenes; void is class 0 of no weight."""
    scenes = camvid.load("train", limit)
    weights = class_weights(scenes.masks)
    for images, masks in camvid.batches(scenes, lambda masks: masks, BATCH_SIZE, epochs, seed):
        yield images, {"logits": np.where(masks == camvid.VOID, 0, masks)}, {"logits": weights[masks]}


def fit(
    model: keras.Model,
    epochs: int,
    *,
    learning_rate: float = LEARNING_RATE,
    seed: int = SEED,
    limit: int | None = None,
    verbose: int = 0,
) -> None:
    """Train a network in place, in float or quantized: cross-entropy, Adam, cosine to zero after a warm-up.

    Args:
        model: of `build`, or what `kquant.prepare_qat` made of it.
        epochs: passes over the training scenes.
        learning_rate: the highest.
        seed: of the order of the scenes and their changes.
        limit: train on that many scenes only.
        verbose: as in `keras.Model.fit`.
    """
    steps = len(camvid.load("train", limit)) // BATCH_SIZE
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(recipe(epochs * steps, "adam", learning_rate), {"logits": loss}, jit_compile=False)
    model.fit(batches(epochs, seed, limit), steps_per_epoch=steps, epochs=epochs, shuffle=False, verbose=verbose)


def train(epochs: int = 40, verbose: int = 2, seed: int = SEED, limit: int | None = None) -> keras.Model:
    """A network trained from the backbone of ImageNet, at the end with batch normalizations in that.

    Args:
        epochs: passes over the training scenes.
        verbose: as in `keras.Model.fit`.
        seed: of the weights, the order of the scenes and their changes.
        limit: train on that many scenes only.

    Raises:
        MissingData: the evaluation data is not there.
    """
    keras.utils.set_random_seed(seed)
    model = build()
    fit(model, epochs, seed=seed, limit=limit, verbose=verbose)
    return with_batch_norm(model, camvid.load("train", limit).inputs)


def metric() -> kquant.OutputMetric:
    """Mean IoU of the eleven classes."""
    return kquant.mean_iou(len(camvid.CLASSES))


if __name__ == "__main__":
    EPOCHS = flags.DEFINE_integer("epochs", 40, "Passes over the training scenes.", 1)
    OUTPUT = flags.DEFINE_string("output", str(PATH), "The file to write.")
    LIMIT = flags.DEFINE_integer("limit", None, "Train on that many scenes only.", 1)

    def main(argv: list[str]) -> None:
        """Train, print the mean IoU of the scored scenes, write the model."""
        model = train(EPOCHS.value, limit=LIMIT.value)
        save(model, OUTPUT.value)
        scenes = camvid.load("test")
        score = metric()(scenes.masks, camvid.predictions(deployed(model).predict_on_batch, scenes))
        size = Path(OUTPUT.value).stat().st_size
        print(f"{model.count_params():,} parameters, mean IoU {score:.2f} %, {size:,} bytes")

    app.run(main)
