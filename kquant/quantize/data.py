"""Calibration data of any usual kind, as checked batches in the order of the model's inputs.

Understood are:

* a numpy array or tensor, for several inputs a list or tuple with one for each, or a dict by input name;
* a tuple (x, y) or (x, y, sample_weight) with such an x (a tuple is never a sequence of batches);
* a `tf.data.Dataset`, a `keras.utils.PyDataset`, or any iterable of batches;
* a function without arguments that returns an iterable of batches.

A batch is x, (x, y), (x, y, sample_weight) or a dict by input name, where x is an array or, for
several inputs, a list or tuple of arrays, or a dict nested as the model's inputs are. Labels and sample
weights are ignored. Nothing is held in memory beyond the current batch; a generator can be read once only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kquant.errors import CalibrationError

Array = np.ndarray[Any, Any]
InputSpec = tuple[str, tuple[int | None, ...], str]  # name, shape with None for the batch, dtype
Open = Callable[[], Iterator[Any]]  # starts a pass

_SAMPLE = 4  # samples kept at most,
_KEPT = 2**18  # of about so many values together: large images show as much alone

_REMEDY = "Pass an array, a dict of arrays by input name, a tf.data.Dataset, a PyDataset or an iterable of batches."


class CalibrationData:
    """Batches of float32, int32 or bool arrays, one per model input; can be iterated repeatedly.

    Args:
        source: see the module's docstring.
        input_specs: (name, shape, dtype) of every model input, in order; None in a shape fits any size.
        batch_size: into how many samples arrays are cut. The batches of an iterable stay as they are.
        limit: use at most this many samples; None uses all.

    Attributes:
        num_batches: how many batches an iteration yields, None where that is not known.
        sample: the first few samples, one array per input; None before they were seen.
        byte_inputs: the inputs whose batches, as far as they were seen, are of unsigned bytes.

    Raises:
        CalibrationError: at construction or while iterating: data that is missing, empty, of the
            wrong shape, type or structure, or not finite; a second pass over a generator.
    """

    def __init__(
        self, source: Any, input_specs: Sequence[InputSpec], batch_size: int = 32, limit: int | None = None
    ) -> None:
        if source is None:
            raise CalibrationError(f"No calibration data was given. {_REMEDY}")
        if batch_size < 1 or (limit is not None and limit < 1):
            raise CalibrationError(f"batch_size and limit must be at least 1, found {batch_size} and {limit}.")
        self._specs = tuple(input_specs)
        self._limit = limit
        self._exhausted = False
        self.byte_inputs: frozenset[str] = frozenset()
        self.sample: list[Array] | None = None
        self.num_batches: int | None
        if _is_one_batch(source, len(self._specs)):
            arrays = _inputs_of(source, self._specs, "The calibration data")
            rows = _rows(arrays, self._specs, "The calibration data")
            used = rows if limit is None else min(limit, rows)
            self._open: Open = lambda: _slices(arrays, used, batch_size)
            self._one_shot, self.num_batches = False, -(-used // batch_size)
        else:
            self._open, self._one_shot, count = _open_iterable(source, limit)
            self.num_batches = count if limit is None else None

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Input -> its shape without the batch, in the first batch, which is read again afterwards."""
        opened = self._open()
        first = next(opened, None)
        if first is None:
            raise CalibrationError(f"The calibration data is empty. {_REMEDY}")
        if self._one_shot:
            rest = itertools.chain([first], opened)
            self._open = lambda: rest
        names = [name for name, _, _ in self._specs]
        return {n: x.shape[1:] for n, x in zip(names, _inputs_of(first, self._specs, "The first batch"), strict=True)}

    def of(self, input_specs: Sequence[InputSpec]) -> CalibrationData:
        """The same data for inputs of these specifications."""
        self._specs = tuple(input_specs)
        return self

    @property
    def repeatable(self) -> bool:
        """Whether it can be read more than once, which a generator cannot."""
        return not self._one_shot

    def __iter__(self) -> Iterator[list[Array]]:
        if self._exhausted:
            raise CalibrationError(
                "The calibration data is a generator, which can be read once, and a second pass is needed. "
                "Pass the function that creates the generator (without calling it), or a list of batches."
            )
        self._exhausted = self._one_shot
        return self._iterate()

    def _iterate(self) -> Iterator[list[Array]]:
        seen = 0
        for index, batch in enumerate(self._open()):
            where = f"Batch {index} of the calibration data"
            inputs = _inputs_of(batch, self._specs, where)
            count = _rows(inputs, self._specs, where)
            if self._limit is not None:
                count = min(count, self._limit - seen)
            if count:
                self.byte_inputs = frozenset(
                    name for x, (name, _, _) in zip(inputs, self._specs, strict=True) if x.dtype == np.uint8
                )
                converted = [_convert(x[:count], spec, where) for x, spec in zip(inputs, self._specs, strict=True)]
                if self.sample is None:
                    self.sample = _first(converted)
                yield converted
            seen += count
            if seen == self._limit:
                return
        if not seen:
            raise CalibrationError(f"The calibration data is empty. {_REMEDY}")


def batches(
    data: Any, input_specs: Sequence[InputSpec], batch_size: int = 32, limit: int | None = None
) -> Iterator[list[Array]]:
    """One pass over `data`: see `CalibrationData`."""
    return iter(CalibrationData(data, input_specs, batch_size, limit))


def _is_array(x: Any) -> bool:
    """Whether x is a numpy array or tensor (a dataset has neither dtype nor shape)."""
    return hasattr(x, "dtype") and hasattr(x, "shape") and hasattr(x, "__array__")


