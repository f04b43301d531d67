r"""Quantize a float Keras model after training, and write the simulation and optionally the TFLite file.

kquant-quantize --model=float.keras --data=calibration.npz --config=w8a8 \
    --output=quantized.keras --tflite=model.tflite

Without --data, ranges and biases come from the statistics of batch normalizations. A step that no flag and no
config switches is taken where it helps; the printed report says which were, and why not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from absl import app, flags

from . import common

CONFIG = flags.DEFINE_string("config", "w8a8", "Preset (w8a8, w4a8, w8a8-per_tensor, ...) or a .yaml or .json file.")
TARGET = flags.DEFINE_string("target", None, "Name of the target that runs the model, instead of the config's.")
EQUALIZE = flags.DEFINE_boolean("equalize", None, "Equalize channels across layers.")
ABSORB_BIAS = flags.DEFINE_boolean("absorb_bias", None, "Absorb high biases into the next layer.")
ADAROUND = flags.DEFINE_boolean("adaround", None, "Optimize how weights round, on the data.")
SOLVER = flags.DEFINE_enum(
    "adaround_solver", None, ["descent", "gram", "stochastic"], "How AdaRound does it; implies --adaround."
)
CORRECT_BIAS = flags.DEFINE_boolean("correct_bias", None, "Take the shift of means by rounding out of the biases.")
INPUT_RANGE = flags.DEFINE_list("input_range", None, "LOW,HIGH of all inputs, e.g. -1,1: known, not observed.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of whatever is random.")
PROGRESS = flags.DEFINE_boolean("progress", True, "Show progress bars.")
STEP_FLAGS = (EQUALIZE, ABSORB_BIAS, ADAROUND, CORRECT_BIAS)
CONFIG_FLAGS = (CONFIG, TARGET, *STEP_FLAGS, SOLVER, INPUT_RANGE)


def config_of_flags() -> Any:
    """The config of --config with the changes of the other flags."""
    import kquant

    config = kquant.QuantConfig.load(CONFIG.value)
    changes: dict[str, Any] = {flag.name: flag.value for flag in STEP_FLAGS if flag.value is not None}
    if TARGET.value is not None:
        changes["target"] = TARGET.value
    if SOLVER.value is not None:
        changes["adaround"] = kquant.AdaRound(solver=SOLVER.value)
    if INPUT_RANGE.value is not None:
        if config.input_spec is None:
            raise kquant.ConfigError("--input_range is for quantized inputs, and this config keeps them float.")
        changes["inputs"] = config.input_spec.override({"range": tuple(map(_number, INPUT_RANGE.value))})
    return replace(config, **changes)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise app.UsageError(f"--input_range takes two numbers, LOW,HIGH; found {text!r}.") from error


def main(argv: list[str]) -> None:
    """Quantize, print what was done, write the files."""
    if common.OUTPUT.value is None and common.TFLITE.value is None:
        raise app.UsageError("Say where to write the result: --output=FILE.keras, --tflite=FILE.tflite, or both.")
    output = common.writable(common.OUTPUT.value, ".keras")
    tflite = common.writable(common.TFLITE.value, ".tflite")
    import kquant

    config = config_of_flags()
    model = common.load_model(common.MODEL.value)
    data = common.load_data(model, labels=False)
    qmodel = kquant.quantize_model(model, data, config, seed=SEED.value, progress=PROGRESS.value)
    print(qmodel.report)
    if output is not None:
        qmodel.save(output)
        print(f"wrote {output}")
    if tflite is not None:
        print(kquant.export_tflite(qmodel, tflite))


def run() -> None:
    """Console script."""
    own = (*CONFIG_FLAGS, SEED, PROGRESS)
    common.launch(main, __doc__, [common.MODEL, common.OUTPUT, common.TFLITE, *own, *common.DATA_FLAGS])


if __name__ == "__main__":
    run()
