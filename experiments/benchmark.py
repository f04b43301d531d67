r"""Cost of quantizing, side by side with other toolkits; prints Markdown tables.

    python -m experiments.benchmark --model=PATH.keras --calibration=PATH.npz --preprocess=tf

    --what=convert   quantization plus export, against the TensorFlow converter's int8 PTQ; latencies of the two files
    --what=adaround  AdaRound of all layers at 4 bits; then the solvers on single layers, and with
                     --peer_python=PYTHON (of an environment with aimet-torch) AIMET's AdaRound of the same layers
    --what=equalize  cross-layer equalization and empirical bias correction

Every measurement runs in a process of its own, two tools in turn; times are for a loaded model (imports excluded),
memory is the peak of the process (imports included). Latencies are measured interleaved in one process.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from .results import Results

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "Float Keras model (.keras).")
flags.DEFINE_string("calibration", None, "Calibration images, as the --data flag of the tools.")
flags.DEFINE_string("preprocess", "tf", "Preprocessing, as in the tools.")
flags.DEFINE_list("images", ["50", "200", "1000"], "Numbers of calibration images for the memory column.")
flags.DEFINE_integer("compare_at", 200, "Number of images at which both tools are timed.")
flags.DEFINE_integer("repeats", 3, "Timed runs of each tool.")
flags.DEFINE_enum("what", "convert", ["convert", "adaround", "equalize"], "What is measured.")
flags.DEFINE_string("peer_python", None, "Python of an environment with aimet-torch, for --what=adaround.")
flags.DEFINE_integer("iterations", 1000, "Iterations of the solvers that have some, for --what=adaround.")
flags.DEFINE_integer("threads", 2, "Threads of the single layers, for --what=adaround.")
flags.DEFINE_boolean("write", False, "Write the rows into the files of experiments/results.")
flags.DEFINE_string("note", "", "What --write says of the rows.")
flags.DEFINE_string("worker", None, "Internal: the measurement that this process makes.")
flags.DEFINE_string("output", None, "Internal: where the worker writes its file.")
flags.DEFINE_integer("worker_images", 0, "Internal: number of images of the worker.")


def batches(model: Any, limit: int) -> Any:
    """A re-iterable stream of decoded batches; nothing is kept."""
    from kquant_tools.data import load_data

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


CONVERTERS = {"kquant": with_kquant, "converter": with_converter}


def _planned(model: Any, images: Any, config: str, before: Any) -> tuple[Any, Any, Any]:
    """(graph, grids of the linear operations, data) after the step `before` on the graph."""
    from kquant.config.quant_config import QuantConfig
    from kquant.graph.ops import op_of
    from kquant.graph.transforms import prepare_graph
    from kquant.quantize.calibrate import weight_grids
    from kquant.quantize.data import CalibrationData
    from kquant.quantize.plan import make_plan

    plan = make_plan(before(prepare_graph(model)), QuantConfig.load(config))
    grids = {n: q for n, q in weight_grids(plan).items() if op_of(plan.graph[n]).matrix}
    specs = [(i, plan.graph[i].shape, plan.graph[i].dtype) for i in plan.graph.inputs]
    return plan.graph, grids, CalibrationData(images, specs)


def with_adaround(model: Any, data: Any) -> bytes:
    """AdaRound of all layers, 4 bits per channel."""
    from kquant.quantize.adaround import adaround

    adaround(*_planned(model, data, "w4a8", lambda graph: graph), progress=False)
    return b""


def with_equalization(model: Any, data: Any) -> bytes:
    """Cross-layer equalization and bias correction, 8 bits per tensor."""
    from kquant.graph.transforms.equalize import equalize
    from kquant.quantize.bias_correction import correct_biases

    correct_biases(*_planned(model, data, "w8a8-per_tensor", lambda graph: equalize(graph)[0]), progress=False)
    return b""


# name -> kernel [height, width, channels, outputs (of each channel where depthwise)] of a layer on 16x16 pixels
LAYERS = {
    "conv 3x3, 32 to 32": (3, 3, 32, 32),
    "conv 3x3, 64 to 64": (3, 3, 64, 64),
    "depthwise 3x3, 96": (3, 3, 96, 1),
    "conv 1x1, 96 to 24": (1, 1, 96, 24),
}
SOLVERS = ("descent", "gram", "stochastic")
AIMET = Path(__file__).with_name("peers") / "aimet_adaround.py"
AIMET_BATCH = 32  # its usual one
PIXELS, IMAGES, BITS = 16, 256, 4


def layer_problem(name: str) -> dict[str, Any]:
    """A layer with weights, and inputs [2, n, h, w, c] (to calibrate with, held out): mixed, smooth, behind a ReLU."""
    import numpy as np

    rng = np.random.default_rng(list(LAYERS).index(name))
    height, width, channels, outputs = LAYERS[name]
    depthwise = outputs == 1
    mix = rng.normal(size=(channels, channels)) * np.arange(1, channels + 1)[:, None] ** -0.5
    x = rng.normal(size=(2 * IMAGES, PIXELS + 2, PIXELS + 2, channels)).astype(np.float32)
    x = (x[:, :-2] + x[:, 1:-1] + x[:, 2:])[:, :, :-2] + (x[:, :-2] + x[:, 1:-1] + x[:, 2:])[:, :, 2:]
    x = np.maximum(x @ (mix / np.sqrt(np.square(mix).sum(axis=0))).astype(np.float32) / 2, 0)
    taps = height * width * (1 if depthwise else channels)
    kernel = rng.normal(size=LAYERS[name]) * np.sqrt(2 / taps) * np.exp(0.3 * rng.normal(size=channels))[:, None]
    # outputs are about as often below zero as above, as batch normalization makes them
    shares = x.mean(axis=(0, 1, 2)) * kernel.sum(axis=(0, 1)).T
    return {
        "x": x.reshape(2, IMAGES, PIXELS, PIXELS, channels),
        "kernel": kernel.astype(np.float32),
        "bias": -(shares.reshape(-1) if depthwise else shares.sum(axis=1)).astype(np.float32),
        "groups": channels if depthwise else 1,
    }


def layer_node(problem: dict[str, Any]) -> Any:
    """The layer as a node of a graph, ReLU included."""
    from kquant.graph.ir import Node

    depthwise, bias = problem["groups"] > 1, problem["bias"]
    attrs = {"strides": [1, 1], "padding": "same", "dilation": [1, 1], "groups": 1, "clip": [0.0, None]}
    weights = {"kernel": problem["kernel"], "bias": bias}
    op, shape = "depthwise_conv2d" if depthwise else "conv2d", (None, PIXELS, PIXELS, len(bias))
    return Node(name="layer", op=op, inputs=("x",), shape=shape, attrs=attrs, weights=weights)


def layer_work(name: str) -> None:
    """The solvers on one layer, and the peer's result judged: prints rows as JSON."""
    import numpy as np
    import tensorflow as tf

    from kquant.config.specs import QuantSpec
    from kquant.graph.ops import compute, weight_of, weight_view
    from kquant.grids.grid import fake_quantize, grid_from_range
    from kquant.grids.ranges import weight_range
    from kquant.quantize.adaround import AdaRound, round_layer

    tf.config.threading.set_intra_op_parallelism_threads(FLAGS.threads)
    problem = layer_problem(name)
    node, (x, held_out) = layer_node(problem), problem["x"]
    spec, axis = QuantSpec(bits=BITS, symmetric=True, per_channel=True), weight_of(node).channels
    grid = grid_from_range(*weight_range("min_max", weight_view(node), spec, axis), spec, axis)
    blocks = [tf.constant(x[k : k + 64]) for k in range(0, IMAGES, 64)]
    wanted = compute(node, [held_out])

    def error(rounded: Any) -> float:
        return float(tf.reduce_mean(tf.square(compute(rounded, [held_out]) - wanted)))

    def rounded(solver: str, iterations: int) -> tuple[Any, float]:
        settings, start = AdaRound(solver=solver, iterations=iterations), time.perf_counter()
        result, _ = round_layer(node, lambda: ((b, b) for b in blocks), grid, settings)
        return result, time.perf_counter() - start

    nearest = error(
        node.with_weights(kernel=fake_quantize(weight_view(node), grid).reshape(node.weights["kernel"].shape))
    )
    rows = {}
    for solver in SOLVERS:
        rounded(solver, 2)  # compiles
        overhead = rounded(solver, 1)[1]
        result, seconds = rounded(solver, FLAGS.iterations)
        speed = None if solver == "descent" else (FLAGS.iterations - 1) / max(seconds - overhead, 1e-9)
        rows[solver] = {"seconds": seconds, "speed": speed, "error": error(result) / nearest}
    if FLAGS.peer_python:
        with np.load(FLAGS.output) as found:
            kernel, seconds = found["kernel"].reshape(node.weights["kernel"].shape), float(found["seconds"])
            total = seconds + float(found["overhead"])
        ratio = error(node.with_weights(kernel=kernel)) / nearest
        rows["AIMET"] = {"seconds": total, "speed": (FLAGS.iterations - 1) / seconds, "error": ratio}
    print(json.dumps(rows))


