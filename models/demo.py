"""From a float Keras model to an integer TFLite file, in under a minute: `make demo`.

A small CNN for handwritten digits (models/digits_cnn.py) is quantized to 8-bit weights and to 4-bit
weights, written as TFLite files, and run on the interpreter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from absl import app

from kquant_tools.quiet import load_delegate  # first of all: with it come settings of TensorFlow

SCHEMES = ("w8a8", "w4a8")


def accuracy(scores: Any, labels: np.ndarray) -> str:
    """Top-1 accuracy in percent."""
    return f"{100 * np.mean(np.argmax(scores, -1) == labels):.1f}"


def scheme_row(model: Any, digits: Any, scheme: str) -> tuple[tuple[str, ...], Any]:
    """Quantize, export, run and verify one scheme: (row of the table, parity report)."""
    import kquant

    qmodel = kquant.quantize_model(model, digits.calibration, config=scheme)
    exported = kquant.export_tflite(qmodel, allow_float=False)
    parity = kquant.verify_tflite(qmodel, exported.content, digits.x_test)
    simulated = qmodel.predict(digits.x_test, verbose=0)
    on_target = kquant.TFLiteModel(exported.content).predict(digits.x_test)[0]
    equal = f"{100 * parity.end_to_end[0].equal:.2f} % equal, {'holds' if parity.ok else 'FAILS'}"
    accuracies = (accuracy(simulated, digits.y_test), accuracy(on_target, digits.y_test))
    return (scheme, *accuracies, f"{exported.bytes:,}", equal), parity


def main(argv: list[str]) -> None:
    """Print the table."""
    import keras

    import kquant
    from kquant.config.text import table
    from models import digits_cnn

    load_delegate()
    model, digits = keras.saving.load_model(digits_cnn.PATH), digits_cnn.load_split()
    plain = kquant.export_tflite(kquant.quantize_model(model, config="w8", progress=False), mode="float32").content
    in_keras = accuracy(model.predict(digits.x_test, verbose=0), digits.y_test)
    in_file = accuracy(kquant.TFLiteModel(plain).predict(digits.x_test)[0], digits.y_test)
    print(f"{model.name}: {model.count_params():,} parameters, {len(digits.x_test)} test images never seen before;")
    print(f"ranges are calibrated on {len(digits.calibration)} of the training images.\n")
    results = [scheme_row(model, digits, scheme) for scheme in SCHEMES]
    rows = [("float32", in_keras, in_file, f"{len(plain):,}", ""), *(row for row, _ in results)]
    print("\n" + table(("scheme", "accuracy in Keras %", "on target %", ".tflite bytes", "Keras = target"), rows))
    print(EXPLANATION)
    if not all(parity.ok for _, parity in results):
        for _, parity in results:
            print(parity)
        raise SystemExit(1)


EXPLANATION = """
"in Keras" is the accuracy of the Keras model, float or quantized; "on target" that of the .tflite file on the
interpreter, which computes w8a8 and w4a8 with integers only. "Keras = target" is the share of output values that
are the very same number in both; it "holds" when every tensor passes kquant.verify_tflite. In w8a8 each weight
takes 8 bits, in w4a8 two weights share a byte; the activations between the layers are 8-bit integers in both."""


def run() -> None:
    """`python -m models.demo`."""
    app.run(main)


if __name__ == "__main__":
    run()
