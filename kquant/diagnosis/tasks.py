"""Metrics of tasks beyond classification, of labels and outputs: of masks, and of boxes.

Each is an `OutputMetric`, which every function with a metric takes, for the first output of a model or, in a dict by
the outputs' names, for any: `{"mask": mean_iou(11), "depth": "sqnr"}`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np

from kquant.diagnosis.drawing import Draw, draw_boxes, draw_mask
from kquant.errors import CalibrationError, ConfigError, MissingPackageError

Array = np.ndarray[Any, Any]
IOUS = tuple(float(x) for x in np.linspace(0.5, 0.95, 10))  # thresholds of COCO's metric
_CHUNK = 1 << 24  # pixels counted at once


@dataclass(frozen=True)
class OutputMetric:
    """A metric of labels and outputs, higher is better; it can be pickled where its function can.

    Attributes:
        name: what it is called, with its unit.
        function: (labels [n, ...], outputs, a list of arrays [n, ...]) -> score. Labels that were given as a dict are
            one.
        draw: (image [h, w, 3] uint8, outputs of one sample) -> a picture [h', w', 3] uint8 of what they say, for the
            report of `diagnose`; None draws none.
    """

    name: str
    function: Callable[[Any, Sequence[Array]], float]
    draw: Draw | None = None

    def __call__(self, labels: Any, outputs: Sequence[Array]) -> float:
        """The score of outputs."""
        return float(self.function(labels, outputs))


def mean_iou(classes: int) -> OutputMetric:
    """Mean over the classes of intersection / union, in percent (PASCAL VOC), of masks or of scores by class.

    Labels [n, ...] outside of 0..classes - 1 are void: their pixels are not scored. Classes that neither labels nor
    output have are left out.

    Args:
        classes: how many there are.
    """
    return OutputMetric("mean IoU (%)", partial(_mean_iou, _checked(classes)), draw_mask)


def pixel_accuracy(classes: int) -> OutputMetric:
    """The share of pixels with the right class, in percent; void as in `mean_iou`.

    Args:
        classes: how many there are.
    """
    return OutputMetric("pixel accuracy (%)", partial(_pixel_accuracy, _checked(classes)), draw_mask)


def mean_average_precision(
    classes: int, decode: Callable[[Sequence[Array]], Sequence[Array]], iou: float | None = None
) -> OutputMetric:
    """COCO's mean average precision of boxes, in percent (by pycocotools; at most 100 boxes of an image count).

    Labels are [n, boxes, 5 or 6]: left, top, right, bottom, class, and 1 where a box is neither asked for nor an error;
    rows whose class is negative are none.

    Args:
        classes: how many there are.
        decode: what makes boxes of all outputs: for each image [k, 6], left, top, right, bottom, class, score, of which
            the better one of two that overlap is left.
        iou: the overlap at which a box counts as found; None takes the mean over 0.5, 0.55, ... 0.95.
    """
    if iou is not None and not 0 < iou <= 1:
        raise ConfigError(f"iou must be above 0 and at most 1, found {iou}.")
    name = "mAP (%)" if iou is None else f"mAP at IoU {iou:g} (%)"
    function = partial(_mean_average_precision, _checked(classes), decode, iou)
    return OutputMetric(name, function, partial(_draw_decoded, decode))


def _checked(classes: int) -> int:
    if classes < 1:
        raise ConfigError(f"A metric of classes needs at least one, found {classes}.")
    return classes


def _scored(classes: int, labels: Any, outputs: Sequence[Array]) -> tuple[Array, Array]:
    """Classes that are asked for, and those that the first output names, [pixels] each."""
    wanted, found = np.asarray(labels), np.asarray(outputs[0])
    if wanted.ndim == found.ndim and wanted.shape[-1] == 1 and found.shape[-1] != 1:
        wanted = wanted[..., 0]
    if found.ndim == wanted.ndim + 1 and found.shape[-1] in (1, classes):
        found = np.argmax(found, -1) if found.shape[-1] > 1 else found[..., 0]
    if wanted.shape != found.shape:
        raise CalibrationError(
            f"Labels {wanted.shape} do not fit the output {np.shape(outputs[0])}: pass the class of each pixel, for an "
            f"output of classes or of scores of {classes} classes."
        )
    counts = (wanted >= 0) & (wanted < classes)
    if not counts.any():
        raise CalibrationError(f"No label is one of the {classes} classes.")
    return wanted[counts].astype(np.int64), found[counts].astype(np.int64)


def _mean_iou(classes: int, labels: Any, outputs: Sequence[Array]) -> float:
    wanted, found = _scored(classes, labels, outputs)
    measured = keras.metrics.MeanIoU(classes)
    for k in range(0, len(wanted), _CHUNK):
        measured.update_state(wanted[k : k + _CHUNK], np.clip(found[k : k + _CHUNK], 0, classes - 1))
    return 100 * float(measured.result())


def _pixel_accuracy(classes: int, labels: Any, outputs: Sequence[Array]) -> float:
    wanted, found = _scored(classes, labels, outputs)
    return 100 * float(np.mean(wanted == found))


def _mean_average_precision(
    classes: int, decode: Callable[..., Sequence[Array]], iou: float | None, labels: Any, outputs: Sequence[Array]
) -> float:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingPackageError("Scores of boxes need pycocotools: pip install kquant[detection].") from error
    labels, boxes = np.asarray(labels, np.float64), decode(outputs)
    if labels.ndim != 3 or labels.shape[-1] not in (5, 6) or len(boxes) != len(labels):
        raise CalibrationError(
            f"Labels {labels.shape} of {len(boxes)} images with boxes: pass [images, boxes, 5 or 6], left, top, right, "
            "bottom, class, and 1 where a box does not count."
        )
    with contextlib.redirect_stdout(io.StringIO()):
        asked, answers = COCO(), COCO()
        asked.dataset = _as_dataset(classes, [b[b[:, 4] >= 0] for b in labels], _annotation)
        answers.dataset = _as_dataset(classes, [np.asarray(b, np.float64).reshape(-1, 6) for b in boxes], _answer)
        asked.createIndex()
        answers.createIndex()
        measured = COCOeval(asked, answers, "bbox")
        measured.params.iouThrs = np.array(IOUS if iou is None else [iou])
        measured.params.areaRng, measured.params.areaRngLbl = [[0, 1e10]], ["all"]
        measured.params.maxDets = [100]
        measured.evaluate()
        measured.accumulate()
    precision = measured.eval["precision"]
    asked_for = precision > -1
    if not asked_for.any():
        raise CalibrationError("No label is a box that is asked for.")
    return 100 * float(precision[asked_for].mean())


def _draw_decoded(decode: Callable[..., Sequence[Array]], image: Array, outputs: Sequence[Array]) -> Array:
    return draw_boxes(image, decode([y[None] for y in outputs])[0])


def _as_dataset(classes: int, boxes: Sequence[Array], entry: Callable[[Array], dict[str, Any]]) -> dict[str, Any]:
    """Boxes [k, 5 or 6] of each image in COCO's form."""
    rows = [(image, box) for image, found in enumerate(boxes) for box in found]
    common = [
        {
            "id": number,
            "image_id": image,
            "category_id": int(b[4]),
            "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]],
            "area": (b[2] - b[0]) * (b[3] - b[1]),
        }
        for number, (image, b) in enumerate(rows, 1)
    ]
    return {
        "info": {},
        "images": [{"id": k} for k in range(len(boxes))],
        "categories": [{"id": k} for k in range(classes)],
        "annotations": [{**row, **entry(b)} for row, (_, b) in zip(common, rows, strict=True)],
    }


def _annotation(box: Array) -> dict[str, Any]:
    return {"iscrowd": int(len(box) == 6 and box[5] > 0)}


def _answer(box: Array) -> dict[str, Any]:
    return {"iscrowd": 0, "score": float(box[5])}
