"""What is known of a weight before it is read: the width of its distribution and its centre.

Weights lie in a matrix [outputs, taps, inputs]. The width is a product of a factor for each output, tap and input, as
far as these pay for themselves; the centre is predicted from the taps of the same kernel that come before, since
the taps of a trained kernel are alike. Codes of few distinct integers stand for them by rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from kquant.targets.storage.packing.distributions import (
    CENTRES,
    ENDS,
    OCTAVE,
    WIDTHS,
    Profile,
    centre_of,
    width_of,
)
from kquant.targets.storage.packing.rans import TOTAL

Array = np.ndarray

UNIT = 64  # of the coefficients of the prediction
NEIGHBOURS = 8
_MOST_TAPS = 64
_FACTOR_BITS, _COEFFICIENT_BITS = 3.0, 4.5  # about, when coded
_TINY = 0.02
_FEW = 64  # values, whose frequencies may be told one by one
_SAMPLE = 4096
_MIDDLE = CENTRES // 2


@dataclass(frozen=True, eq=False)
class Model:
    """How the weights of one tensor are coded.

    Attributes:
        shape: outputs, taps, inputs.
        outputs, taps, inputs: quarter octaves of the factors, int64; the last two are zeros where they do not pay.
        coefficients: (taps, neighbours) times UNIT, int64, or None without prediction.
        profile: of the distributions.
    """

    shape: tuple[int, int, int]
    outputs: Array
    taps: Array
    inputs: Array
    coefficients: Array | None
    profile: Profile

    @property
    def stages(self) -> int:
        """In how many steps the weights are read: those of a tap after those of the taps that it needs."""
        return 1 if self.coefficients is None else self.shape[1]

    def contexts(self, stage: int, values: Array) -> Array:
        """Width and centre of the values of one stage, as one number: width * CENTRES + centre.

        Args:
            stage: below `stages`.
            values: int64 (outputs, taps, inputs); those of earlier stages are read.
        """
        if self.coefficients is None:
            width = self.outputs[:, None, None] + self.taps[:, None] + self.inputs
            return (np.clip(width, 0, WIDTHS - 1) * CENTRES + _MIDDLE).reshape(-1)
        width = np.clip(self.outputs[:, None] + self.taps[stage] + self.inputs, 0, WIDTHS - 1)
        mean = np.zeros(width.shape, np.int64)
        for tap, c in zip(_neighbours(self.shape[1])[stage], self.coefficients[stage].tolist(), strict=False):
            if c:
                mean += values[:, tap] * c
        return (width * CENTRES + centre_of(mean, UNIT, width)).reshape(-1)

    def at(self, stage: int) -> tuple[slice, slice | int, slice]:
        """Where the values of a stage are."""
        every = slice(None)
        return (every, every if self.coefficients is None else stage, every)


@cache
def _neighbours(taps: int) -> list[list[int]]:
    """For each tap the nearest ones before it, on a square where they make one, else on a line."""
    side = int(round(taps**0.5))
    side = side if side * side == taps else 1
    places = [(t // side, t % side) for t in range(taps)]

    def near(t: int) -> list[int]:
        order = sorted(range(t), key=lambda u: sum((a - b) ** 2 for a, b in zip(places[t], places[u], strict=True)))
        return order[:NEIGHBOURS]

    return [near(t) for t in range(taps)]


def fit(values: Array, low: int, high: int) -> Model:
    """A model of some weights.

    Args:
        values: int64 (outputs, taps, inputs), between `low` and `high`.
        low, high: at most 255 apart.
    """
    v = values.astype(np.float32)
    factors, cost = _factors(v, sweeps=1)
    residual, coefficients = v, None
    if 1 < v.shape[1] <= _MOST_TAPS:
        made = _predictor(v / (factors[0] * factors[2]))
        predicted = v - _predicted(v, made)
        less = _factors(predicted, sweeps=1)[1] + _COEFFICIENT_BITS * np.count_nonzero(made) + v.shape[1]
        if less < cost:
            residual, coefficients = predicted, made
    factors, _ = _factors(residual, sweeps=2)
    z = (residual / (factors[0] * factors[1] * factors[2])).reshape(-1)
    quarters = [np.rint(np.log2(f.reshape(-1)) * OCTAVE).astype(np.int64) for f in factors]
    quarters[0] = width_of(factors[0].reshape(-1))
    profile = Profile(low, high, _family(z), _ends(values, z, low, high))
    model = Model(v.shape, quarters[0], quarters[1], quarters[2], coefficients, profile)
    return _tilted(model, values) if high - low < _FEW else model


def _factors(v: Array, sweeps: int) -> tuple[list[Array], float]:
    """Widths of outputs, taps and inputs whose product fits the values, and the bits that they cost.

    A Gaussian of width s takes log2(s) bits and a constant; a factor is taken if that falls by more than it costs.
    """
    squares, shape = np.square(v), v.shape
    overall = max(float(np.sqrt(squares.mean())), _TINY)
    factors = [np.full(n, overall if k == 0 else 1.0, np.float32) for k, n in enumerate(shape)]
    logs = [v.size * float(np.log2(overall)), 0.0, 0.0]  # of the factors, over all values
    cost, taken = logs[0], [False] * 3
    for axis in (0, 1, 2) * sweeps:
        size = shape[axis]
        if size == 1:
            continue
        sums = _sums(squares, [1 / np.square(f) for f in factors], axis)
        steps = np.log2(np.maximum(np.sqrt(sums * (size / v.size)), _TINY * (overall if axis == 0 else 1.0)))
        if axis:  # only the outputs' factor has a size of its own
            steps -= steps.mean()
        steps = np.rint(steps * OCTAVE) / OCTAVE
        new, log = np.exp2(steps).astype(np.float32), v.size / size * float(steps.sum())
        bits = sum(logs) - logs[axis] + log + 0.7213 * (float(np.sum(sums / np.square(new))) - v.size)
        bits += sum(_FACTOR_BITS * shape[k] for k in range(3) if taken[k] or k == axis)
        if bits < cost:
            factors[axis], logs[axis], cost, taken[axis] = new, log, bits, True
    a, t, i = factors
    return [a[:, None, None], t[None, :, None], i[None, None, :]], cost


def _sums(squares: Array, inverse: list[Array], axis: int) -> Array:
    """Sums of squares over the other axes, divided by their factors' squares."""
    o, t, i = squares.shape
    if axis == 0:
        return squares.reshape(o, t * i) @ np.outer(inverse[1], inverse[2]).reshape(-1)
    rest = (inverse[0] @ squares.reshape(o, t * i)).reshape(t, i)
    return rest @ inverse[2] if axis == 1 else inverse[1] @ rest


