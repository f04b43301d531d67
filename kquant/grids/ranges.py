"""Choosing the range that a grid covers: min-max, percentile, mean squared error, cross-entropy, batch norm.

Section 3.1 of the white paper (arXiv 2106.08295). All methods for weights have one signature, all
methods for activations another; a new method is a function and an entry in its table. A range
always contains 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kquant.config.specs import QuantSpec
from kquant.errors import ConfigError, ModelError
from kquant.grids.grid import fake_quantize, grid_from_range
from kquant.grids.observers import Histogram, MinMax, Rows

Array = np.ndarray[Any, Any]
Range = tuple[Array, Array]


@runtime_checkable
class ChannelMoments(Protocol):
    """What is known of a tensor without data, by channel; see `ptq.moments.Moments`."""

    @property
    def mean(self) -> Array: ...
    @property
    def std(self) -> Array: ...
    @property
    def low(self) -> Array: ...
    @property
    def high(self) -> Array: ...


Observer = MinMax | Histogram | Rows | ChannelMoments

# 16 coarse and 14 golden-section evaluations: measured within 0.1 % of a 1000-point grid.
_COARSE = 16
_REFINE = 14
_GOLDEN = (5**0.5 - 1) / 2
_NEGLIGIBLE = 1e-6  # nats
_BLOCK = 2**16  # weights searched together: temporaries stay in the cache


def weight_range(method: str, w: Array, spec: QuantSpec, axis: int | None = None, name: str = "") -> Range:
    """The range of a weight tensor.

    Args:
        method: key of `WEIGHT_METHODS`.
        w: the weights.
        spec: the grid that they will get.
        axis: the axis of the channels; None for one range of the whole tensor.
        name: the layer's name, for messages.

    Returns:
        (low, high), float32 of shape () or (channels,), low <= 0 <= high.

    Raises:
        ModelError: w is empty or holds NaN or infinite values.
        ConfigError: an unknown method.
    """
    w = finite_weights(w, name)
    rows = w.reshape(1, -1) if axis is None else np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
    low, high = _contain_zero(*_lookup(WEIGHT_METHODS, method)(rows, spec))
    return (low[0], high[0]) if axis is None else (low, high)


def finite_weights(w: Any, name: str = "") -> Array:
    """Weights as a float32 array.

    Raises:
        ModelError: it is empty or holds NaN or infinite values.
    """
    w = np.asarray(w, np.float32)
    if not w.size or not np.isfinite(w).all():
        found = "NaN or infinite values" if w.size else f"no values (shape {w.shape})"
        raise ModelError(f"The weights of layer {name!r} hold {found}; repair the model, or retrain it.")
    return w


def activation_range(method: str, observer: Observer, spec: QuantSpec) -> Range:
    """The range of an activation.

    Args:
        method: key of `ACTIVATION_METHODS`.
        observer: what was seen of the tensor; "percentile" and "mse" need a `Histogram`, "cross_entropy" `Rows`,
            "batch_norm" `ptq.moments.Moments`.
        spec: the grid that the tensor will get.

    Returns:
        (low, high), float32 of shape (), low <= 0 <= high.

    Raises:
        CalibrationError: the observer has seen no data.
        ConfigError: an unknown method, or one that needs another observer.
    """
    return _contain_zero(*_lookup(ACTIVATION_METHODS, method)(observer, spec))


def _lookup(table: Mapping[str, Any], method: str) -> Any:
    if method not in table:
        raise ConfigError(f"Unknown range method {method!r}; use one of {', '.join(table)}.")
    return table[method]


def _contain_zero(low: Any, high: Any) -> Range:
    return np.minimum(np.asarray(low, np.float32), np.float32(0)), np.maximum(
        np.asarray(high, np.float32), np.float32(0)
    )


def _weight_min_max(rows: Array, spec: QuantSpec) -> Range:
    return rows.min(axis=1), rows.max(axis=1)


def _weight_percentile(rows: Array, spec: QuantSpec) -> Range:
    low, high = np.percentile(rows, [100 - spec.percentile, spec.percentile], axis=1)
    return low, high


def _weight_mse(rows: Array, spec: QuantSpec) -> Range:
    """The min-max range of each row, shrunk to the smallest squared error (eq. 10)."""
    low, high = _contain_zero(*_weight_min_max(rows, spec))
    count = max(1, _BLOCK // rows.shape[1])
    blocks = [slice(i, i + count) for i in range(0, len(rows), count)]
    ratio = np.concatenate([_best_ratio(rows[b], low[b], high[b], spec) for b in blocks])
    return low * ratio, high * ratio


def _best_ratio(rows: Array, low: Array, high: Array, spec: QuantSpec) -> Array:
    def cost(ratio: Array) -> Array:
        error = fake_quantize(rows, grid_from_range(low * ratio, high * ratio, spec, axis=0))
        error -= rows
        return np.square(error, out=error).sum(axis=1, dtype=np.float64)

    return _search(lambda ratios: np.stack([cost(ratio) for ratio in ratios]), len(rows))


def _activation_min_max(observer: Observer, spec: QuantSpec) -> Range:
    return observer.low, observer.high


def _activation_percentile(observer: Observer, spec: QuantSpec) -> Range:
    histogram = _histogram(observer)
    return np.asarray(histogram.percentile(100 - spec.percentile)), np.asarray(histogram.percentile(spec.percentile))


def _activation_mse(observer: Observer, spec: QuantSpec) -> Range:
    """The min-max range, shrunk to the smallest expected squared error (eq. 10).

    Where the grid is finer than the histogram's cells, clipping cannot be weighed against rounding
    and hardly pays: the min-max range is kept.
    """
    histogram = _histogram(observer)
    low, high = _contain_zero(histogram.low, histogram.high)
    if float(high) - float(low) < histogram.width * (2**spec.bits - 1):
        return low, high
    # Zeros are exact on every grid, so they decide nothing.
    values, counts = histogram.nonzero()
    values = values.astype(np.float32)

    def cost(low: Array, high: Array) -> Array:
        tried = np.broadcast_to(values, (len(low), len(values)))
        error = fake_quantize(tried, grid_from_range(low, high, spec, axis=0)) - values
        return np.square(error, dtype=np.float64) @ counts

    return _shrink(cost, low, high, spec)


def _activation_cross_entropy(observer: Observer, spec: QuantSpec) -> Range:
    """The min-max range of logits, shrunk to the smallest mean cross-entropy H(softmax(v), softmax(v_q)).

    Section 3.1 of the white paper: "it is important to preserve the order of the largest value", and
    most of the smaller ones hardly matter. Within 1e-6 nats of the float model's own entropy nothing
    is left to win, so 16 bits keep the min-max range.
    """
    if not isinstance(observer, Rows):
        raise ConfigError('method="cross_entropy" needs rows of logits (`observers.Rows`); use method="min_max".')
    logits = np.ascontiguousarray(observer.rows.T)  # (classes, rows): sums over a short last axis are slow
    expected = np.exp(logits - logits.max(axis=0), dtype=np.float64)
    expected /= expected.sum(axis=0) * logits.shape[1]

    def cross_entropy(v: Array) -> float:
        v = v - v.max(axis=0)
        return float(np.log(np.exp(v).sum(axis=0, dtype=np.float64)).mean() - (expected * v).sum())

    floor = cross_entropy(logits) + _NEGLIGIBLE

    def cost(low: Array, high: Array) -> Array:
        grids = (grid_from_range(*edges, spec) for edges in zip(low, high, strict=True))
        return np.array([max(floor, cross_entropy(fake_quantize(logits, q))) for q in grids])

    return _shrink(cost, *_contain_zero(observer.low, observer.high), spec)


def _shrink(cost: Callable[[Array, Array], Array], low: Array, high: Array, spec: QuantSpec) -> Range:
    """The range within [low, high] of the smallest cost(lows, highs), which compares several ranges at once.

    Both edges are shrunk together, and for an asymmetric grid one after the other then.
    """

    def shrink(low: Array, high: Array, at_low: bool, at_high: bool) -> Range:
        def edges(ratio: Array) -> Range:
            kept = np.ones_like(ratio)
            return low * (ratio if at_low else kept), high * (ratio if at_high else kept)

        return edges(_search(lambda ratios: cost(*edges(ratios[:, 0]))[:, None], 1)[0])

    low, high = shrink(low, high, True, True)
    if not spec.symmetric and low < 0 < high:
        for _ in range(2):
            low, high = shrink(*shrink(low, high, False, True), True, False)
    return low, high


def _activation_batch_norm(observer: Observer, spec: QuantSpec) -> Range:
    """min_c(mean - alpha std) to max_c(mean + alpha std), within the bounds of the activation (eq. 18-19).

    The moments hold the edges of every channel, with the alpha of 6 of Nagel et al. 2019.
    """
    if not isinstance(observer, ChannelMoments):
        raise ConfigError('method="batch_norm" needs moments (`ptq.moments.propagate`), not data; use "min_max".')
    return observer.low.min(), observer.high.max()


def _histogram(observer: Observer) -> Histogram:
    if not isinstance(observer, Histogram):
        raise ConfigError('This range method needs a histogram of the activations; use method="min_max".')
    return observer


def _search(cost: Callable[[Array], Array], rows: int) -> Array:
    """The factor in (0, 1] with the smallest cost, for each row on its own.

    A coarse grid finds the valley and a golden-section search its bottom; the best factor of all
    that were tried wins, 1 among ties with it.

    Args:
        cost: (tried, rows) factors -> (tried, rows) costs.
        rows: number of independent searches.

    Returns:
        (rows,) float32.
    """
    step = np.float32(1 / _COARSE)
    ratios = np.arange(_COARSE, 0, -1, dtype=np.float32) * step
    costs = cost(np.broadcast_to(ratios[:, None], (_COARSE, rows)))
    best, least = ratios[costs.argmin(axis=0)], costs.min(axis=0)

    def attempt(ratio: Array) -> Array:
        nonlocal best, least
        found = cost(ratio[None])[0]
        better = found < least
        best, least = np.where(better, ratio, best), np.where(better, found, least)
        return found

    a, b = np.maximum(best - step, step / _COARSE), np.minimum(best + step, np.float32(1))
    inner = [b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)]
    values = [attempt(x.astype(np.float32)) for x in inner]
    for _ in range(_REFINE - 2):
        left = values[0] < values[1]  # the minimum lies left of the right inner point
        a, b = np.where(left, a, inner[0]), np.where(left, inner[1], b)
        fresh = np.where(left, b - _GOLDEN * (b - a), a + _GOLDEN * (b - a))
        found = attempt(fresh.astype(np.float32))
        inner = [np.where(left, fresh, inner[1]), np.where(left, inner[0], fresh)]
        values = [np.where(left, found, values[1]), np.where(left, values[0], found)]
    return best


WEIGHT_METHODS: Mapping[str, Callable[[Array, QuantSpec], Range]] = MappingProxyType(
    {"min_max": _weight_min_max, "percentile": _weight_percentile, "mse": _weight_mse}
)
ACTIVATION_METHODS: Mapping[str, Callable[[Observer, QuantSpec], Range]] = MappingProxyType(
    {
        "min_max": _activation_min_max,
        "percentile": _activation_percentile,
        "mse": _activation_mse,
        "cross_entropy": _activation_cross_entropy,
        "batch_norm": _activation_batch_norm,
    }
)
