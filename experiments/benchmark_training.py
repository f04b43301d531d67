r"""Cost of a step of quantization-aware training, against the same step of the float model; prints a Markdown table.

    python -m experiments.benchmark_training

Steps of all variants are timed in turn, in one process; the ratio is that of medians. Peak memory is that of a process
which trains one variant, less what it had after its imports (Linux only), the median of three; there malloc gives back
at once what is freed, so that the peak is that of what is held. Both run without XLA. The batches are random: nothing
here speaks of accuracy.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from .results import Results

FLAGS = flags.FLAGS
flags.DEFINE_integer("batch", 32, "Samples per step.")
flags.DEFINE_integer("steps", 40, "Timed steps of each variant.")
flags.DEFINE_list("gradients", ["ste", "lsq", "lsq+"], "How grids learn.")
flags.DEFINE_string("config", "w8a8", "Preset.")
flags.DEFINE_list("nets", ["resnet8", "mobilenet_v2_0.35_96"], "What is trained.")
flags.DEFINE_boolean("write", False, "Write the rows into the files of experiments/results.")
flags.DEFINE_string("note", "", "What --write says of the rows.")
flags.DEFINE_string("worker", None, "Internal: NET/VARIANT whose memory this process measures.")

CLASSES = 10
PROCESSES = 3  # whose peak memory is measured


def resnet8() -> Any:
    """The image classifier of MLPerf Tiny: batch norm behind every convolution, three residual blocks, 32x32 pixels."""
    from keras import Input, Model, layers

    def conv(x: Any, filters: int, size: int, stride: int, relu: bool = True) -> Any:
        x = layers.Conv2D(filters, size, stride, "same")(x)
        return x if size == 1 else layers.Activation("relu" if relu else "linear")(layers.BatchNormalization()(x))

    inputs = Input((32, 32, 3))
    x = conv(inputs, 16, 3, 1)
    for filters, stride in ((16, 1), (32, 2), (64, 2)):
        short = x if stride == 1 else conv(x, filters, 1, stride)
        y = conv(conv(x, filters, 3, stride), filters, 3, 1, relu=False)
        x = layers.ReLU()(layers.Add()([short, y]))
    return Model(inputs, layers.Dense(CLASSES, "softmax")(layers.GlobalAveragePooling2D()(x)), name="resnet8")


def mobilenet_v2() -> Any:
    """MobileNetV2 0.35 at 96 pixels."""
    import keras

    return keras.applications.MobileNetV2((96, 96, 3), alpha=0.35, weights=None, classes=CLASSES)


NETS = {"resnet8": resnet8, "mobilenet_v2_0.35_96": mobilenet_v2}


def prepared(net: str, variant: str) -> tuple[Any, Any, Any]:
    """A compiled model and a batch."""
    import keras
    import numpy as np

    import kquant

    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    model = NETS[net]()
    x = rng.uniform(-1, 1, (FLAGS.batch, *model.input_shape[1:])).astype(np.float32)
    if variant != "float":
        training = kquant.Training(gradient=variant)
        model = kquant.prepare_qat(model, x, FLAGS.config, training=training, progress=False)
    model.compile(keras.optimizers.SGD(1e-6), "sparse_categorical_crossentropy", jit_compile=False)
    return model, x, rng.integers(0, CLASSES, FLAGS.batch)


def work() -> None:
    """One process: some steps of one variant, then the peak memory."""
    import kquant  # noqa: F401

    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # imports peak higher than training: start the peak anew
    model, x, y = prepared(*FLAGS.worker.split("/"))
    for _ in range(10):
        model.train_on_batch(x, y)
    print(json.dumps((_kilobytes("VmHWM") - before) * 1024))


def _kilobytes(field: str) -> int:
    """Of this process, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_memory(net: str, variant: str) -> int:
    """Bytes, the median of processes of their own: in which order operations run differs."""
    flags_of_worker = [f"--worker={net}/{variant}", f"--batch={FLAGS.batch}", f"--config={FLAGS.config}"]
    command = [sys.executable, "-m", "experiments.benchmark_training", *flags_of_worker]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=env) for _ in range(PROCESSES)]
    return int(statistics.median(json.loads(run.stdout.strip().splitlines()[-1]) for run in runs))


def step_times(net: str, variants: list[str]) -> dict[str, float]:
    """Median seconds of a step, variants in turn."""
    models = {v: prepared(net, v) for v in variants}
    times: dict[str, list[float]] = {v: [] for v in variants}
    for step in range(FLAGS.steps + 3):
        for variant, (model, x, y) in models.items():
            start = time.perf_counter()
            model.train_on_batch(x, y)
            if step >= 3:  # tracing and warming up
                times[variant].append(time.perf_counter() - start)
    return {v: statistics.median(t) for v, t in times.items()}


STEP = Results(
    "training_step",
    ("net", "variant", "step, ms", "ratio of steps", "peak memory, MB", "ratio of memory"),
    ("net", "variant"),
)


def rows() -> Iterator[Sequence[str]]:
    """Times and memory of all variants of all nets."""
    variants = ["float", *FLAGS.gradients]
    for net in FLAGS.nets:
        times, memory = step_times(net, variants), {v: peak_memory(net, v) for v in variants}
        for v in variants:
            ratios = times[v] / times["float"], memory[v] / memory["float"]
            cells = f"{1e3 * times[v]:.0f}", f"{ratios[0]:.2f}", f"{memory[v] / 1e6:.0f}", f"{ratios[1]:.2f}"
            yield net, v, *cells


def main(argv: list[str]) -> None:
    if FLAGS.worker:
        work()
        return
    STEP.show(rows(), write=FLAGS.write, note=FLAGS.note)


if __name__ == "__main__":
    app.run(main)
