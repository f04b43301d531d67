"""Configs quantized for real and scored, on any executor, with what is done kept in a file."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kquant.budget.passes import distance
from kquant.config.quant_config import QuantConfig
from kquant.diagnosis.experiments import file_for
from kquant.diagnosis.metrics import Metric
from kquant.diagnosis.samples import predict
from kquant.errors import ConfigError, KQuantError, QuantizationWarning
from kquant.keras.export import export_tflite
from kquant.keras.model import extract
from kquant.keras.quantize_model import quantize_model
from kquant.targets.litert.runtime import TFLiteModel


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A config's file: its bytes, its metric, and how far its outputs are from the float network's."""

    content: bytes
    score: float
    distance: float


class Workbench:
    """What a worker needs to quantize and score any config; pickled it is the path of a folder that it writes once.

    Workers in other processes need to see this machine's folder for temporary files (TMPDIR).

    Args:
        model: the float model.
        calibration: one array per input.
        metric: with the samples that are held out.
        seed: of `quantize_model`.
    """

    def __init__(self, model: keras.Model, calibration: Mapping[str, np.ndarray], metric: Metric, seed: int) -> None:
        self.model, self.calibration, self.metric, self.seed = model, dict(calibration), metric, seed
        self._folder: Any = None

    def score(self, config: QuantConfig) -> Scored:
        """Quantize, export, run on the held-out samples; what a bad config destroys shows in the score."""
        arrays = self.calibration if len(self.calibration) > 1 else next(iter(self.calibration.values()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QuantizationWarning)
            qmodel = quantize_model(self.model, arrays, config, seed=self.seed, progress=False)
        content = export_tflite(qmodel).content
        file = TFLiteModel(content, threads=1)
        outputs = predict(file, self.metric.samples)
        score = self.metric.of_run(file_for(self.metric, content, extract(qmodel).graph), outputs)
        steps = [float(detail["quantization"][0]) for detail in file.outputs]
        return Scored(content=content, score=score, distance=distance(self.metric.reference, outputs, steps))

    def close(self) -> None:
        """Delete the folder, if one was written."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __reduce__(self) -> Any:
        if self._folder is None:
            try:
                pickled = pickle.dumps((self.calibration, self.metric, self.seed))
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ConfigError(
                    f"The metric {self.metric.name!r} cannot be sent to another process: {error}. Define it at the top "
                    "level of a module, or use threads."
                ) from error
            self._folder = tempfile.TemporaryDirectory(prefix="kquant-")
            self.model.save(Path(self._folder.name) / "model.keras")
            Path(self._folder.name, "rest.pickle").write_bytes(pickled)
        return _read_workbench, (self._folder.name,)


@lru_cache(maxsize=1)
def _read_workbench(path: str) -> Workbench:
    """The workbench of a folder; a worker reads it once for all of its tasks."""
    model = keras.saving.load_model(Path(path) / "model.keras", compile=False)
    return Workbench(model, *pickle.loads(Path(path, "rest.pickle").read_bytes()))


def _score(bench: Workbench, config: QuantConfig) -> Scored:
    return bench.score(config)


def score_all(bench: Workbench, configs: Sequence[QuantConfig], executor: Executor | None) -> list[Scored]:
    """The scores of configs, in order, which do not depend on the executor.

    What a worker did not finish, since it died, is done here.
    """
    if executor is None or len(configs) < 2:
        return [bench.score(config) for config in configs]
    futures = [executor.submit(_score, bench, config) for config in configs]
    found = []
    for future, config in zip(futures, configs, strict=True):
        try:
            found.append(future.result())
        except KQuantError:
            raise
        except Exception:  # whatever an executor raises for a worker that is gone
            found.append(bench.score(config))
    return found


class Journal:
    """Results by key, in a JSON file where there is a path, replaced in one step after each.

    Args:
        path: of the file, which need not exist; None keeps results in memory.
        fingerprint: of what is measured.
    """

    def __init__(self, path: str | os.PathLike[str] | None, fingerprint: str) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint = fingerprint
        self.values: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            self.values = self._read(self.path)

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found, own = dict(content["results"]), content["fingerprint"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ConfigError(f"The state {str(path)!r} cannot be read: {error!r}. Remove it.") from error
        if own != self.fingerprint:
            raise ConfigError(
                f"The state {str(path)!r} is of another model, data, metric or config: remove it, or name another file."
            )
        return found

    def note(self, key: str, value: dict[str, Any]) -> None:
        """Add a result."""
        self.values[key] = value
        if self.path is not None:
            part = self.path.with_name(self.path.name + ".part")
            part.write_text(json.dumps({"fingerprint": self.fingerprint, "results": self.values}), encoding="utf-8")
            os.replace(part, self.path)
