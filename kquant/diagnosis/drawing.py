"""Drawing what outputs say into an image."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

Array = np.ndarray[Any, Any]
Draw = Callable[[Array, Sequence[Array]], Array]  # image [h, w, 3] uint8, outputs of one sample -> [h', w', 3] uint8
COVER = 0.55  # of the image by the colour of a class
PLAUSIBLE = 0.3  # score of the boxes that are drawn


def draw_mask(image: Array, outputs: Sequence[Array]) -> Array:
    """An image under the colours of its classes.

    Args:
        image: [h, w, 3] uint8.
        outputs: of one sample; the first holds classes [h', w'], or scores by class [h', w', classes].

    Returns:
        [h', w', 3] uint8.
    """
    mask = np.asarray(outputs[0])
    classes = np.argmax(mask, -1) if mask.ndim == 3 else mask
    colours = np.array([colour(k) for k in range(int(classes.max()) + 1)], np.float32)
    painted = COVER * colours[np.maximum(classes, 0)] + (1 - COVER) * resized(image, *classes.shape)
    return np.rint(painted).astype(np.uint8)


def draw_boxes(image: Array, boxes: Array) -> Array:
    """An image with its boxes [k, 6] (left, top, right, bottom, class, score), as far as they are plausible."""
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    for left, top, right, bottom, kind, score in np.asarray(boxes, np.float64).reshape(-1, 6):
        if score >= PLAUSIBLE:
            pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour(int(kind)), width=2)
    return np.asarray(canvas)


def colour(number: int) -> tuple[int, int, int]:
    """The colour of a class: hues by the golden ratio; after 5, 8 or 13 they are near again, and another shade."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.85, (1.0, 0.75, 0.5)[number // 5 % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def resized(image: Array, height: int, width: int) -> Array:
    """An image [h, w, 3] uint8 in another size."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR))
