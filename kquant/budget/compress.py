"""`compress`: one number, how far the outputs may move, becomes the steps of all weights; entropy coding does the rest.

Deep Compression (Han et al. 2016, arXiv 1510.00149) prunes, clusters and codes. Here large steps prune by themselves
(what rounds to zero), integers on a step per channel are the clusters, and the order is that of what pays: at equal
bytes uniform steps from sensitivity (`quantize.sensitivity`) lost less than pruning or centroids in front of the same
coder. `QuantConfig(prune=...)` prunes first where a target reads zeros.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from tqdm.auto import tqdm

from kquant.budget.studio import LIMIT, split
from kquant.config.quant_config import QuantConfig
from kquant.diagnosis.experiments import file_for
from kquant.diagnosis.metrics import make_metric
from kquant.diagnosis.samples import read_samples
from kquant.errors import ConfigError, ModelError
from kquant.graph.transforms import prepare_graph
from kquant.keras.export import export_tflite
from kquant.keras.model import QuantizedModel, extract
from kquant.keras.quantize_model import quantize_model
from kquant.qat.distill import Distiller
from kquant.qat.prepare import prepare_qat
from kquant.quantize.record import Step
from kquant.targets.storage.packing.container import pack_tflite
from kquant.targets.target import Target, get_target

LEAST, MOST = 0.002, 2.0  # nats: next to nothing, and more than any network bears
_ROUNDS = 6  # of halving the logarithm of what lies between: within 6 % of the best divergence


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """A model, what its file takes, and what it scores."""

    divergence: float
    model: QuantizedModel
    size: int
    score: float


def compress(
    model: keras.Model,
    data: Any,
    metric: Any = None,
    *,
    max_drop: float | None = None,
    max_bytes: float | None = None,
    target: str = "litert",
    config: QuantConfig | str | os.PathLike[str] | Mapping[str, Any] = "w8a8",
    training_data: Any = None,
    epochs: int = 1,
    learning_rate: float = 1e-4,
    seed: int = 0,
    progress: bool = True,
) -> QuantizedModel:
    """The smallest model within a drop of the metric, or the best one within bytes.

    Bytes are those that the target stores: of the file with its weights coded (`export_tflite(compress="tflm")`) on
    TensorFlow Lite Micro, of flash as Vela reports it on Ethos-U, and of `pack_tflite` for LiteRT, whose own file does
    not shrink. A third of the data is held out, and files are scored on it.

    Args:
        model: a float model, as for `quantize_model`.
        data: a few hundred representative samples, with labels or without, as for `quantize_model`.
        metric: as for `search`; None is accuracy (without labels agreement with the float model).
        max_drop: how much of the metric may be lost against the float model, in its own units.
        max_bytes: as the target stores them.
        target: what the files are for.
        config: what else is asked for; its weights have 8 bits, in steps that follow from the divergence found.
        training_data: batches of (x, y) or x, as for `fit`: every attempt is trained on them before it is scored, on
            what the float model says.
        epochs: passes over them.
        learning_rate: of Adam.
        seed: the same model, data, config and seed give the same result.
        progress: show progress bars.

    Returns:
        The quantized model; its report's step "compress" has the numbers.

    Raises:
        ConfigError: no budget, or one that cannot be kept, with the nearest that can.
        ModelError: the model is quantized already.
        CalibrationError: the data does not fit, or is too little.
    """
    if isinstance(model, QuantizedModel):
        raise ModelError(f"{model.name!r} is already quantized: pass the float model that it was made from.")
    for name, value in (("max_drop", max_drop), ("max_bytes", max_bytes)):
        if value is not None and not (isinstance(value, int | float) and value >= 0):
            raise ConfigError(f"{name} must be a number of at least 0, found {value!r}.")
    if max_drop is None and max_bytes is None:
        raise ConfigError("compress needs a budget: max_drop or max_bytes.")
    base = replace(QuantConfig.load(config), target=target)
    calibration, held = split(read_samples(data, prepare_graph(model), limit=LIMIT))
    arrays = [np.concatenate(column) for column in zip(*calibration, strict=True)]
    known = dict(zip(held.names, arrays, strict=True)) if len(arrays) > 1 else arrays[0]
    measured = make_metric(metric or (None if held.labels is not None else "agreement"), held, model)
    at_best = measured.of_run(model, measured.reference)
    size = size_of(get_target(target))

    def attempt(divergence: float) -> _Attempt:
        made = quantize_model(model, known, replace(base, divergence=divergence), seed=seed, progress=False)
        if training_data is not None:
            made = _trained(made, model, training_data, epochs, learning_rate, seed)
        content = export_tflite(made).content
        score = measured(file_for(measured, content, extract(made).graph))
        return _Attempt(divergence=divergence, model=made, size=size(made, content), score=score)

    best, tried = _searched(attempt, at_best, max_drop, max_bytes, measured.name, progress)
    stored = 4 * model.count_params()
    note = (
        f"{best.size:,} bytes of {stored:,} in float32 ({stored / best.size:.1f} times less), {measured.name} "
        f"{best.score:.4g} of {at_best:.4g} in float on {len(held)} samples; divergence {best.divergence:.3g}, "
        f"{tried} tried"
    )
    record = best.model.quantization
    steps = (*record.steps, Step(name="compress", taken=True, note=note))
    best.model.record = replace(best.model.record, quantization=replace(record, steps=steps))
    return best.model


def size_of(target: Target) -> Callable[[QuantizedModel, bytes], int]:
    """What a target stores of a model and its file, in bytes."""
    if "tflm" in target.storage:
        return lambda model, content: len(export_tflite(model, compress="tflm").content)
    if target.runtime is not None and target.runtime.measure is not None:
        measure = target.runtime.measure
        return lambda model, content: measure(content)[0].flash
    return lambda model, content: len(pack_tflite(content))


def _trained(
    qmodel: QuantizedModel, model: keras.Model, data: Any, epochs: int, rate: float, seed: int
) -> QuantizedModel:
    """The model after training on what its float model says."""
    keras.utils.set_random_seed(seed)
    student = prepare_qat(qmodel, seed=seed, progress=False)
    distiller = Distiller(student, model, alpha=1.0)
    distiller.compile(keras.optimizers.Adam(rate))
    distiller.fit(data, epochs=epochs, verbose=0)
    return student


def _searched(
    attempt: Callable[[float], _Attempt],
    at_best: float,
    max_drop: float | None,
    max_bytes: float | None,
    metric: str,
    progress: bool,
) -> tuple[_Attempt, int]:
    """The attempt of the largest divergence within the drop, or of the smallest within the bytes; how many there were.

    Raises:
        ConfigError: none keeps the budgets.
    """
    tried: list[_Attempt] = []

    def fits(found: _Attempt) -> bool:
        """Whether it is on the side of less divergence: within the drop, or, without one, too large still."""
        return found.score >= at_best - max_drop if max_drop is not None else found.size > (max_bytes or 0.0)

    low, high = np.log(LEAST), np.log(MOST)
    with tqdm(total=_ROUNDS + 1, desc="compressing", unit="file", disable=not progress, leave=False) as bar:
        for k in range(_ROUNDS + 1):
            middle = low if k == 0 else (low + high) / 2
            tried.append(attempt(float(np.exp(middle))))
            bar.update()
            if k == 0 and not fits(tried[0]):
                break
            low, high = (middle, high) if fits(tried[-1]) else (low, middle)
    good = [
        t
        for t in tried
        if (max_drop is None or t.score >= at_best - max_drop) and (max_bytes is None or t.size <= max_bytes)
    ]
    if not good:
        least = min(tried, key=lambda t: t.size)
        raise ConfigError(
            f"No attempt keeps max_drop={max_drop}, max_bytes={max_bytes}: {metric} is {at_best:.4g} in float and "
            f"{max(t.score for t in tried):.4g} at best, the smallest file has {least.size:,} bytes ({metric} "
            f"{least.score:.4g}). Allow more of one, or give training_data."
        )
    chosen = min(good, key=lambda t: t.size) if max_drop is not None else max(good, key=lambda t: (t.score, -t.size))
    return chosen, len(tried)
