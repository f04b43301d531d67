r"""Quantize a float Keras model after training, and write the simulation and optionally the TFLite file.

kquant-quantize --model=float.keras --data=calibration.npz --config=w8a8 \
    --output=quantized.keras --tflite=model.tflite
"""

from __future__ import annotations

from absl import app, flags

from . import common

CONFIG = flags.DEFINE_string("config", "w8a8", "Preset (w8a8, w4a8, w8a8-per_tensor, ...) or a .yaml or .json file.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of whatever is random.")
PROGRESS = flags.DEFINE_boolean("progress", True, "Show progress bars.")


def main(argv: list[str]) -> None:
    """Quantize, print what was done, write the files."""
    if common.OUTPUT.value is None and common.TFLITE.value is None:
        raise app.UsageError("Say where to write the result: --output=FILE.keras, --tflite=FILE.tflite, or both.")
    output = common.writable(common.OUTPUT.value, ".keras")
    tflite = common.writable(common.TFLITE.value, ".tflite")
    import kquant

    model = common.load_model(common.MODEL.value)
    data = common.load_data(model, labels=False)
    qmodel = kquant.quantize_model(model, data, CONFIG.value, seed=SEED.value, progress=PROGRESS.value)
    print(qmodel.report)
    if output is not None:
        qmodel.save(output)
        print(f"wrote {output}")
    if tflite is not None:
        print(kquant.export_tflite(qmodel, tflite))


def run() -> None:
    """Console script."""
    common.launch(
        main, __doc__, [common.MODEL, common.OUTPUT, common.TFLITE, CONFIG, *common.DATA_FLAGS, SEED, PROGRESS]
    )


if __name__ == "__main__":
    run()
