"""How the networks of street scenes are trained: one recipe for each, with its losses and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import app, flags

import kquant
from kquant_tools.recipe import recipe

from . import camvid
from .data import save
from .mobilenet_v2_backbone import with_batch_norm

BATCH_SIZE = 8
LEARNING_RATE = 5e-4
SEED = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained: Adam, cosine to zero after a warm-up.

    Attributes:
        path: of the file that comes along.
        build: makes the network on the backbone of ImageNet.
        deployed: the float network with the outputs that applications want.
        losses: by the names of the outputs.
        batches: (epochs, seed, limit) -> training batches.
        metrics: of the deployed network, best to be looked at first.
        labels: scenes -> what the metrics compare with.
        epochs: that the file was trained for.
        clipnorm: of the gradients of all weights together; None for any.
    """

    path: Path
    build: Callable[[], keras.Model]
    deployed: Callable[[keras.Model], keras.Model]
    losses: Mapping[str, Any]
    batches: Callable[[int, int, int | None], Iterator[Any]]
    metrics: tuple[kquant.OutputMetric, ...]
    labels: Callable[[camvid.Scenes], np.ndarray]
    epochs: int
    clipnorm: float | None = None

    def fit(
        self,
        model: keras.Model,
        epochs: int,
        *,
        learning_rate: float = LEARNING_RATE,
        seed: int = SEED,
        limit: int | None = None,
        verbose: int = 0,
    ) -> None:
        """Train a network in place, in float or quantized.

        Args:
            model: of `build`, or what `kquant.prepare_qat` made of it.
            epochs: passes over the training scenes.
            learning_rate: the highest.
            seed: of the order of the scenes and their changes.
            limit: train on that many scenes only.
            verbose: as in `keras.Model.fit`.
        """
        steps = len(camvid.load("train", limit)) // BATCH_SIZE
        optimizer = recipe(epochs * steps, "adam", learning_rate)
        optimizer.global_clipnorm = self.clipnorm
        model.compile(optimizer, dict(self.losses), jit_compile=False)
        data = self.batches(epochs, seed, limit)
        model.fit(data, steps_per_epoch=steps, epochs=epochs, shuffle=False, verbose=verbose)

    def train(
        self, epochs: int | None = None, verbose: int = 2, seed: int = SEED, limit: int | None = None
    ) -> keras.Model:
        """A network trained from the backbone of ImageNet, at the end with batch normalizations in that.

        Args:
            epochs: passes over the training scenes, by default as many as for the file.
            verbose: as in `keras.Model.fit`.
            seed: of the weights, the order of the scenes and their changes.
            limit: train on that many scenes only.

        Raises:
            MissingData: the evaluation data is not there.
        """
        keras.utils.set_random_seed(seed)
        model = self.build()
        self.fit(model, epochs or self.epochs, seed=seed, limit=limit, verbose=verbose)
        return with_batch_norm(model, camvid.load("train", limit).inputs)

    def load(self) -> keras.Model:
        """The network that comes along, with all outputs."""
        return keras.saving.load_model(self.path, compile=False)

    def run(self) -> None:
        """The command: train, print the scores on the test scenes, write the file."""
        epochs = flags.DEFINE_integer("epochs", self.epochs, "Passes over the training scenes.", 1)
        output = flags.DEFINE_string("output", str(self.path), "The file to write.")
        limit = flags.DEFINE_integer("limit", None, "Train on that many scenes only.", 1)

        def main(argv: list[str]) -> None:
            model, scenes = self.train(epochs.value, limit=limit.value), camvid.load("test")
            save(model, output.value)
            outputs, labels = camvid.predictions(self.deployed(model).predict_on_batch, scenes), self.labels(scenes)
            scores = ", ".join(f"{metric.name} {metric(labels, outputs):.2f}" for metric in self.metrics)
            print(f"{model.count_params():,} parameters, {scores}, {Path(output.value).stat().st_size:,} bytes")

        app.run(main)