def run_peer(name: str, result: Path) -> None:
    """AIMET's AdaRound of one layer."""
    import numpy as np

    problem, file = layer_problem(name), result.with_suffix(".problem.npz")
    height, width = problem["kernel"].shape[:2]
    kernel = problem["kernel"].reshape(height, width, -1, len(problem["bias"]))
    settings = {"bits": BITS, "iterations": FLAGS.iterations, "batch": AIMET_BATCH}
    np.savez(file, **(problem | settings | {"x": problem["x"][0], "kernel": kernel}))
    _checked([FLAGS.peer_python, str(AIMET), str(file), str(result), str(FLAGS.threads)])


def work() -> None:
    """One measurement, printed as JSON."""
    import keras

    if FLAGS.worker in LAYERS:
        layer_work(FLAGS.worker)
        return
    model = keras.saving.load_model(FLAGS.model, compile=False)
    data = batches(model, FLAGS.worker_images)
    if FLAGS.worker != "converter":
        import kquant.quantize.pipeline  # noqa: F401  (imports are not timed)
    start = time.perf_counter()
    content = WORKERS[FLAGS.worker](model, data)
    seconds = time.perf_counter() - start
    Path(FLAGS.output).write_bytes(content)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "bytes": len(content)}))


WORKERS = CONVERTERS | {"adaround": with_adaround, "equalize": with_equalization}


