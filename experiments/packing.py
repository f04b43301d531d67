"""Smaller files: packed for transport, and with weights that TensorFlow Lite Micro unpacks.

Each model is quantized for target "tflm". Its file is packed by `kquant.pack_tflite` and, for comparison, by xz -9e;
the file with compress="tflm" must compute on TensorFlow Lite Micro what the plain one does, bit for bit. Bits are
those of the zero-order entropy of each tensor and of its Huffman code without a table, means over all weights.
"""

from __future__ import annotations

import lzma
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

import kquant
from kquant.keras.model import extract
from kquant.targets.litert.runtime import as_stored
from kquant.targets.storage import huffman
from kquant.targets.tflm.runtime import MicroModel, arena

from . import zoo
from .tables import OFF, Options, Table

SAMPLES, REPEATS = 5, 9
HEADER = (
    *("model", "preset", "bytes", "xz", "packed", "smaller_than_xz"),
    *("entropy", "huffman", "tflm_bytes", "arena", "tflm_arena", "samples"),
)


def packing(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """The files of every preset: plain, packed, compressed."""
    model, data = zoo.load_model(name), zoo.calibration(name, options.calibration)
    for preset in options.configs:
        qmodel = kquant.quantize_model(model, data, {"preset": preset, "target": "tflm"}, progress=False)
        plain = kquant.export_tflite(qmodel).content
        xz = len(lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME))
        packed = kquant.pack_tflite(plain)
        if kquant.unpack_tflite(packed) != plain:
            raise RuntimeError(f"{name}: unpacked is not what was packed")
        compressed = kquant.export_tflite(qmodel, compress="tflm").content
        samples = compare(name, plain, compressed)
        smaller = 100 * (1 - len(packed) / xz)
        first = (name, preset, len(plain), xz, len(packed), smaller)
        yield *first, *bits(qmodel), len(compressed), arena(plain).total, arena(compressed).total, samples


def speed(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """How fast the files are packed and unpacked; quantized without the steps that take long."""
    model, data = zoo.load_model(name), zoo.calibration(name, options.calibration)
    for preset in options.configs:
        config = {"preset": preset, "target": "tflm", **OFF}
        content = kquant.export_tflite(kquant.quantize_model(model, data, config, progress=False)).content
        packed = kquant.pack_tflite(content)
        times = (seconds(partial(kquant.pack_tflite, content)), seconds(partial(kquant.unpack_tflite, packed)))
        yield name, preset, len(content), len(packed), *(len(content) / 1e6 / t for t in times)


def seconds(call: Callable[[], object]) -> float:
    """Seconds of processor time of the fastest of some runs: what else runs on the machine counts less."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def bits(qmodel: kquant.QuantizedModel) -> tuple[float, float]:
    """Entropy and length of Huffman codes in bits per weight, means over all weights."""
    qgraph = extract(qmodel)
    weights = [(q, qgraph.integers[name]) for name, q in qgraph.weights.items() if q is not None]
    sizes = [integers.size for _, integers in weights]
    entropies = [q.entropy(integers) for q, integers in weights]
    codes = [huffman.mean_bits(integers) for _, integers in weights]
    return float(np.average(entropies, weights=sizes)), float(np.average(codes, weights=sizes))


def compare(name: str, plain: bytes, compressed: bytes) -> int:
    """Run samples on both files.

    Returns:
        How many.

    Raises:
        RuntimeError: an output differs.
    """
    first, second = MicroModel(plain), MicroModel(compressed)
    batches = zoo.record(name).evaluation(SAMPLES)
    x = as_stored(np.concatenate([np.asarray(x) for x, _ in batches])[:SAMPLES], first.inputs[0])
    for a, b in zip(first.run([x]), second.run([x]), strict=True):
        if not np.array_equal(a, b):
            raise RuntimeError(f"{name}: the compressed file computes something else")
    return len(x)


TABLES = {
    "packing": Table(packing, HEADER, ("model", "preset")),
    "packing_speed": Table(
        speed, ("model", "preset", "bytes", "packed", "pack_mb_s", "unpack_mb_s"), ("model", "preset")
    ),
}
