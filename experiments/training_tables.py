"""The tables about training on CIFAR-10: against float, and the white paper's tables 7 to 10.

Every network trains on all training images with the recipe of `kquant_tools.recipe` (Adam, warm-up, cosine to zero),
random flips and shifts; what is scored is the exported file on all test images. 7 folding of batch normalization,
8 ranges to begin with, 9 equalization and bias correction to begin with, 10 bits and granularity (section 4 of arXiv
2106.08295).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

import kquant
from kquant.keras.model import extract
from kquant.qat.distill import gives_probabilities
from kquant.targets.ethos_u.target import ACCELERATORS, ETHOS_U
from kquant.targets.ethos_u.vela import compile_file
from kquant.targets.litert.writer import write_tflite
from kquant_tools.augment import training_batches
from kquant_tools.recipe import recipe

from . import zoo
from .formats import xz
from .paper_tables import spread
from .tables import OFF, Options, Table

BATCH_SIZE = 128
REESTIMATED = 2560  # training images for the statistics of batch normalizations, after training
VERIFIED = 1000  # test images for the parity of a trained network


@dataclass(frozen=True, eq=False)
class Course:
    """A model with what it trains on.

    Attributes:
        name: key of `zoo.MODELS` or `zoo.OWN`.
        model: the float model, not fine-tuned.
        x, y: training images and labels.
        batches: what is scored.
        epochs: passes over the training images.
    """

    name: str
    model: keras.Model
    x: np.ndarray
    y: np.ndarray
    batches: Sequence[Any]
    epochs: int

    @classmethod
    def of(cls, name: str, options: Options) -> Course:
        record = zoo.record(name)
        if record.training is None:
            raise ValueError(f"{name!r} has no training data; choose one of {', '.join(zoo.trainable())}.")
        x, y = record.training(None)
        return cls(name, zoo.load_model(name), x, y, list(record.evaluation(options.samples)), options.epochs)

    def train(self, model: keras.Model, seed: int, teacher: keras.Model | None = None) -> float:
        """Train a model in place; the seconds of an epoch."""
        keras.utils.set_random_seed(seed)
        data = training_batches(self.x, self.y, BATCH_SIZE, seed)
        fitted = model if teacher is None else kquant.Distiller(model, teacher)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=not gives_probabilities(self.model))
        fitted.compile(recipe(self.epochs * -(-len(self.x) // BATCH_SIZE)), loss, jit_compile=False)
        started = time.perf_counter()
        fitted.fit(data, epochs=self.epochs, shuffle=False, verbose=0)
        return (time.perf_counter() - started) / self.epochs

    def fine_tuned(self, seed: int) -> tuple[keras.Model, float]:
        """The float model, trained as the quantized ones are, and the seconds of an epoch."""
        model = keras.models.clone_model(self.model)
        model.set_weights(self.model.get_weights())
        return model, self.train(model, seed)

    def prepared(self, config: Any, seed: int, **training: Any) -> kquant.QuantizedModel:
        """The model that training starts from."""
        options: dict[str, Any] = {"training": kquant.Training(**training), "seed": seed, "progress": False}
        return kquant.prepare_qat(self.model, zoo.calibration(self.name), config, **options)

    def reestimate(self, model: kquant.QuantizedModel) -> None:
        """Statistics of batch normalizations that trained along, from training images."""
        batches = [self.x[k : k + BATCH_SIZE] for k in range(0, min(REESTIMATED, len(self.x)), BATCH_SIZE)]
        kquant.reestimate_batch_norm(model, batches, progress=False)

    def score(self, model: kquant.QuantizedModel) -> float:
        """Top-1 of the exported file."""
        return zoo.top1(kquant.export_tflite(model, allow_float=False).content, self.batches)[0]

    def parity(self, model: kquant.QuantizedModel) -> str:
        """LSB of the integer reference, LSB op by op, decisions that are the same."""
        x = np.concatenate([x for x, _ in self.batches])[:VERIFIED]
        report = kquant.verify_tflite(model, kquant.export_tflite(model).content, x, samples=len(x), tensor_samples=2)
        end = report.end_to_end[0]
        numbers = f"{report.reference_max_lsb:.0f}, {report.op_by_op_max_lsb:.0f}, {100 * end.agreement:.2f} %"
        return numbers if report.ok else f"FAILS: {numbers}"


# variant -> config, batch normalization, whether the float model teaches
Variants = Mapping[str, tuple[Any, str, bool]]
AGAINST_FLOAT: Variants = {
    "w8a8": ("w8a8", "fold", False),
    "w4a8": ("w4a8", "fold", False),
    "w4a4": ("w4a4", "fold", False),
    "w4a4, distilled": ("w4a4", "fold", True),
    "w8a8, batch norm kept": ("w8a8", "keep", False),
    "w4a8, batch norm kept": ("w4a8", "keep", False),
    "w4a4, batch norm kept": ("w4a4", "keep", False),
}


def against_float(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """Trained with quantization against the float model, fine-tuned alike; the teacher is the float model of a seed."""
    yield from (row[:-2] for row in trained_alike(name, options, AGAINST_FLOAT))


def trained_alike(name: str, options: Options, variants: Variants) -> Iterator[Sequence[Any]]:
    """A row for the float model and for every variant; sizes, of the last seed's file, come last."""
    course = Course.of(name, options)
    floats = [course.fine_tuned(seed) for seed in range(options.seeds)]
    tops = [zoo.float_top1(model, course.batches) for model, _ in floats]
    before = zoo.float_top1(course.model, course.batches)
    yield name, "float", course.epochs, before, spread(tops), 0.0, "-", f"{floats[0][1]:.0f}", "", ""
    for variant in filter(options.wants, variants):
        config, batch_norm, distilled = variants[variant]
        begun, ended, seconds, model = [], [], 0.0, None
        for seed, (teacher, _) in enumerate(floats):
            model = course.prepared(config, seed, batch_norm=batch_norm)
            begun.append(course.score(model))
            seconds = course.train(model, seed, teacher if distilled else None)
            if batch_norm != "fold":
                course.reestimate(model)
            ended.append(course.score(model))
        difference = float(np.mean(ended) - np.mean(tops))
        if model is None:
            continue
        content, _ = write_tflite(extract(model), target=ETHOS_U)  # its weights lie in int8 tensors
        sizes = compile_file(content, ACCELERATORS[0]).flash, len(xz(content))
        parity, times = course.parity(model), f"{seconds:.0f}"
        yield name, variant, course.epochs, spread(begun), spread(ended), difference, parity, times, *sizes


