"""Dense layers of MiniLM with a scale for every 32 inputs, in 4 bits, beside ai-edge-quantizer with GPTQ.

Every layer alone, on what it reads in the float network: rows of the tokens of some sentences of the dev set decide the
integers, rows of others are what errors are measured on: the mean square of the change of the output, relative to the
output's variance. Both files hold int4 weights and float16 scales, so their sizes are equal.

The folder of --files holds the problems; where it has no results of the peer yet, run

    python experiments/peers/aeq_blocks.py FOLDER

in an environment with ai-edge-quantizer, and the table again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema

import kquant
from kquant.errors import ConfigError
from kquant.graph.ops import evaluate, op_of
from kquant.graph.transforms import prepare_graph
from kquant.grids.grid import dequantize
from kquant.keras.model import extract
from kquant.targets.litert.reader import unpack

from .sentences import model, sentences
from .tables import OneTable, Options

CONFIG = "w4-b32"
ROWS = 2048
SENTENCES, BATCH = 320, 32
HEADER = ("layer", "inputs", "outputs", "rows", "nearest", "descent", "peer", "ratio")


def rows(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """One row for every layer that is asked for; `name` is no model of this table."""
    if options.files is None:
        raise ConfigError("The table blocks keeps its problems for the peer in a folder: give --files=FOLDER.")
    graph = prepare_graph(model("layers"))
    names = [n.name for n in graph if n.op == "dense" and op_of(n).matrix]
    read = {n: graph[n].inputs[0] for n in names}
    (pair, _), _ = sentences("dev", options.calibration or SENTENCES)
    wanted = list(dict.fromkeys(read.values()))
    values: dict[str, list[np.ndarray]] = {tensor: [] for tensor in wanted}
    for k in range(0, len(pair[0]), BATCH):
        batch = [x[k : k + BATCH] for x in pair]
        tokens = batch[1].astype(bool)
        for tensor, value in zip(wanted, evaluate(graph, batch, wanted), strict=True):
            x = np.asarray(value)
            values[tensor].append(x[tokens] if x.shape[:2] == tokens.shape else x.reshape(-1, x.shape[-1]))
    for layer in filter(options.wants, names):
        x = np.concatenate(values[read[layer]])
        x = x[np.random.default_rng(0).permutation(len(x))[: 2 * ROWS]]
        weights = graph[layer].weights
        yield layer, *weights["kernel"].shape, *_compared(options.files / layer.replace("/", "."), weights, x)


def _compared(place: Path, weights: Any, x: np.ndarray) -> Sequence[Any]:
    """Rows that decide, and the errors on the others: nearest, descent, the peer's, and the ratio of the last two."""
    half = len(x) // 2
    seen, held_out = x[:half].astype(np.float32), x[half:].astype(np.float32)
    kernel, bias = weights["kernel"], weights["bias"]
    layer = keras.Sequential([keras.Input((kernel.shape[0],), name="x"), keras.layers.Dense(kernel.shape[1])])
    layer.set_weights([kernel, bias])

    def error(other: np.ndarray, shift: np.ndarray) -> float:
        change = held_out @ (other - kernel) + (shift - bias)
        return float(np.square(change).mean() / (held_out @ kernel).var(axis=0).mean())

    found = []
    for rounding in (False, None):
        qmodel = kquant.quantize_model(layer, seen, {"preset": CONFIG, "adaround": rounding}, progress=False)
        qgraph = extract(qmodel)
        (node,) = qgraph.weights
        grid = qgraph.weights[node]
        assert grid is not None
        found.append(error(dequantize(qgraph.integers[node], grid), qgraph.graph[node].weights["bias"]))
    place.parent.mkdir(parents=True, exist_ok=True)
    np.savez(place.with_name(f"{place.name}.npz"), x=seen)
    exact = kquant.quantize_model(layer, seen, {"preset": "w8", "correct_bias": False}, progress=False)  # not rounded
    place.with_name(f"{place.name}.tflite").write_bytes(kquant.export_tflite(exact, mode="float32").content)
    peer = place.with_name(f"{place.name}.aeq.tflite")
    if not peer.exists():
        return half, *(f"{e:.3e}" for e in found), "", ""
    found.append(error(blockwise_weight(peer.read_bytes()).T, bias))
    return half, *(f"{e:.3e}" for e in found), f"{found[1] / found[2]:.3f}"


def blockwise_weight(content: bytes) -> np.ndarray:
    """The values of the only int4 tensor of a file with a scale for every block of its last axis."""
    parsed = schema.ModelT.InitFromPackedBuf(content, 0)
    tensors = parsed.subgraphs[0].tensors
    (tensor,) = [t for t in tensors if t.type == schema.TensorType.INT4]
    details = tensor.quantization.details
    scales = tensors[details.scales]

    def stored(index: int) -> np.ndarray:
        buffer = parsed.buffers[index]  # large ones lie behind the flatbuffer
        if buffer.data is None:
            return np.frombuffer(content[buffer.offset : buffer.offset + buffer.size], np.uint8)
        return np.asarray(buffer.data, np.uint8)

    integers = unpack(stored(tensor.buffer), 4, int(np.prod(tensor.shape))).reshape(tensor.shape)
    scale = stored(scales.buffer).view(np.float16).reshape(scales.shape)
    return np.asarray(integers * np.repeat(scale.astype(np.float32), details.blockSize, axis=-1), np.float32)


TABLES = {"blocks": OneTable(rows, HEADER, ("layer",))}
