"""Pictures of what a network sees: masks and boxes of the float network beside those of the quantized one."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from kquant.diagnosis.drawing import Draw, draw_mask, resized
from kquant.diagnosis.metrics import Metric
from kquant.diagnosis.records import Picture
from kquant.diagnosis.samples import Samples, predict

Array = np.ndarray[Any, Any]
SHOWN = 4  # pictures in a report
LOOKED_AT = 48  # samples that they are chosen of: where the two differ most
LEAST = 16  # pixels of a side of what is taken for an image
DIFFERENT = (230, 20, 60)
LARGEST = 480  # pixels of the longer side of what is written


def pictures(metric: Metric, model: Any) -> tuple[Picture, ...]:
    """The samples whose pictures differ most between the float network and another.

    Args:
        metric: with the samples and the float network's outputs; its `OutputMetric` may know how to draw.
        model: the quantized Keras model or `TFLiteModel`.

    Returns:
        Up to four, worst first; none where the inputs are no images or nothing draws the outputs.
    """
    samples = metric.samples.first(LOOKED_AT)
    draw, images = _drawer(metric), _images(samples)
    if draw is None or images is None:
        return ()
    found = predict(model, samples)
    pairs: list[tuple[float, int, Array, Array]] = []
    for k, image in enumerate(images):
        ours, theirs = (draw(image, [y[k] for y in outputs]) for outputs in (metric.reference, found))
        pairs.append((float(np.mean((ours != theirs).any(-1))), k, ours, theirs))
    pairs.sort(key=lambda pair: (-pair[0], pair[1]))
    return tuple(_picture(images[k], k, share, ours, theirs) for share, k, ours, theirs in pairs[:SHOWN])


def _picture(image: Array, sample: int, differs: float, ours: Array, theirs: Array) -> Picture:
    seen = resized(image, *ours.shape[:2])
    return Picture(
        sample=sample,
        differs=differs,
        image=encoded(seen),
        float_drawn=encoded(ours),
        quantized_drawn=encoded(theirs),
        difference=encoded(difference(seen, ours, theirs)),
    )


def _drawer(metric: Metric) -> Draw | None:
    """How outputs are drawn: as their metric says, or as masks where an output of a decision has an image's size."""
    if metric.kind == "outputs":
        return metric.argument.draw
    if metric.kind == "several":
        parts = [(k, _drawer(part)) for k, part in metric.argument]
        return next((_of_output(k, draw) for k, draw in parts if draw is not None), None)
    output = metric.reference[0]
    whole = output.dtype.kind in "iu"
    decides = whole or (metric.kind in ("accuracy", "agreement", "kl") and output.shape[-1] > 1)
    return draw_mask if decides and _is_image_sized(output, whole) else None


def _is_image_sized(output: Array, whole: bool) -> bool:
    return output.ndim == (3 if whole else 4) and min(output.shape[1:3]) >= LEAST


def _of_output(number: int, draw: Draw) -> Draw:
    return lambda image, outputs: draw(image, [outputs[number]])


def _images(samples: Samples) -> Array | None:
    """The first input as images [n, h, w, 3] uint8, stretched from its darkest to its brightest value."""
    x = np.concatenate([batch[0] for batch in samples.batches])
    if x.ndim != 4 or x.shape[-1] not in (1, 3) or min(x.shape[1:3]) < LEAST or x.dtype.kind not in "fu":
        return None
    low, high = float(x.min()), float(x.max())
    levels = (x.astype(np.float32) - low) * (255 / (high - low) if high > low else 0)
    return np.broadcast_to(np.rint(levels).astype(np.uint8), (*x.shape[:3], 3))


def difference(image: Array, a: Array, b: Array) -> Array:
    """A pale image, marked where two drawings differ."""
    grey = 255 - (255 - image.mean(-1, keepdims=True)) * 0.4
    pale = np.broadcast_to(np.rint(grey), image.shape)
    return np.where((a != b).any(-1, keepdims=True), np.array(DIFFERENT), pale).astype(np.uint8)


def encoded(image: Array) -> str:
    """A JPEG in base64."""
    content, picture = io.BytesIO(), Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((LARGEST, LARGEST))
    picture.save(content, "JPEG", quality=88)
    return base64.b64encode(content.getvalue()).decode()
