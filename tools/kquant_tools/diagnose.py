r"""Find out why a quantized model is less accurate, and write a config that does better.

kquant-diagnose --model=float.keras --data=test.npz --calibration=calibration.npz --config=w8a8-per_tensor \
    --html=report.html --recommended=better.yaml

Without labels in --data, decisions are compared with those of the float model. --limit bounds --data alone. The
config is --config with the changes of the other flags, as for kquant-quantize; a model of --quantized has its own.
"""

from __future__ import annotations

from typing import Any

from absl import app, flags

from . import common
from .evaluate import QUANTIZED
from .quantize import CONFIG_FLAGS, PROGRESS, SEED, config_of_flags

CALIBRATION = flags.DEFINE_string(
    "calibration", None, "Calibration data, of the kinds of --data; by default a part of --data."
)
HTML = flags.DEFINE_string("html", None, "Write the report here (.html).")
JSON = flags.DEFINE_string("json", None, "Write everything that was measured here (.json).")
RECOMMENDED = flags.DEFINE_string("recommended", None, "Write the recommended config here (.yaml), if there is one.")
SENSITIVITY = flags.DEFINE_boolean("sensitivity", True, "Also measure quantizers one by one.")
RESUME = flags.DEFINE_string(
    "resume", None, "Keep the sensitivity here (.json): a call that was stopped goes on from it."
)
OWN = (CALIBRATION, common.METRIC, HTML, JSON, RECOMMENDED, SENSITIVITY, RESUME)


def calibration_of_flags(model: Any) -> Any:
    """The batches of --calibration, preprocessed as --data is; None without."""
    from .data import load_data

    if CALIBRATION.value is None:
        return None
    options: dict[str, Any] = {"preprocess": common.PREPROCESS.value, "fit": common.FIT.value, "labels": False}
    return load_data(CALIBRATION.value, model.inputs, batch_size=common.BATCH_SIZE.value, **options)


def main(argv: list[str]) -> None:
    """Diagnose, print the summary, write the files."""
    if common.DATA.value is None:
        raise app.UsageError("Pass the data to evaluate on: --data=...")
    html, json = common.writable(HTML.value, ".html"), common.writable(JSON.value, ".json")
    recommended = common.writable(RECOMMENDED.value, ".yaml")
    import kquant
    from kquant.diagnosis.diagnose import diagnose

    config = config_of_flags()
    model = common.load_model(common.MODEL.value)
    diagnosis = diagnose(
        model,
        common.load_data(model),
        common.metric_of_flags(),
        config,
        calibration_data=calibration_of_flags(model),
        quantized=None if QUANTIZED.value is None else common.load_model(QUANTIZED.value),
        tflite=common.TFLITE.value,
        sensitivity=SENSITIVITY.value,
        checkpoint=RESUME.value,
        seed=SEED.value,
        progress=PROGRESS.value,
    )
    print(diagnosis)
    if recommended is not None and diagnosis.recommendation is not None:
        kquant.QuantConfig.from_dict(diagnosis.recommendation).save(recommended)
        print(f"wrote {recommended}")
    common.write_result(diagnosis, json, html)


def run() -> None:
    """Console script."""
    shared = (common.MODEL, *common.DATA_FLAGS, common.TFLITE, QUANTIZED, SEED, PROGRESS)
    common.launch(main, __doc__, [*shared, *CONFIG_FLAGS, *OWN])


if __name__ == "__main__":
    run()
