"""Mean, standard deviation and reach of a tensor, channel by channel, in closed form.

Channels are the entries of the last axis; the moments are those over the batch and all places. What is approximate:
pre-activations and sums count as normal. The rules by which moments travel through operations are with the operations
(`graph.ops`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

Array = np.ndarray[Any, Any]

SIGMAS = 6.0  # a normal variable reaches this many standard deviations (alpha of eq. 18-19, Nagel et al. 2019)
POINTS = np.linspace(-SIGMAS, SIGMAS, 241)[:, None]  # the trapezoidal rule on them is off by 1e-4 at a kink
FAR = 40.0  # standard deviations beyond which nothing lies
_DENSITY = np.exp(-np.square(POINTS) / 2)


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of a tensor without data; all float64 [channels].

    Attributes:
        mean: expectation.
        std: standard deviation.
        low: about the smallest value: `SIGMAS` standard deviations below the mean of what is normal, and never
            outside the bounds of an activation.
        high: about the largest value, likewise.
    """

    mean: Array
    std: Array
    low: Array
    high: Array

    @classmethod
    def normal(cls, mean: Any, std: Any, sigmas: float = SIGMAS) -> Moments:
        """Of normal variables that reach `sigmas` standard deviations."""
        mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
        return cls(mean, std, mean - sigmas * std, mean + sigmas * std)

    @classmethod
    def sample(cls, x: Array) -> Moments:
        """Of an array whose last axis holds the channels."""
        rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1] if x.ndim else 1)
        return cls(rows.mean(0), rows.std(0), rows.min(0), rows.max(0))

    @classmethod
    def mixture(cls, parts: Sequence[Moments], shares: Any) -> Moments:
        """Of a tensor of which part i makes up shares[i]; the shares add up to 1."""
        share = np.asarray(shares, np.float64)[:, None]
        means, stds = np.stack([p.mean for p in parts]), np.stack([p.std for p in parts])
        mean = (share * means).sum(0)
        var = (share * (np.square(stds) + np.square(means - mean))).sum(0)
        return cls(mean, np.sqrt(var), np.min([p.low for p in parts], 0), np.max([p.high for p in parts], 0))

    def map(self, f: Callable[[Array], Array]) -> Moments:
        """The same function of all four, e.g. a selection of channels."""
        return Moments(f(self.mean), f(self.std), f(self.low), f(self.high))

    def clip(self, lo: Any, hi: Any) -> Moments:
        """Behind min(max(x, lo), hi) with None for no bound; closed form for a normal x."""
        lo, hi = -np.inf if lo is None else np.asarray(lo, np.float64), np.inf if hi is None else np.asarray(hi)
        mean, std = clipped_normal(self.mean, self.std, lo, hi)
        cut = (self.low < lo) | (self.high > hi)
        low, high = np.clip(self.low, lo, hi), np.clip(self.high, lo, hi)
        return Moments(np.where(cut, mean, self.mean), np.where(cut, std, self.std), low, high)


def clipped_normal(mean: Array, std: Array, lo: Any, hi: Any) -> tuple[Array, Array]:
    """Mean and standard deviation of min(max(x, lo), hi) for x ~ N(mean, std^2).

    With a = (lo - mean) / std, b = (hi - mean) / std, phi the density and Phi the distribution of N(0, 1),
    z = min(max((x - mean) / std, a), b) has

        E[z]   = a Phi(a) + b Phi(-b) + phi(a) - phi(b)
        E[z^2] = a^2 Phi(a) + b^2 Phi(-b) + 1 - Phi(a) - Phi(-b) + a phi(a) - b phi(b)

    (white paper section 3.3 for lo = 0 without hi; Nagel et al. 2019, appendix C, with both).

    Args:
        mean: [channels].
        std: [channels]; 0 is a constant.
        lo: () or [channels], -inf for none.
        hi: () or [channels], inf for none.
    """
    scale = np.where(std > 0, std, 1.0)
    a, b = (np.clip((edge - mean) / scale, -FAR, FAR) for edge in (lo, hi))
    below, above, at_a, at_b = phi(a), phi(-b), density(a), density(b)
    z = a * below + b * above + at_a - at_b
    square = a * a * below + b * b * above + 1 - below - above + a * at_a - b * at_b
    spread = np.sqrt(np.maximum(square - z * z, 0.0))
    return np.clip(np.where(std > 0, mean + scale * z, mean), lo, hi), np.where(std > 0, scale * spread, 0.0)


def phi(x: Array) -> Array:
    """The distribution of N(0, 1)."""
    return np.asarray(0.5 * tf.math.erfc(-x / np.sqrt(2.0)).numpy())


def density(x: Array) -> Array:
    """The density of N(0, 1)."""
    return np.asarray(np.exp(-x * x / 2) / np.sqrt(2 * np.pi))


def through(f: Callable[[Array], Any], x: Moments) -> Moments:
    """Behind a function of one variable, elementwise in the channels of an array [points, channels]."""
    weight = _DENSITY / _DENSITY.sum()
    at = np.clip(x.mean + x.std * POINTS, x.low, x.high)
    y = np.asarray(f(at), np.float64)
    mean = (weight * y).sum(0)
    std = np.sqrt((weight * np.square(y - mean)).sum(0))
    reach = np.asarray(f(np.linspace(x.low, x.high, len(POINTS))), np.float64)
    return Moments(mean, std, reach.min(0), reach.max(0))


def regroup(x: Moments, period: int, channels: int | None) -> Moments:
    """What channels i, i + period, i + 2 period ... have together, repeated to `channels`."""
    parts = [x.map(lambda v, k=k: v[k : k + period]) for k in range(0, len(x.mean), period)]  # type: ignore[misc]
    mixed = Moments.mixture(parts, np.full(len(parts), 1 / len(parts)))
    return mixed.map(lambda v: np.resize(v, int(channels or 1)))


def joined(parts: Sequence[Moments]) -> Moments:
    """The channels of all parts, one after the other."""
    return Moments(*(np.concatenate([getattr(p, k) for p in parts]) for k in ("mean", "std", "low", "high")))
