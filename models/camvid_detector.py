r"""A single-shot detector without anchors in the manner of FCOS (arXiv 1904.01355): cars and people of CamVid.

python -m models.camvid_detector --output=models/camvid_detector.keras

trains it anew on the training scenes of the evaluation data (KQUANT_DATA). The file holds weights trained on CamVid,
whose terms are CC BY-NC.

The network gives two outputs for the 918 places of its three levels: logarithms of the distances to the sides of a box,
and logits of the classes. `decode` makes boxes of them, outside of the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import kquant

from . import camvid
from .camvid_training import BATCH_SIZE, Recipe
from .mobilenet_v2_backbone import convolution, features, separable

STRIDES = (8, 16, 32)
FARTHEST = (36.0, 80.0, np.inf)  # pixels from a place to the farthest side of its box, at most, by level
RADIUS = 1.5  # strides from a box's centre within which places are its own
PRIOR = 0.01  # probability of a class before training
SCORE, OVERLAP, KEPT = 0.05, 0.6, 100  # of `decode`: least score, IoU of two boxes of a class, boxes of an image

Array = np.ndarray[Any, Any]


def _pyramid(seen: dict[int, Any]) -> list[Any]:
    """Features of 64 channels at each stride."""
    coarse = convolution(seen[16], 64, "lateral16")
    fine = convolution(seen[8], 64, "lateral8")
    above = layers.Resizing(*fine.shape[1:3], interpolation="nearest", name="above")(coarse)
    fine = separable(layers.Add(name="merge8")([fine, above]), 64, "level8")
    return [fine, coarse, separable(coarse, 64, "level32", stride=2)]


def build() -> keras.Model:
    """Images [n, 180, 240, 3] in -1..1 -> {"boxes": [n, 918, 4], "scores": [n, 918, 3]}.

    Raises:
        MissingData: the evaluation data with the backbone is not there.
    """
    inputs = keras.Input((camvid.HEIGHT, camvid.WIDTH, 3), name="image")
    boxes, scores = [], []
    for stride, x in zip(STRIDES, _pyramid(features(inputs)), strict=True):
        x = separable(x, 64, f"head{stride}")
        bias = keras.initializers.Constant(float(-np.log((1 - PRIOR) / PRIOR)))
        score = separable(x, 64, f"score{stride}")
        score = layers.Conv2D(len(camvid.THINGS), 1, bias_initializer=bias, name=f"scores{stride}")(score)
        box = layers.Conv2D(4, 1, name=f"boxes{stride}")(separable(x, 64, f"box{stride}"))
        scores.append(layers.Reshape((-1, len(camvid.THINGS)), name=f"scores{stride}_flat")(score))
        boxes.append(layers.Reshape((-1, 4), name=f"boxes{stride}_flat")(box))
    outputs = {
        "boxes": layers.Concatenate(axis=1, name="boxes")(boxes),
        "scores": layers.Concatenate(axis=1, name="scores")(scores),
    }
    return keras.Model(inputs, outputs, name="camvid_detector")


def places() -> tuple[Array, Array]:
    """Centres [918, 2] (x, y) in pixels of all places, and the strides [918] of their levels."""
    centres, strides = [], []
    for stride in STRIDES:
        y, x = (np.arange(-(-size // stride)) * stride + stride / 2 for size in (camvid.HEIGHT, camvid.WIDTH))
        grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
        centres.append(grid)
        strides.append(np.full(len(grid), stride))
    return np.concatenate(centres).astype(np.float32), np.concatenate(strides).astype(np.float32)


def targets(masks: Array) -> dict[str, Array]:
    """What the outputs should be.

    Args:
        masks: [n, h, w] of classes.

    Returns:
        "boxes": [n, 918, 5], distances to left, top, right and bottom in strides, and 1 where there is an object.
        "scores": [n, 918, 4], one-hot classes, and 0 where what is there does not count (void, tiny things), else 1.
    """
    centres, strides = places()
    nearest = np.minimum(centres[:, ::-1].astype(int), (camvid.HEIGHT - 1, camvid.WIDTH - 1))
    boxes = np.zeros((len(masks), len(centres), 5), np.float32)
    scores = np.zeros((len(masks), len(centres), len(camvid.THINGS) + 1), np.float32)
    for k, mask in enumerate(masks):
        scores[k, :, -1] = mask[nearest[:, 0], nearest[:, 1]] != camvid.VOID
        for box in camvid.boxes_of(mask):  # largest first, so that smaller ones in front of them win
            if box[4] >= 0:
                _claim(box, centres, strides, boxes[k], scores[k])
    return {"boxes": boxes, "scores": scores}


def _claim(box: Array, centres: Array, strides: Array, boxes: Array, scores: Array) -> None:
    """Write one box of `camvid.boxes_of` into the targets of its places."""
    distances = np.concatenate([centres - box[:2], box[2:4] - centres], -1)
    inside = distances.min(-1) > 0
    if box[5]:
        scores[inside, -1] = 0
        return
    near = np.abs(centres - (box[:2] + box[2:4]) / 2).max(-1) < RADIUS * strides
    farthest = distances.max(-1)
    lower = dict(zip(STRIDES, (0.0, *FARTHEST), strict=False))
    upper = dict(zip(STRIDES, FARTHEST, strict=True))
    level = np.array([lower[int(s)] < d <= upper[int(s)] for s, d in zip(strides, farthest, strict=True)])
    own = inside & near & level
    boxes[own, :4] = distances[own] / strides[own, None]
    boxes[own, 4] = 1
    scores[own] = (*(np.arange(len(camvid.THINGS)) == box[4]), 1)


@keras.saving.register_keras_serializable("kquant_models")
def score_loss(target: Any, logits: Any) -> Any:
    """Focal loss (arXiv 1708.02002, alpha 0.25, gamma 2) of the places that count, by the number of objects' places."""
    wanted, counts = target[..., :-1], target[..., -1:]
    probability = tf.sigmoid(logits)
    error = tf.abs(wanted - probability)
    balance = 0.25 * wanted + 0.75 * (1 - wanted)
    entropy = tf.nn.sigmoid_cross_entropy_with_logits(wanted, logits)
    return tf.reduce_sum(counts * balance * error**2 * entropy) / tf.maximum(tf.reduce_sum(wanted), 1.0)


