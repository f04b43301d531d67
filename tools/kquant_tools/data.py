"""Data of the command line: files, folders and functions as a stream of preprocessed batches.

| `source` | what it is |
| --- | --- |
| FILE.npy | samples |
| FILE.npz | `x` or `images` with optional `y` or `labels`; or one array per input, by the inputs' names |
| FILE.npz with `jpeg` and `offsets` | encoded images: image i is `jpeg[offsets[i]:offsets[i + 1]]`; optional `labels` |
| FOLDER | images, or one subfolder of images per class, the classes in alphabetical order |
| module:function | a function without arguments that yields batches: x, (x, y), or dicts by input name |

Encoded images become float32 in 0..255, with the model's channels and size, and are decoded batch by batch.
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from kquant.errors import CalibrationError

Array = np.ndarray[Any, Any]
Read = Callable[[Array], Any]  # sample numbers -> x
Preprocess = Callable[[Array], Array]

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FITS = ("stretch", "crop")
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

PREPROCESS: dict[str, Preprocess] = {
    "none": lambda x: x,
    "unit": lambda x: x / np.float32(255),
    "tf": lambda x: x / np.float32(127.5) - np.float32(1),
    "torch": lambda x: (x / np.float32(255) - IMAGENET_MEAN) / IMAGENET_STD,
}


@dataclass(frozen=True)
class Samples:
    """Samples that can be read in any order.

    Attributes:
        read: sample numbers [n] -> x, an array [n, ...] or a dict of arrays by input name.
        count: number of samples.
        labels: class indices [count], None where there are none.
    """

    read: Read
    count: int
    labels: Array | None = None


@dataclass(frozen=True)
class Batches:
    """A stream of batches that can be iterated repeatedly; nothing is kept in memory.

    Yields (x, y) where there are labels, else x, as `kquant.quantize_model` understands them.

    Attributes:
        open: starts a pass.
        labelled: whether batches are (x, y); None where a user's function decides.
    """

    open: Callable[[], Iterator[Any]]
    labelled: bool | None

    def __iter__(self) -> Iterator[Any]:
        return self.open()


def load_data(
    source: str,
    inputs: Sequence[Any],
    *,
    preprocess: str = "none",
    fit: str = "stretch",
    limit: int | None = None,
    labels: bool = True,
    batch_size: int = 32,
) -> Batches:
    """Open a data source (see the module's docstring).

    Args:
        source: path or "module:function".
        inputs: the model's inputs (`model.inputs`), for names, image size and channels.
        preprocess: a key of `PREPROCESS` or "module:function", applied to every batch of every input.
        fit: how encoded images get the model's size: "stretch" resizes, "crop" cuts out the centre.
        limit: number of samples: spread evenly over a file or folder, the first ones of a function.
        labels: False leaves the labels out.
        batch_size: samples per batch; a function decides itself.

    Raises:
        CalibrationError: the source does not exist, cannot be read, or does not fit the model.
    """
    function = preprocess_function(preprocess)
    if fit not in FITS:
        raise CalibrationError(f"Unknown fit {fit!r}: use one of {', '.join(FITS)}.")
    if limit is not None and limit < 1:
        raise CalibrationError(f"limit must be at least 1, found {limit}.")
    if FUNCTION.fullmatch(source) and not Path(source).exists():
        generate = import_function(source)
        return Batches(lambda: _stream(generate(), function, limit, labels), None if labels else False)
    samples = _open(Path(source), inputs, fit)
    if not samples.count:
        raise CalibrationError(f"There is no sample in {source!r}.")
    labelled = labels and samples.labels is not None
    return Batches(lambda: _read_batches(samples, function, limit, batch_size, labelled), labelled)


def preprocess_function(name: str) -> Preprocess:
    """A named preprocessing or a user's own function."""
    if FUNCTION.fullmatch(name):
        return import_function(name)
    if name not in PREPROCESS:
        raise CalibrationError(f"Unknown preprocessing {name!r}: use {', '.join(PREPROCESS)} or module:function.")
    return PREPROCESS[name]


def import_function(name: str) -> Callable[..., Any]:
    """The function of "module:function"."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise CalibrationError(
            f"Cannot import {name!r}: {error}. The module must be importable from the current folder or PYTHONPATH."
        ) from error


def jpeg_samples(path: str | Path, shape: Sequence[int | None], fit: str = "stretch") -> Samples:
    """Encoded images of an .npz file with `jpeg` (all files' bytes), `offsets` [n + 1] and optional `labels` [n].

    Args:
        path: the file.
        shape: [height, width, channels] of the model's input; None keeps the images' own size.
        fit: see `load_data`.
    """
    with np.load(path) as file:
        blob, offsets = file["jpeg"].tobytes(), file["offsets"]
        labels = file["labels"] if "labels" in file.files else None

    def read(numbers: Array) -> Array:
        return _images([io.BytesIO(blob[offsets[i] : offsets[i + 1]]) for i in numbers], shape, fit)

    return Samples(read, len(offsets) - 1, labels)


def _open(path: Path, inputs: Sequence[Any], fit: str) -> Samples:
    if path.is_dir():
        return _folder(path, _image_shape(inputs, path), fit)
    if not path.is_file():
        raise CalibrationError(f"There is no file or folder {str(path)!r} (and a function is written module:function).")
    try:
        if path.suffix == ".npy":
            x = np.load(path, mmap_mode="r")
            return Samples(lambda numbers: np.asarray(x[numbers]), len(x))
        if path.suffix == ".npz":
            return _npz(path, inputs, fit)
    except (ValueError, OSError, KeyError) as error:
        raise CalibrationError(f"Cannot read {str(path)!r}: {error}.") from error
    raise CalibrationError(f"{str(path)!r} is neither .npz, .npy nor a folder of images.")


def _npz(path: Path, inputs: Sequence[Any], fit: str) -> Samples:
    with np.load(path) as file:
        if "jpeg" in file.files:
            return jpeg_samples(path, _image_shape(inputs, path), fit)
        names = [tensor.name for tensor in inputs]
        labels = next((file[key] for key in ("y", "labels") if key in file.files), None)
        if all(name in file.files for name in names) and not (len(names) == 1 and "x" in file.files):
            arrays = {name: file[name] for name in names}
            count = len(arrays[names[0]])
            return Samples(lambda numbers: {k: a[numbers] for k, a in arrays.items()}, count, labels)
        x = next((file[key] for key in ("x", "images") if key in file.files), None)
        if x is None or len(names) > 1:
            wanted = "x or images" if len(names) == 1 else " and ".join(names)
            raise CalibrationError(f"{str(path)!r} holds {', '.join(file.files)}; the model needs {wanted}.")
        return Samples(lambda numbers: x[numbers], len(x), labels)


def _folder(path: Path, shape: Sequence[int | None], fit: str) -> Samples:
    classes = sorted(p.name for p in path.iterdir() if p.is_dir())
    folders = [path / name for name in classes] or [path]
    found = [sorted(p for p in f.rglob("*") if p.suffix.lower() in IMAGE_FILES) for f in folders]
    files = [p for group in found for p in group]
    labels = np.repeat(np.arange(len(found)), [len(group) for group in found]) if classes else None
    return Samples(lambda numbers: _images([files[i] for i in numbers], shape, fit), len(files), labels)


def _image_shape(inputs: Sequence[Any], path: Path) -> tuple[int | None, ...]:
    """[height, width, channels] of the only input."""
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].shape[3] not in MODES:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise CalibrationError(f"{str(path)!r} holds images, which do not fit the model's inputs {shapes}.")
    return tuple(inputs[0].shape[1:])


MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's mode


def _images(files: Sequence[Any], shape: Sequence[int | None], fit: str) -> Array:
    return np.stack([_image(file, shape, fit) for file in files])


def _image(file: Any, shape: Sequence[int | None], fit: str) -> Array:
    height, width, channels = shape
    try:
        with Image.open(file) as opened:
            image = opened.convert(MODES[channels or 3])
    except (UnidentifiedImageError, OSError) as error:
        raise CalibrationError(f"Cannot decode an image: {error}.") from error
    size = (width or image.width, height or image.height)
    if fit == "crop":
        left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
        if left < 0 or top < 0:
            raise CalibrationError(f"An image of {image.size} pixels is too small to crop to {size}: stretch instead.")
        image = image.crop((left, top, left + size[0], top + size[1]))
    elif image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32).reshape(size[1], size[0], -1)


def _apply(function: Preprocess, x: Any) -> Any:
    """Preprocessing, in float32 where x is not made of ids (those stay integers under "none")."""
    if isinstance(x, Mapping):
        return {name: _apply(function, value) for name, value in x.items()}
    if function is PREPROCESS["none"]:
        return x
    return function(np.asarray(x, np.float32))


def spread(count: int, limit: int | None) -> Array:
    """`limit` sample numbers spread evenly over `count`, all where it is None or larger."""
    used = count if limit is None else min(limit, count)
    return np.arange(used) * count // used


def _read_batches(
    samples: Samples, function: Preprocess, limit: int | None, batch_size: int, labelled: bool
) -> Iterator[Any]:
    numbers = spread(samples.count, limit)
    for start in range(0, len(numbers), batch_size):
        chosen = numbers[start : start + batch_size]
        x = _apply(function, samples.read(chosen))
        yield (x, samples.labels[chosen]) if labelled and samples.labels is not None else x


def _stream(batches: Any, function: Preprocess, limit: int | None, labels: bool) -> Iterator[Any]:
    """A user's batches, preprocessed and cut after `limit` samples."""
    left = np.inf if limit is None else limit
    for batch in batches:
        x, y = batch[:2] if isinstance(batch, tuple | list) and len(batch) > 1 else (batch, None)
        count = int(min(left, len(next(iter(x.values())) if isinstance(x, Mapping) else x)))
        x = {k: v[:count] for k, v in x.items()} if isinstance(x, Mapping) else x[:count]
        yield (_apply(function, x), y[:count]) if labels and y is not None else _apply(function, x)
        left -= count
        if left <= 0:
            return
