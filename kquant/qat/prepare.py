"""`prepare_qat`: a model whose fit trains what the target computes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras

from kquant.config.quant_config import QuantConfig
from kquant.config.specs import Training
from kquant.errors import ConfigError, ModelError
from kquant.graph.backend import check_backend
from kquant.keras.model import QuantizedModel, extract, insert
from kquant.keras.quantize_model import InputShape, quantize_to_graph
from kquant.qat.learning import learning_of, zero_ranges
from kquant.targets.target import get_target


def prepare_qat(
    model: keras.Model,
    calibration_data: Any = None,
    config: QuantConfig | str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    training: Training = Training(),  # noqa: B008 (frozen)
    seed: int = 0,
    progress: bool = True,
    batch_size: int = 32,
    input_shape: InputShape = None,
) -> QuantizedModel:
    """Make a model ready for quantization-aware training (section 4 of the white paper).

    The model is quantized as `quantize_model` does it (but biases are not corrected unless the config says so); there
    training starts (section 4.3), and its grids learn with the weights. The result is an ordinary Keras model
    for compile, fit, evaluate, save and load, and `export_tflite` writes it as it stands at any time. Neither argument
    is modified.

    It trains as the float model would, quantizers apart. A frozen layer learns nothing, its grids included; penalties
    and constraints are asked of the weights of the user's layers (`graph.training`); Dropout, noise, augmentation and
    custom layers that are the identity at inference act in training. Ranges are those of the calibration data as it
    passes in training, since values reach further behind a Dropout. What acts in front of a batch normalization acts
    behind it, on values that are the user's at the running statistics with which training begins.

    Args:
        model: a float model, or a result of `quantize_model`, which goes on from there; that one knows nothing of
            frozen layers, penalties and Dropout.
        calibration_data: as for `quantize_model`.
        config: as for `quantize_model`, "w8a8" by default; not for a model that is quantized, which has one.
        training: how grids learn, and what becomes of batch normalizations.
        seed, progress, batch_size, input_shape: as for `quantize_model`.

    Raises:
        ModelError: the model cannot be quantized, is prepared already, or has a layer whose weights, or whose output
            over the calibration data, are all zero.
        ConfigError: the config is wrong, cannot be deployed, or is given for a model that has one.
        CalibrationError: the data is missing or unusable.
    """
    check_backend()
    if not isinstance(model, QuantizedModel):
        settings = QuantConfig.load("w8a8" if config is None else config)
        if settings.correct_bias is None:  # biases train, from kernels as they are and not as they round
            settings = replace(settings, correct_bias=False)
        _refuse_undeployable(settings)
        qgraph, quantization = quantize_to_graph(
            model, calibration_data, settings, seed, progress, batch_size, True, input_shape
        )
    elif model.quantization.training is not None:
        raise ModelError(f"{model.name!r} is prepared for training already: compile and fit it as it is.")
    elif config is not None or calibration_data is not None:
        raise ConfigError(
            f"{model.name!r} is quantized already: it keeps its config, and needs no data. Pass the float model to "
            "start anew, or the quantized model alone."
        )
    else:
        quantization = model.quantization
        settings = quantization.config
        _refuse_undeployable(settings)
        qgraph = extract(model)
    _refuse_zero_ranges(model.name, zero_ranges(qgraph, settings, quantization.zero))
    learning = learning_of(qgraph, settings, training)
    return insert(qgraph, replace(quantization, training=training), learning, _training_dtype())


def _training_dtype() -> str:
    """That of Keras' global policy where it is "mixed_bfloat16"; float16 would need its losses scaled."""
    return "bfloat16" if keras.config.dtype_policy().name == "mixed_bfloat16" else "float32"


def _refuse_zero_ranges(name: str, layers: list[str]) -> None:
    if layers:
        raise ModelError(
            f"In {name!r} the weights, or the outputs over the calibration data, of {', '.join(map(repr, layers))} are "
            "all zero: they have no range to learn from. Initialize the weights, pass data that activates the layers, "
            "give their outputs a range with a rule (activations={'range': (low, high)}), or leave them in float "
            "(float=True)."
        )


def _refuse_undeployable(config: QuantConfig) -> None:
    if get_target(config.target).float_weights:
        raise ConfigError(
            f"The target {config.target!r} is for experiments and cannot be deployed; train for the target that "
            "the model is to run on, e.g. with config='w8a8'."
        )
