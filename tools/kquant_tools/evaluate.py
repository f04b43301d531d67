r"""Scores of the float model, its quantized simulation and the TFLite file, on the same data, in one table.

kquant-evaluate --model=float.keras --quantized=quantized.keras --tflite=model.tflite \
    --data=test.npz

By default the score is top-1 accuracy; without labels the table shows only how often two of them name the same class.
With --metric (mean_iou:11, or metrics.py's own as metrics:boxes) all samples and outputs are held in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import app, flags

from . import common

QUANTIZED = flags.DEFINE_string("quantized", None, "The quantized Keras model (.keras).")
KERNELS = flags.DEFINE_enum(
    "kernels", "default", ["default", "builtin", "reference"], "The interpreter's kernels for the TFLite file."
)
Predict = Callable[[Any], np.ndarray]  # a batch of inputs -> scores [n, ..., classes] of the first output


@dataclass
class Scores:
    """Running counts for one model.

    Attributes:
        samples: seen so far, and how many of them had labels.
        correct: labelled samples whose label is the largest score.
        agrees: name of an earlier model -> sum over samples of "names the same class".
    """

    agrees: dict[str, float]
    samples: int = 0
    labelled: int = 0
    correct: float = 0.0

    @property
    def accuracy(self) -> float | None:
        """Top-1 accuracy, 0 to 1; None without labels."""
        return self.correct / self.labelled if self.labelled else None


def evaluate(models: Mapping[str, Predict], batches: Iterable[Any]) -> dict[str, Scores]:
    """Run all models over the data, once.

    Args:
        models: name -> function; each is compared with those before it.
        batches: x or (x, y), y class indices or one-hot, or as the output where that is integers.

    Returns:
        The counts of every model.
    """
    from kquant.diagnosis.metrics import right_classes
    from kquant.verify.end_to_end import same_decision

    names = list(models)
    scores = {name: Scores(dict.fromkeys(names[:k], 0.0)) for k, name in enumerate(names)}
    for batch in batches:
        x, y = batch if isinstance(batch, tuple) else (batch, None)
        outputs = {name: predict(x) for name, predict in models.items()}
        for name, score in scores.items():
            count = len(outputs[name])
            score.samples += count
            if y is not None:
                score.labelled += count
                score.correct += count * float(np.mean(right_classes(y, outputs[name])))
            for earlier in score.agrees:
                score.agrees[earlier] += count * same_decision(outputs[name], outputs[earlier])
    return scores


def keras_predict(model: Any) -> Predict:
    """The first output of a Keras model."""
    import keras

    def predict(x: Any) -> np.ndarray:
        return np.asarray(keras.tree.flatten(model.predict_on_batch(x))[0])

    return predict


def tflite_predict(path: str, kernels: str, names: list[str]) -> Predict:
    """The first output of a TFLite file; `names` are the model's inputs in order, for data given by name."""
    import kquant

    model = kquant.TFLiteModel(path, kernels)

    def predict(x: Any) -> np.ndarray:
        inputs = [x[name] for name in names] if isinstance(x, Mapping) else x
        return model.predict_batches([[inputs] if isinstance(inputs, np.ndarray) else inputs])[0]

    return predict


def format_scores(scores: Mapping[str, Scores], sizes: Mapping[str, int]) -> str:
    """One row per model.

    Args:
        scores: from `evaluate`.
        sizes: name -> bytes of its file.
    """
    from kquant.config.text import table

    earlier = list(scores)[:-1]
    header = ("model", "top-1 %", "samples", "file bytes", *(f"same class as {name} %" for name in earlier))
    rows = []
    for name, score in scores.items():
        top1 = "" if score.accuracy is None else f"{100 * score.accuracy:.2f}"
        agreement = [f"{100 * score.agrees[e] / score.samples:.2f}" if e in score.agrees else "" for e in earlier]
        rows.append((name, top1, f"{score.samples:,}", f"{sizes[name]:,}", *agreement))
    return table(header, rows)


def measure(float_model: Any, paths: Mapping[str, str], batches: Any, metric: Any, kernels: str) -> str:
    """The scores of a metric as a table, one row per model.

    Args:
        float_model: that of `paths["float"]`.
        paths: name -> file, Keras model or .tflite.
        batches: data, of any kind that `kquant.diagnose` takes.
        metric: as for `kquant.diagnose`.
        kernels: of the files.
    """
    import kquant
    from kquant.config.text import table
    from kquant.diagnosis.experiments import FileModel
    from kquant.diagnosis.metrics import make_metric
    from kquant.diagnosis.samples import predict, read_samples
    from kquant.graph.transforms import prepare_graph

    graph = prepare_graph(float_model)
    made = make_metric(metric, read_samples(batches, graph), float_model)

    def scores(path: str) -> Mapping[str, float]:
        file = kquant.TFLiteModel(path, kernels) if path.endswith(".tflite") else None
        if made.kind == "function":
            return {
                made.name: made(common.load_model(path) if file is None else FileModel(file.content, graph, kernels))
            }
        return made.by_output(predict(common.load_model(path) if file is None else file, made.samples))

    rows = []
    for name, path in paths.items():
        found = scores(path)
        values = [f"{score:.2f}" if abs(score) >= 10 else f"{score:.4f}" for score in found.values()]
        rows.append((name, *values, f"{len(made.samples):,}", f"{os.path.getsize(path):,}"))
    return table(("model", *found, "samples", "file bytes"), rows)


def main(argv: list[str]) -> None:
    """Evaluate what was given and print the table."""
    if common.DATA.value is None:
        raise app.UsageError("Pass the data to evaluate on: --data=...")
    model = common.load_model(common.MODEL.value)
    if common.METRIC.value is not None:
        given = {"float": common.MODEL.value, "simulation": QUANTIZED.value, "tflite": common.TFLITE.value}
        files = {name: path for name, path in given.items() if path is not None}
        print(measure(model, files, common.load_data(model), common.metric_of_flags(), KERNELS.value))
        return
    models, paths = {"float": keras_predict(model)}, {"float": common.MODEL.value}
    if QUANTIZED.value is not None:
        models["simulation"], paths["simulation"] = keras_predict(common.load_model(QUANTIZED.value)), QUANTIZED.value
    if common.TFLITE.value is not None:
        names = [tensor.name for tensor in model.inputs]
        models["tflite"], paths["tflite"] = (
            tflite_predict(common.TFLITE.value, KERNELS.value, names),
            common.TFLITE.value,
        )
    scores = evaluate(models, common.load_data(model))
    print(format_scores(scores, {name: os.path.getsize(path) for name, path in paths.items()}))


def run() -> None:
    """Console script."""
    common.launch(main, __doc__, [common.MODEL, QUANTIZED, common.TFLITE, *common.DATA_FLAGS, common.METRIC, KERNELS])


if __name__ == "__main__":
    run()