def _predictor(u: Array) -> Array:
    """(taps, neighbours) times UNIT: the linear prediction of each tap from its neighbours, by least squares."""
    taps = u.shape[1]
    flat = np.ascontiguousarray(u.transpose(1, 0, 2)).reshape(taps, -1)
    gram = flat @ flat.T + np.eye(taps, dtype=np.float32)
    made = np.zeros((taps, NEIGHBOURS), np.int64)
    for t, near in enumerate(_neighbours(taps)):
        if near:
            found = np.linalg.solve(gram[np.ix_(near, near)], gram[near, t])
            made[t, : len(near)] = np.clip(np.rint(found * UNIT), -127, 127)
    return made


def _predicted(v: Array, coefficients: Array) -> Array:
    """The centres that the coefficients say."""
    mean = np.zeros_like(v)
    for t, near in enumerate(_neighbours(v.shape[1])):
        for tap, c in zip(near, coefficients[t].tolist(), strict=False):
            if c:
                mean[:, t] += v[:, tap] * np.float32(c / UNIT)
    return mean


def _family(z: Array) -> int:
    """The curve under which standardized values are most likely."""
    z = np.abs(z[:: max(1, len(z) // _SAMPLE)])
    spread = np.exp(-1.8137993642342178 * z)
    gauss = np.exp(-z * z / 2) / 2.5066282746
    logistic = 1.8137993642342178 * spread / np.square(1 + spread)
    laplace = np.exp(-1.4142135623730951 * z) / 1.4142135623730951
    curves = (gauss, (gauss + logistic) / 2, (logistic + laplace) / 2)
    return int(np.argmax([np.sum(np.log(c + 1e-9)) for c in curves]))


def _ends(values: Array, z: Array, low: int, high: int) -> int:
    """How much more often than a Gaussian says the values are at an end of the range."""
    at_end = float(np.mean((values == low) | (values == high)))
    beyond = float(np.mean(np.abs(z) > 3))
    shares = np.array(ENDS) / 1024
    return int(np.argmin(np.abs(shares - max(0.0, at_end - beyond / 4))))


def _tilted(model: Model, values: Array) -> Model:
    """The model with frequencies of single values, where these pay for themselves."""
    size = model.profile.high - model.profile.low + 1
    contexts = np.concatenate([model.contexts(s, values) for s in range(model.stages)])
    found = np.concatenate([values[model.at(s)].reshape(-1) for s in range(model.stages)]) - model.profile.low
    places = np.flatnonzero(np.bincount(contexts, minlength=WIDTHS * CENTRES))
    row = np.zeros(WIDTHS * CENTRES, np.int64)
    row[places] = np.arange(len(places))
    counts = np.bincount(row[contexts] * size + found, minlength=len(places) * size).reshape(-1, size)
    where, tried = np.divmod(places, CENTRES), [model.profile]
    freq = [tried[0].frequencies(*where)[:, :size]]
    for _ in range(2):
        expected = counts.sum(axis=1) @ freq[-1] / TOTAL
        steps = np.rint(OCTAVE * np.log2(np.maximum(counts.sum(axis=0), 0.25) / np.maximum(expected, 1e-3)))
        tilt = np.clip(np.asarray(tried[-1].tilt or (0,) * size) + steps, -31, 31)
        tried.append(replace(model.profile, tilt=tuple(int(t) for t in tilt)))
        freq.append(tried[-1].frequencies(*where)[:, :size])
    bits = [8.0 * len(p.tilt) - float(np.sum(counts * np.log2(f))) for p, f in zip(tried, freq, strict=True)]
    return replace(model, profile=tried[int(np.argmin(bits))])