def _is_one_batch(source: Any, inputs: int) -> bool:
    """Whether the source is all the data at once and not a sequence of batches."""
    if isinstance(source, list):
        return len(source) == inputs and all(map(_is_array, source))
    return _is_array(source) or isinstance(source, tuple | Mapping)


def _open_iterable(source: Any, limit: int | None) -> tuple[Open, bool, int | None]:
    """(function that starts a pass, whether only one pass is possible, number of batches if known)."""
    if hasattr(source, "__getitem__") and hasattr(type(source), "num_batches"):  # keras.utils.PyDataset
        try:
            count = source.num_batches
        except NotImplementedError:  # neither num_batches nor __len__ were overridden
            count = None
        indices = itertools.count() if count is None else range(count)
        _check_finite(count is not None, limit)
        return lambda: (source[i] for i in indices), False, count
    if hasattr(source, "cardinality"):  # tf.data.Dataset: -1 is infinite, -2 unknown
        count = int(source.cardinality())
        _check_finite(count != -1, limit)
        return lambda: iter(source), False, count if count >= 0 else None
    if callable(source) and not hasattr(source, "__iter__"):
        return lambda: _iter(source()), False, None
    iterator = _iter(source)
    if iterator is source:
        return lambda: iterator, True, None
    return lambda: _iter(source), False, len(source) if hasattr(source, "__len__") else None


def _iter(source: Any) -> Iterator[Any]:
    if isinstance(source, str | bytes) or not hasattr(source, "__iter__"):
        raise CalibrationError(f"Calibration data cannot be of type {type(source).__name__}. {_REMEDY}")
    return iter(source)


def _check_finite(finite: bool, limit: int | None) -> None:
    if not finite and limit is None:
        raise CalibrationError("The calibration data never ends; bound it, e.g. with dataset.take(n).")


def _slices(arrays: list[Array], rows: int, size: int) -> Iterator[tuple[list[Array]]]:
    for start in range(0, rows, size):
        yield ([a[start : min(start + size, rows)] for a in arrays],)


def _first(batch: Sequence[Array]) -> list[Array]:
    """The first samples: a few, fewer of large ones."""
    values = sum(x[:1].size for x in batch)
    few = min(_SAMPLE, max(1, _KEPT // max(values, 1)))
    return [x[:few].copy() for x in batch]


def _inputs_of(batch: Any, specs: tuple[InputSpec, ...], where: str) -> list[Array]:
    """One raw array per model input, without labels and sample weights."""
    x = batch
    if isinstance(x, list | tuple) and 1 <= len(x) <= 3 and (len(specs) == 1 or not _is_array(x[0])):
        x = x[0]  # of (x, y) or (x, y, sample_weight)
    names = [name for name, _, _ in specs]
    if isinstance(x, Mapping) and any(isinstance(part, Mapping | list | tuple) for part in x.values()):
        x = keras.tree.flatten(x)  # nested as the model's inputs are
    if isinstance(x, Mapping):
        unknown, missing = [k for k in x if k not in names], [n for n in names if n not in x]
        if unknown or missing:
            raise CalibrationError(
                f"{where} has the keys {list(x)} and the model has the inputs {names}: "
                f"unknown {unknown}, missing {missing}. Rename the keys."
            )
        x = [x[name] for name in names]
    if not isinstance(x, list | tuple):
        x = [x]
    if len(x) != len(specs):
        raise CalibrationError(
            f"{where} holds {len(x)} arrays where the model has {len(specs)} inputs {names}; pass one array for each."
        )
    return [_raw(values, where) for values in x]


def _raw(values: Any, where: str) -> Array:
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as error:
        raise CalibrationError(f"{where} cannot be read as an array: {error}. {_REMEDY}") from error


def _rows(inputs: list[Array], specs: tuple[InputSpec, ...], where: str) -> int:
    """The number of samples, after types and shapes were checked."""
    for x, (name, shape, _) in zip(inputs, specs, strict=True):
        if x.dtype.kind not in "fiub":
            raise CalibrationError(
                f"{where}: input {name!r} needs real numbers, found dtype {x.dtype}; convert text, objects "
                "and complex numbers to floats of one shape."
            )
        if x.ndim != len(shape) or any(s not in (None, n) for s, n in zip(shape[1:], x.shape[1:], strict=True)):
            hint = "check the preprocessing"
            if x.ndim == len(shape) - 1:
                hint = "add a batch dimension, e.g. x[None] for one sample or dataset.batch(32)"
            raise CalibrationError(f"{where}: input {name!r} has the shape {shape}, found {x.shape}; {hint}.")
    counts = [len(x) for x in inputs]
    if len(set(counts)) != 1:
        raise CalibrationError(f"{where} has inputs of different lengths {counts}; pass as many samples of each.")
    return counts[0]


def _convert(x: Array, spec: InputSpec, where: str) -> Array:
    """x as float32, or as int32 or bool where the model reads integers or truth values; finite."""
    name, _, dtype = spec
    with np.errstate(over="ignore", invalid="ignore"):
        if np.dtype(dtype).kind in "iub":
            converted = x.astype(bool if dtype == "bool" else np.int32)
            if not np.array_equal(converted, x):
                raise CalibrationError(f"{where}: input {name!r} needs {dtype} values, found others of {x.dtype}.")
            return converted
        converted = x.astype(np.float32)
    if not np.isfinite(converted).all():
        raise CalibrationError(f"{where}: input {name!r} holds NaN or infinite values; remove those samples.")
    return converted
