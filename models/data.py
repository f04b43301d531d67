"""Evaluation data outside the repository: the folder that KQUANT_DATA names."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import keras
import numpy as np

from kquant_tools.data import PREPROCESS, jpeg_samples, spread

DATA = Path(os.environ.get("KQUANT_DATA", "../shared/data"))
CIFAR10 = {"test": "cifar10/cifar10_test_jpegq75.npz", "train": "cifar10/cifar10_train_jpegq75.npz"}


class MissingData(FileNotFoundError):
    """A file of the evaluation data is not there."""


def path(name: str) -> Path:
    """A file of the data folder.

    Raises:
        MissingData: it is not there.
    """
    found = DATA / name
    if not found.is_file():
        raise MissingData(f"needs {name} of the evaluation data; KQUANT_DATA is {str(DATA)!r}")
    return found


def save(model: keras.Model, file: str | Path) -> None:
    """Write a .keras file, packed: Keras itself stores what it zips as it is."""
    model.save(file)
    with zipfile.ZipFile(file) as stored:
        parts = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for name, content in parts.items():
            packed.writestr(name, content)


def cifar10(split: str, limit: int | None = None, preprocess: str = "none") -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10 images [n, 32, 32, 3] float32 and labels [n].

    Args:
        split: "test" (scored) or "train" (calibration).
        limit: number of images, spread over the split.
        preprocess: "none" (0..255) for resnet8, "torch" for resnet20 and resnet56.
    """
    samples = jpeg_samples(path(CIFAR10[split]), (32, 32, 3))
    numbers = spread(samples.count, limit)
    labels = np.asarray(samples.labels)[numbers]
    return PREPROCESS[preprocess](samples.read(numbers)), labels