@keras.saving.register_keras_serializable("kquant_models")
def box_loss(target: Any, logarithms: Any) -> Any:
    """1 - generalized IoU (arXiv 1902.09630) of boxes that share a place, over the objects' places."""
    wanted, objects = tf.maximum(target[..., :4], 1e-3), target[..., 4]
    found = tf.exp(tf.clip_by_value(logarithms, -6.0, 4.0))
    least, most = tf.minimum(wanted, found), tf.maximum(wanted, found)
    both, whole = _area(least), _area(most)
    union = _area(wanted) + _area(found) - both
    loss = 1 - both / union + (whole - union) / whole
    return tf.reduce_sum(objects * loss) / tf.maximum(tf.reduce_sum(objects), 1.0)


def _area(distances: Any) -> Any:
    left, top, right, bottom = tf.unstack(distances, axis=-1)
    return (left + right) * (top + bottom)


def decode(outputs: Sequence[Array]) -> list[Array]:
    """Boxes of the network's outputs, without those that overlap a better one of their class.

    Args:
        outputs: boxes [n, 918, 4] and scores [n, 918, 3].

    Returns:
        For each image [k, 6]: left, top, right, bottom in pixels, the class's number in `camvid.THINGS`, the score.
    """
    logarithms, logits = (np.asarray(y, np.float32) for y in outputs)
    centres, strides = places()
    distances = np.exp(np.clip(logarithms, -6, 4)) * strides[:, None]
    corners = np.concatenate([centres - distances[..., :2], centres + distances[..., 2:]], -1)
    corners = np.clip(corners, 0, (camvid.WIDTH, camvid.HEIGHT) * 2)
    shared = np.broadcast_to(corners[:, :, None], (*corners.shape[:2], 1, 4))
    found = tf.image.combined_non_max_suppression(
        shared, tf.sigmoid(logits), KEPT, KEPT, OVERLAP, SCORE, clip_boxes=False
    )
    boxes, scores, classes, counts = (np.asarray(part) for part in found)
    rows = np.concatenate([boxes, classes[..., None], scores[..., None]], -1)
    return [row[:count] for row, count in zip(rows, counts, strict=True)]


def metric(iou: float | None = None) -> kquant.OutputMetric:
    """mAP at IoU 0.5:0.95, or at one threshold."""
    return kquant.mean_average_precision(len(camvid.THINGS), decode, iou=iou)


def batches(epochs: int, seed: int, limit: int | None = None) -> Iterator[tuple[Array, dict[str, Array]]]:
    """Training batches (images, targets) of the augmented training scenes."""
    return camvid.batches(camvid.load("train", limit), targets, BATCH_SIZE, epochs, seed)


RECIPE = Recipe(
    path=Path(__file__).with_suffix(".keras"),
    build=build,
    deployed=lambda model: model,
    losses={"boxes": box_loss, "scores": score_loss},
    batches=batches,
    metrics=(metric(), metric(0.5)),
    labels=lambda scenes: scenes.boxes,
    epochs=40,
    clipnorm=5.0,
)

if __name__ == "__main__":
    RECIPE.run()
