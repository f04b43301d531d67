"""Write a quantized Keras model as a TFLite file.

kquant-export --model=quantized.keras --output=model.tflite
"""

from __future__ import annotations

from absl import app, flags

from . import common

MODES = ["integer", "float32", "float16", "dynamic_range", "weight_only"]
TYPES = ["int8", "uint8", "int16", "float32"]
MODE = flags.DEFINE_enum(
    "mode",
    "integer",
    MODES,
    "integer: what the model simulates. dynamic_range, weight_only: integer weights, float activations. float16: "
    "half-precision weights. float32: no quantization.",
)
INPUT_TYPE = flags.DEFINE_enum("input_type", None, TYPES, "Type of the inputs; by default that of the model's grids.")
OUTPUT_TYPE = flags.DEFINE_enum("output_type", None, TYPES, "Type of the outputs, likewise.")
ALLOW_FLOAT = flags.DEFINE_boolean("allow_float", True, "False: fail where an operation would compute in float.")
COMPRESS = flags.DEFINE_enum(
    "compress",
    None,
    ["tflm", "densify"],
    "Store the weights in fewer bytes. tflm: for TensorFlow Lite Micro's operator DECODE (models for target tflm). "
    "densify: pruned weights as sparse tensors (models for target litert).",
)


def main(argv: list[str]) -> None:
    """Export and print the report."""
    output = common.writable(common.OUTPUT.value, ".tflite")
    if output is None:
        raise app.UsageError("Say where to write the file: --output=FILE.tflite.")
    import kquant

    report = kquant.export_tflite(
        common.load_model(common.MODEL.value),
        output,
        mode=MODE.value,
        input_type=INPUT_TYPE.value,
        output_type=OUTPUT_TYPE.value,
        allow_float=ALLOW_FLOAT.value,
        compress=COMPRESS.value,
    )
    print(report)


def run() -> None:
    """Console script."""
    common.launch(main, __doc__, [common.MODEL, common.OUTPUT, MODE, INPUT_TYPE, OUTPUT_TYPE, ALLOW_FLOAT, COMPRESS])


if __name__ == "__main__":
    run()
