r"""Cost of quantizing and exporting, side by side with the TensorFlow converter's int8 PTQ.

    python -m tools.benchmark --model=PATH.keras --calibration=PATH.npz --preprocess=tf

Every measurement runs in a process of its own, the two tools in turn; times are for
quantization plus export of a loaded model (imports excluded), memory is the peak of the process
(imports included). Latencies of the two files are measured interleaved in one process.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "Float Keras model (.keras).")
flags.DEFINE_string("calibration", None, "Calibration images, as the --data flag of the other tools.")
flags.DEFINE_string("preprocess", "tf", "Preprocessing, as in the other tools.")
flags.DEFINE_list("images", ["50", "200", "1000"], "Numbers of calibration images for the memory column.")
flags.DEFINE_integer("compare_at", 200, "Number of images at which both tools are timed.")
flags.DEFINE_integer("repeats", 3, "Timed runs of each tool.")
flags.DEFINE_string("worker", None, "Internal: the measurement that this process makes.")
flags.DEFINE_string("output", None, "Internal: where the worker writes its file.")
flags.DEFINE_integer("worker_images", 0, "Internal: number of images of the worker.")


def batches(model: Any, limit: int) -> Any:
    """A re-iterable stream of decoded batches; nothing is kept."""
    from tools.data import load_data

    return load_data(FLAGS.calibration, model.inputs, preprocess=FLAGS.preprocess, limit=limit, labels=False)


def with_kquant(model: Any, data: Any) -> bytes:
    """kquant: quantize and export."""
    import kquant

    return kquant.export_tflite(kquant.quantize_model(model, data, progress=False)).content


def with_converter(model: Any, data: Any) -> bytes:
    """TensorFlow's converter: full-integer post-training quantization."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([x[None]] for batch in data for x in _inputs(batch))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) else batch


WORKERS = {"kquant": with_kquant, "converter": with_converter}


def work() -> None:
    """One measurement, printed as JSON."""
    import keras

    model = keras.saving.load_model(FLAGS.model, compile=False)
    data = batches(model, FLAGS.worker_images)
    if FLAGS.worker == "kquant":
        import kquant  # noqa: F401  (imports are not timed)
    start = time.perf_counter()
    content = WORKERS[FLAGS.worker](model, data)
    seconds = time.perf_counter() - start
    Path(FLAGS.output).write_bytes(content)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "bytes": len(content)}))


def measure(worker: str, images: int, output: Path) -> dict[str, float]:
    """Run one worker process."""
    command = [sys.executable, "-m", "tools.benchmark", f"--worker={worker}", f"--worker_images={images}"]
    command += [f"--{k}={FLAGS[k].value}" for k in ("model", "calibration", "preprocess")]
    done = subprocess.run([*command, f"--output={output}"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{worker} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def latency(files: dict[str, Path], threads: int, rounds: int = 40) -> dict[str, float]:
    """Median milliseconds of one invocation of each file, interleaved."""
    import numpy as np

    from kquant import TFLiteModel

    models = {name: TFLiteModel(path, threads=threads) for name, path in files.items()}
    inputs = {n: [np.zeros(d["shape"], d["dtype"]) for d in m.inputs] for n, m in models.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            for _ in range(5):
                model.run(inputs[name])
            times[name].append((time.perf_counter() - start) / 5)
    return {name: 1000 * statistics.median(t[rounds // 4 :]) for name, t in times.items()}


def main(argv: list[str]) -> None:
    if FLAGS.worker:
        work()
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {worker: Path(folder, f"{worker}.tflite") for worker in WORKERS}
        runs: dict[str, list[dict[str, float]]] = {worker: [] for worker in WORKERS}
        for _ in range(FLAGS.repeats):
            for worker, path in files.items():
                runs[worker].append(measure(worker, FLAGS.compare_at, path))
        print(f"| quantize + export, {FLAGS.compare_at} images | kquant | converter | ratio |\n|---|---|---|---|")
        for key, unit in (("seconds", "s"), ("peak_mb", "MB"), ("bytes", "bytes")):
            ours, theirs = (statistics.median(r[key] for r in runs[w]) for w in ("kquant", "converter"))
            print(f"| {key.split('_')[0]} | {ours:,.1f} {unit} | {theirs:,.1f} {unit} | {ours / theirs:.3f} |")
        for threads in (1, 2):
            ms = latency(files, threads)
            ratio = ms["kquant"] / ms["converter"]
            label = f"latency, {threads} thread{'s' * (threads > 1)}"
            print(f"| {label} | {ms['kquant']:.2f} ms | {ms['converter']:.2f} ms | {ratio:.3f} |")
        print("\n| kquant, images | peak memory | time |\n|---|---|---|")
        for images in map(int, FLAGS.images):
            result = measure("kquant", images, files["kquant"])
            print(f"| {images} | {result['peak_mb']:,.0f} MB | {result['seconds']:.1f} s |")


if __name__ == "__main__":
    app.run(main)
