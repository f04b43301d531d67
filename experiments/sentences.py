"""MiniLM-L6 on sentences (STS-B): files in integers, and with float activations, beside the float file.

Calibrated on sentences of the dev set drawn at random, scored on the test set: Spearman's rank correlation of the
cosine of two embeddings with the score that people gave, and the mean cosine of an embedding with its float one. The
model is written in two ways, "layers" (MultiHeadAttention, a boolean mask) and "ops" (matmul, an additive mask), of
which `variants` chooses.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

import kquant
from kquant.targets.litert.flatbuffer import summary
from models.data import path

from .tables import OneTable, Options

STYLES = ("layers", "ops")
HEADER = (
    *("style", "config", "mode", "seed", "sentences", "pairs", "float_spearman", "spearman", "cosine"),
    *("bytes", "float_bytes", "float_operations", "time_ratio", "seconds"),
)
_TIMED = 40  # runs of one sentence


def model(style: str) -> keras.Model:
    """The float model, written in one of two ways."""
    spec = importlib.util.spec_from_file_location("minilm_build", path("minilm/build.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    built: keras.Model = module.build(style)
    return built


def sentences(split: str, limit: int | None = None, seed: int = 0) -> tuple[list[list[np.ndarray]], np.ndarray]:
    """[ids, mask] of the first and of the second sentences, and the scores; `limit` pairs drawn at random."""
    data = np.load(path("stsb/stsb_minilm_tokens.npz"))
    count = len(data[f"{split}_score"])
    rows = np.arange(count) if limit is None else np.random.default_rng(seed).permutation(count)[:limit]
    pairs = []
    for k in (1, 2):
        ids, length = data[f"{split}_ids{k}"][rows].astype(np.int32), data[f"{split}_length{k}"][rows]
        pairs.append([ids, (np.arange(ids.shape[1]) < length[:, None]).astype(np.float32)])
    return pairs, data[f"{split}_score"][rows]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation in percent, ties at their mean rank."""

    def ranks(x: np.ndarray) -> np.ndarray:
        values, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return 100 * float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def _embeddings(file: kquant.TFLiteModel, pairs: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [np.asarray(file.predict(pair)[0], np.float64) for pair in pairs]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _score(embeddings: list[np.ndarray], scores: np.ndarray) -> float:
    first, second = map(_unit, embeddings)
    return spearman((first * second).sum(1), scores)


def time_ratio(content: bytes, reference: bytes, pair: list[np.ndarray]) -> float:
    """Median time of one sentence on one thread, relative to another file's, measured in turns."""
    files = [kquant.TFLiteModel(c, threads=1) for c in (content, reference)]
    one = [x[:1] for x in pair]
    took: list[list[float]] = [[], []]
    for _ in range(_TIMED):
        for file, times in zip(files, took, strict=True):
            start = time.perf_counter()
            file.run(one)
            times.append(time.perf_counter() - start)
    return float(np.median(took[0]) / np.median(took[1]))


def measured(style: str, options: Options) -> Iterator[Sequence[Any]]:
    """One row for every config and calibration seed."""
    float_model = model(style)
    pairs, scores = sentences("test", options.samples)
    exactly = {"preset": "w8", "correct_bias": False}  # weights as they are, and not as they round
    plain = kquant.quantize_model(float_model, [x[:8] for x in pairs[0]], exactly, progress=False)
    reference = kquant.export_tflite(plain, mode="float32").content
    exact = _embeddings(kquant.TFLiteModel(reference), pairs)
    expected = _score(exact, scores)
    count = options.calibration or 200
    for config in options.configs:
        mode = "dynamic_range" if kquant.QuantConfig.load(config).activations is None else "integer"
        for seed in range(options.seeds if mode == "integer" else 1):
            start = time.perf_counter()
            (data, _), _ = sentences("dev", count, seed)
            content = kquant.export_tflite(
                kquant.quantize_model(float_model, data, config=config, seed=seed, progress=False), mode=mode
            ).content
            seconds = time.perf_counter() - start
            found = _embeddings(kquant.TFLiteModel(content), pairs)
            cosine = np.mean([(_unit(a) * _unit(b)).sum(1).mean() for a, b in zip(exact, found, strict=True)])
            yield (
                *(style, config, mode, seed, count, len(scores), f"{expected:.2f}", f"{_score(found, scores):.2f}"),
                *(f"{cosine:.4f}", len(content), len(reference), len(summary(content).float_ops)),
                *(f"{time_ratio(content, reference, pairs[0]):.2f}", f"{seconds:.0f}"),
            )


def rows(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """`measured`, for the styles that are asked for; `name` is no style of this table."""
    for style in STYLES:
        if options.wants(style):
            yield from measured(style, options)


TABLES = {"sentences": OneTable(rows, HEADER, ("style", "config", "mode", "seed"))}
