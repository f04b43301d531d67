"""Evaluation samples, held in memory, and a model's outputs for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from kquant.errors import CalibrationError
from kquant.graph.ir import Graph
from kquant.graph.structure import pack
from kquant.quantize.data import CalibrationData, InputSpec
from kquant.targets.litert.runtime import TFLiteModel

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled or unlabelled samples.

    Attributes:
        batches: per batch one array per input of the model, float32 or int32.
        labels: of all samples in order, [n, ...], or a dict of such arrays by the outputs' names; None where there are
            none.
        names: the inputs' names.
        outputs: the outputs' names.
    """

    batches: tuple[tuple[Array, ...], ...]
    labels: Any
    names: tuple[str, ...]
    outputs: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(len(batch[0]) for batch in self.batches)

    def for_output(self, name: str) -> Samples:
        """The same with the labels of one output alone; without any where there are none for it."""
        labels = self.labels.get(name) if isinstance(self.labels, Mapping) else self.labels
        return replace(self, labels=labels)

    @property
    def flat_labels(self) -> list[Array]:
        """The arrays of labels, in the order of their names where they have any."""
        return [y for y in keras.tree.flatten(self.labels) if y is not None]

    def first(self, count: int) -> Samples:
        """The first `count` samples."""
        batches, left = [], count
        for batch in self.batches:
            if left <= 0:
                break
            batches.append(tuple(x[:left] for x in batch))
            left -= len(batch[0])
        return replace(self, batches=tuple(batches), labels=self._labels_at(slice(count)))

    def chosen(self, mask: Array) -> Samples:
        """Those where `mask` [samples] is true, in batches of 32."""
        arrays = [np.concatenate(column)[mask] for column in zip(*self.batches, strict=True)]
        batches = tuple(tuple(x[k : k + 32] for x in arrays) for k in range(0, int(mask.sum()), 32))
        return replace(self, batches=batches, labels=self._labels_at(mask))

    def _labels_at(self, index: Any) -> Any:
        if isinstance(self.labels, Mapping):
            return {name: y[index] for name, y in self.labels.items()}
        return None if self.labels is None else self.labels[index]

    def __iter__(self) -> Iterator[list[Array]]:
        return (list(batch) for batch in self.batches)


def read_samples(data: Any, graph: Graph, *, limit: int | None = None, batch_size: int = 32) -> Samples:
    """Samples with their labels, read once and held in memory: bound them with `limit`.

    Args:
        data: of any kind that `quantize_model` takes (see `kquant.data`); the y of (x, y) are labels.
        graph: names, shapes and types of the inputs.
        limit: at most so many samples.
        batch_size: into how many samples arrays are cut.

    Raises:
        CalibrationError: the data is missing, empty or does not fit, or has another number of labels than samples.
    """
    specs = [(name, graph[i].shape, graph[i].dtype) for i, name in zip(graph.inputs, graph.input_names, strict=True)]
    source = _Labelled(data, specs, batch_size, limit)
    batches = tuple(tuple(batch) for batch in source)
    labels = source.labels(sum(len(b[0]) for b in batches))
    return Samples(batches, labels, tuple(graph.input_names), tuple(graph.output_names))


class _Labelled(CalibrationData):
    """Calibration data that remembers the labels of one pass."""

    def __init__(self, source: Any, specs: Sequence[InputSpec], batch_size: int, limit: int | None) -> None:
        super().__init__(source, specs, batch_size, limit)
        self._seen: list[Any] = []
        whole = isinstance(source, tuple | Mapping) or hasattr(source, "__array__")
        if whole:
            self._seen = [_labels_of(source, len(specs))]
            return
        batches = self._open

        def recorded() -> Iterator[Any]:
            for batch in batches():
                self._seen.append(_labels_of(batch, len(specs)))
                yield batch

        self._open = recorded

    def labels(self, count: int) -> Any:
        """The labels of the first `count` samples, which are all that were read."""
        known = [y for y in self._seen if y is not None]
        if not known:
            return None
        if not isinstance(known[0], Mapping):
            return self._joined([np.asarray(y) for y in known], count)
        return {name: self._joined([np.asarray(y[name]) for y in known], count) for name in known[0]}

    def _joined(self, known: list[Array], count: int) -> Array:
        total = sum(len(y) if y.ndim else 0 for y in known)
        if len(known) != len(self._seen) or total < count or (self._limit is None and total != count):
            raise CalibrationError(
                f"The data has {count} samples and {total} labels, {len(known)} of {len(self._seen)} batches having "
                "any: pass one label per sample, as (x, y)."
            )
        return np.concatenate(known)[:count]


def _labels_of(batch: Any, inputs: int) -> Any:
    """The y of (x, y) or (x, y, sample_weight), as `kquant.data` reads a batch."""
    pair = isinstance(batch, list | tuple) and 2 <= len(batch) <= 3
    return batch[1] if pair and (inputs == 1 or not hasattr(batch[0], "__array__")) else None


def predict(model: Any, samples: Samples) -> list[Array]:
    """All outputs of a model, [n, ...] each: float32, or the integers that they are.

    Args:
        model: a Keras model (the user's, or a `QuantizedModel`) or a `TFLiteModel`.
        samples: what to run it on.
    """
    if isinstance(model, TFLiteModel):
        return model.predict_batches(samples)
    results = [model.predict_on_batch(_as_fed(model, batch)) for batch in samples]
    columns = zip(*(keras.tree.flatten(y) for y in results), strict=True)
    return [np.concatenate([_real(part) for part in column]) for column in columns]


def _real(output: Any) -> Array:
    """An output as an array; floats as float32."""
    array = np.asarray(output)
    return array if array.dtype.kind in "iub" else array.astype(np.float32)


def _as_fed(model: Any, batch: list[Array]) -> Any:
    """A batch in the structure that the model was made with."""
    structure = getattr(model, "_inputs_struct", None)
    return pack(None, batch) if structure is None else keras.tree.pack_sequence_as(structure, batch)