def measure(worker: str, images: int, output: Path) -> dict[str, Any]:
    """Run one worker process."""
    command = [sys.executable, "-m", "experiments.benchmark", f"--worker={worker}", f"--worker_images={images}"]
    passed = ("model", "calibration", "preprocess", "peer_python", "iterations", "threads")
    command += [f"--{k}={FLAGS[k].value}" for k in passed if FLAGS[k].value is not None]
    return json.loads(_checked([*command, f"--output={output}"]).strip().splitlines()[-1])


def _checked(command: list[str]) -> str:
    """What a command prints.

    Raises:
        RuntimeError: it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


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


COST = Results("cost", ("what", "kquant", "converter", "ratio"), ("what",))
BY_IMAGES = Results("cost_by_images", ("step", "images", "peak memory, MB", "seconds"), ("step", "images"))
SINGLE = Results(
    "layers", ("layer", "solver", "iterations / s", "seconds in all", "held-out error"), ("layer", "solver")
)
STEPS = {"kquant": "quantize, export", "adaround": "adaround", "equalize": "equalize, correct_bias"}


def convert(folder: Path) -> Iterator[Sequence[str]]:
    """Quantization and export against the converter."""
    files = {worker: folder / f"{worker}.tflite" for worker in CONVERTERS}
    runs: dict[str, list[dict[str, float]]] = {worker: [] for worker in CONVERTERS}
    for _ in range(FLAGS.repeats):
        for worker, path in files.items():
            runs[worker].append(measure(worker, FLAGS.compare_at, path))
    for key, what, digits in (("seconds", "seconds", 1), ("peak_mb", "peak memory, MB", 1), ("bytes", "bytes", 0)):
        ours, theirs = (statistics.median(r[key] for r in runs[w]) for w in CONVERTERS)
        yield what, f"{ours:.{digits}f}", f"{theirs:.{digits}f}", f"{ours / theirs:.3f}"
    for threads in (1, 2):
        ms = latency(files, threads)
        ours, theirs = ms["kquant"], ms["converter"]
        yield (
            f"latency, ms, {threads} thread{'s' * (threads > 1)}",
            f"{ours:.2f}",
            f"{theirs:.2f}",
            f"{ours / theirs:.3f}",
        )


def whole_model(worker: str, folder: Path) -> Iterator[Sequence[str]]:
    """Time and memory by the number of images."""
    for images in map(int, FLAGS.images):
        result = measure(worker, images, folder / "unused")
        yield STEPS[worker], str(images), f"{result['peak_mb']:.0f}", f"{result['seconds']:.1f}"


def layers(folder: Path) -> Iterator[Sequence[str]]:
    """The solvers, and AIMET, on single layers."""
    print(
        f"\n{BITS} bits, min-max per channel, {PIXELS}x{PIXELS}, {IMAGES} images, {FLAGS.iterations} iterations, "
        f"{FLAGS.threads} threads, load {os.getloadavg()[0]:.1f}. Errors are of held-out images behind the ReLU, "
        "relative to nearest rounding with the float bias; kquant sets the bias too, AIMET leaves it.\n"
    )
    for name in LAYERS:
        result = folder / "peer.npz"
        if FLAGS.peer_python:
            run_peer(name, result)
        for solver, row in measure(name, 0, result).items():
            speed = "" if row["speed"] is None else f"{row['speed']:.0f}"
            yield name, solver, speed, f"{row['seconds']:.2f}", f"{row['error']:.3f}"


def main(argv: list[str]) -> None:
    if FLAGS.worker:
        work()
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if FLAGS.what == "convert":
            COST.show(convert(folder), write=FLAGS.write, note=FLAGS.note)
            BY_IMAGES.show(whole_model("kquant", folder), write=FLAGS.write, note=FLAGS.note)
        elif FLAGS.model:
            BY_IMAGES.show(whole_model(FLAGS.what, folder), write=FLAGS.write, note=FLAGS.note)
        if FLAGS.what == "adaround":
            SINGLE.show(layers(folder), write=FLAGS.write, note=FLAGS.note)


if __name__ == "__main__":
    app.run(main)
