"""`prepare_qat`: a model whose fit trains what the target computes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import keras

from kquant.backend import check_backend
from kquant.config import QuantConfig
from kquant.errors import ConfigError, ModelError
from kquant.insert import QuantizedModel, extract, insert
from kquant.qat.learning import learning_of
from kquant.quantize import quantize_model
from kquant.specs import Training


def prepare_qat(
    model: keras.Model,
    calibration_data: Any = None,
    config: QuantConfig | str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    training: Training = Training(),  # noqa: B008 (frozen)
    seed: int = 0,
    progress: bool = True,
    batch_size: int = 32,
) -> QuantizedModel:
    """Make a model ready for quantization-aware training (section 4 of the white paper).

    The model is quantized as `quantize_model` does it, which is where training starts (section 4.3); then its grids
    learn with the weights. The result is an ordinary Keras model for compile, fit, evaluate, save and load, and
    `export_tflite` writes it as it stands at any time. Neither argument is modified.

    Args:
        model: a float model, or a result of `quantize_model`, which goes on from there.
        calibration_data: as for `quantize_model`.
        config: as for `quantize_model`, "w8a8" by default; not for a model that is quantized, which has one.
        training: how grids learn, and what becomes of batch normalizations.
        seed, progress, batch_size: as for `quantize_model`.

    Raises:
        ModelError: the model cannot be quantized, or is prepared already.
        ConfigError: the config is wrong, cannot be deployed, or is given for a model that has one.
        CalibrationError: the data is missing or unusable.
    """
    check_backend()
    if not isinstance(model, QuantizedModel):
        config = QuantConfig.load("w8a8" if config is None else config)
        model = quantize_model(model, calibration_data, config, seed=seed, progress=progress, batch_size=batch_size)
    elif "training" in model.quantization:
        raise ModelError(f"{model.name!r} is prepared for training already: compile and fit it as it is.")
    elif config is not None or calibration_data is not None:
        raise ConfigError(
            f"{model.name!r} is quantized already: it keeps its config, and needs no data. Pass the float model to "
            "start anew, or the quantized model alone."
        )
    config = QuantConfig.from_dict(model.quantization["config"])
    _refuse_undeployable(model)
    qgraph = extract(model)
    facts = {k: v for k, v in model.quantization.items() if k not in ("structure", "tied")}
    return insert(qgraph, {**facts, "training": asdict(training)}, learning_of(qgraph, config, training))


def _refuse_undeployable(model: QuantizedModel) -> None:
    if model.target.float_weights:
        raise ConfigError(
            f"The target {model.target.name!r} is for experiments and cannot be deployed; train for the target that "
            "the model is to run on, e.g. with config='w8a8'."
        )