_PER_TENSOR, _PER_CHANNEL = "w4a8-per_tensor", "w4a8"
FOLDING: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "folded before, per tensor": (_PER_TENSOR, {}),
    "double forward, per tensor": (_PER_TENSOR, {"batch_norm": "double_forward"}),
    "batch statistics, per tensor": (_PER_TENSOR, {"batch_norm": "batch_statistics"}),
    "folded before, per channel": (_PER_CHANNEL, {}),
    "kept, per channel": (_PER_CHANNEL, {"batch_norm": "keep"}),
}
_ROUNDED = {"adaround": False, "correct_bias": False}  # equalization stays as the preset has it
RANGES: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    f"{preset}, weights {weights}, activations {activations}": (
        {
            "preset": preset,
            "weights": {"method": weights},
            "activations": {"method": activations},
            "logits": None,
            **_ROUNDED,
        },
        {},
    )
    for preset in ("w4a8", "w4a4")
    for weights in ("min_max", "mse")
    for activations in ("min_max", "mse")
}
BEGINNINGS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "nothing": ({"preset": _PER_TENSOR, **OFF}, {}),
    "CLE": ({"preset": _PER_TENSOR, **OFF, "equalize": True}, {}),
    "CLE, bias correction": ({"preset": _PER_TENSOR, **OFF, "equalize": True, "correct_bias": True}, {}),
    "CLE, AdaRound": ({"preset": _PER_TENSOR, **OFF, "equalize": True, "adaround": True}, {}),
}
WIDTHS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    f"{preset}, {granularity}": (preset + suffix, {})
    for preset in ("w8a8", "w4a8", "w4a4")
    for granularity, suffix in (("per tensor", "-per_tensor"), ("per channel", ""))
}


def _table(variants: Mapping[str, tuple[Any, Mapping[str, Any]]]) -> Table:
    """Rows of the file's accuracy before and after training, for each (config, training)."""
    with_statistics = any("batch_norm" in training for _, training in variants.values())

    def rows(name: str, options: Options) -> Iterator[Sequence[Any]]:
        course = Course.of(name, options)
        for variant, (config, training) in variants.items():
            if not options.wants(variant):
                continue
            begun, trained, ended = [], [], []
            for seed in range(options.seeds):
                model = course.prepared(config, seed, **training)
                begun.append(course.score(model))
                course.train(model, seed)
                ended.append(course.score(model))
                if "batch_norm" in training:
                    trained.append(ended.pop())
                    course.reestimate(model)
                    ended.append(course.score(model))
            row = name, variant, course.epochs, spread(begun), spread(ended)
            yield (*row, spread(trained) if trained else "-") if with_statistics else row

    columns = ("model", "variant", "epochs", "before", "trained .tflite")
    return Table(rows, (*columns, "without re-estimation") if with_statistics else columns, ("model", "variant"))


TRAINED = (
    *("model", "variant", "epochs", "before", "trained", "to float, trained alike"),
    *("reference LSB, LSB op by op, same decision", "seconds an epoch"),
)
TABLES = {
    "7": _table(FOLDING),
    "8": _table(RANGES),
    "9": _table(BEGINNINGS),
    "10": _table(WIDTHS),
    "training": Table(
        against_float,
        TRAINED,
        ("model", "variant"),
    ),
}
