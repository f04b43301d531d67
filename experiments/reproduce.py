r"""Measures and prints a table on the evaluation data (KQUANT_DATA); --write keeps it in `experiments.results`.

    python -m experiments.reproduce --table=accuracy
    python -m experiments.reproduce --table=parity --models=resnet20 --configs=w8a8,w4a4
    python -m experiments.reproduce --table=5 --models=mobilenet_v2 --variants=descent --seeds=1
    python -m experiments.reproduce --table=training --models=resnet20 --epochs=2
    python -m experiments.reproduce --table=targets --configs=w8a8,w4a8,w8a16
    python -m experiments.reproduce --table=formats --models=resnet20 --configs=w4a8-kmeans,w2a8-ternary,w8a8-d0.2
    python -m experiments.reproduce --table=latency --configs=w8a8,w4a8,w2a8
    python -m experiments.reproduce --table=search --variants=milp
    python -m experiments.reproduce --table=sentences --configs=w8a8,w4a8,w8,w4
    python -m experiments.reproduce --table=scenes --configs=w8a8,w4a8,w4a4 --files=DIR
    python -m experiments.reproduce --table=packing --configs=w8a8,w4a8,w4a8-kmeans,w2a8-ternary

accuracy: top-1 of the exported file on all evaluation samples, against the float model and the
TensorFlow converter. parity: the contract of `verify_tflite`, and the share of equal elements. 1 to 6: the tables of
the white paper, see `experiments.paper_tables`. diagnosis, sensitivity: see `experiments.debug_tables`. 7 to 10,
training and few_bits: see `experiments.training_tables`. targets: what files take on TensorFlow Lite Micro and Arm
Ethos-U, see `experiments.targets`. latency, search: what files take on LiteRT, and what the search of bits finds, see
`experiments.search_tables`. formats: weights of few bits, see `experiments.formats`. blocks: dense layers in 4 bits
beside ai-edge-quantizer, see `experiments.blocks`. packing, packing_speed: smaller files, see `experiments.packing`.
sentences: MiniLM on STS-B, see `experiments.sentences`. scenes, scenes_training: segmentation and detection, see
`experiments.scenes` and `experiments.scenes_training`. Calibration uses the calibration sets only.
"""

from __future__ import annotations

import time
from pathlib import Path

from absl import app, flags

from . import (
    blocks,
    debug_tables,
    defaults,
    few_bits,
    formats,
    packing,
    paper_tables,
    scenes,
    scenes_training,
    search_tables,
    sentences,
    tables,
    targets,
    training_tables,
    zoo,
)

TABLES = {
    **tables.TABLES,
    **paper_tables.TABLES,
    **debug_tables.TABLES,
    **training_tables.TABLES,
    **targets.TABLES,
    **packing.TABLES,
    **sentences.TABLES,
    **defaults.TABLES,
    **formats.TABLES,
    **blocks.TABLES,
    **search_tables.TABLES,
    **few_bits.TABLES,
    **scenes.TABLES,
    **scenes_training.TABLES,
}

FLAGS = flags.FLAGS
TABLE = flags.DEFINE_enum("table", "accuracy", list(TABLES), "What to regenerate.")
MODELS = flags.DEFINE_list("models", list(zoo.MODELS), "Keys of experiments.zoo.MODELS, or of zoo.OWN.")
CONFIGS = flags.DEFINE_list("configs", ["w8a8", "w8a8-per_tensor", "w4a8", "w8a16", "w4a4"], "Presets.")
SAMPLES = flags.DEFINE_integer("samples", None, "Evaluate on at most this many samples, spread evenly.")
CALIBRATION = flags.DEFINE_integer("calibration", None, "Samples to calibrate the table configs with.", lower_bound=1)
SEEDS = flags.DEFINE_integer("seeds", 3, "How often to repeat what depends on chance.", lower_bound=1)
EPOCHS = flags.DEFINE_integer("epochs", 2, "Passes over the training data, for the tables about training.", 1)
FILES = flags.DEFINE_string("files", None, "Folder that keeps the exported files of the tables accuracy and configs.")
WRITE = flags.DEFINE_boolean("write", False, "Write the rows into the files of experiments/results.")
NOTE = flags.DEFINE_string("note", "", "What --write says of the rows, e.g. where they were measured.")
VARIANTS = flags.DEFINE_string("variants", "", "Regular expression for the variants of tables 1 to 10; empty for all.")


def main(argv: list[str]) -> None:
    table, start = TABLES[TABLE.value], time.perf_counter()
    options = tables.Options(
        samples=SAMPLES.value,
        configs=tuple(CONFIGS.value),
        calibration=CALIBRATION.value,
        seeds=SEEDS.value,
        epochs=EPOCHS.value,
        variants=VARIANTS.value,
        files=Path(FILES.value) if FILES.value else None,
    )
    rows = table.all_rows(MODELS.value, options)
    table.results(TABLE.value).show(rows, write=WRITE.value, note=NOTE.value)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    app.run(main)
