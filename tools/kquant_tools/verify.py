"""Compare a quantized Keras model with the TFLite file exported from it, in LSBs; exit status 1 where parity fails.

kquant-verify --model=quantized.keras --tflite=model.tflite --data=test.npz
"""

from __future__ import annotations

import sys

from absl import app, flags

from . import common

SAMPLES = flags.DEFINE_integer("samples", 1000, "Samples compared from end to end.", 1)
TENSOR_SAMPLES = flags.DEFINE_integer("tensor_samples", 2, "Samples compared at every tensor.", 1)


def main(argv: list[str]) -> None:
    """Verify and print the report."""
    if common.TFLITE.value is None or common.DATA.value is None:
        raise app.UsageError("Pass the file and data to compare on: --tflite=FILE.tflite --data=...")
    import kquant

    model = common.load_model(common.MODEL.value)
    report = kquant.verify_tflite(
        model,
        common.TFLITE.value,
        common.load_data(model, labels=False),
        samples=SAMPLES.value,
        tensor_samples=TENSOR_SAMPLES.value,
    )
    print(report)
    sys.exit(0 if report.ok else 1)


def run() -> None:
    """Console script."""
    common.launch(main, __doc__, [common.MODEL, common.TFLITE, *common.DATA_FLAGS, SAMPLES, TENSOR_SAMPLES])


if __name__ == "__main__":
    run()
