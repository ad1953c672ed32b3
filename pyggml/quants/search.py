"""The searches behind encoders that a formula does not define: scales and codes of least weighted squared error.

All work on many blocks at once: x and w are float32 (n, k), one row a group of weights that shares a scale. A `Projection` maps
x / scale onto the values that codes stand for; for given values the best scale is a least-squares quotient, for a given scale the
best values are the projection, so candidates are tried and the best one polished by alternating the two.
native/kernels/search.h follows the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pyggml.quants.codec import inverse, largest


def weights(x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    """The importance to use: w, or one for every weight."""
    return np.ones_like(x) if w is None else w


class Projection(Protocol):
    @property
    def extremes(self) -> tuple[float, ...]:
        """Values that the weight of largest magnitude may stand for; a single one means that the scale is positive."""
        ...

    @property
    def jitter(self) -> np.ndarray:
        """Offsets of that value to try."""
        ...

    def __call__(self, t: np.ndarray, w: np.ndarray) -> np.ndarray:
        """The values nearest to t (n, k) under the weights w."""
        ...


@dataclass(frozen=True)
class Integers:
    """Integers low .. high."""

    low: int
    high: int

    @property
    def extremes(self) -> tuple[float, ...]:
        return (self.low, self.high)

    @property
    def jitter(self) -> np.ndarray:
        return np.linspace(-0.9, 0.9, 19, dtype=np.float32)

    def __call__(self, t: np.ndarray, w: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(t), self.low, self.high)


class Table:
    """The values of a table, sorted or not."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = np.array(sorted(set(values.tolist())), np.float32)          # np.unique imports a module of 10 ms
        self.middles = (self.values[1:] + self.values[:-1]) / 2
        self.extremes = (float(self.values[0]), float(self.values[-1]))
        self.jitter = np.linspace(-0.2, 0.2, 15, dtype=np.float32) * self.values[-1]

    def __call__(self, t: np.ndarray, w: np.ndarray) -> np.ndarray:
        return self.values[np.searchsorted(self.middles, t)]


def best_scale(x: np.ndarray, w: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The scale (n, 1) of least error for values v."""
    return (w * x * v).sum(axis=1, keepdims=True) * inverse((w * v * v).sum(axis=1, keepdims=True))


def fit_scale(x: np.ndarray, w: np.ndarray, project: Projection, polish: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Scale (n, 1) and values (n, k) of least weighted squared error of scale * values."""
    top = largest(x)
    if len(project.extremes) == 1:                            # signs are in the values: the scale is positive
        top = np.abs(top)
    best_d, best_gain = np.zeros_like(top), np.zeros_like(top)

    def consider(v: np.ndarray) -> None:
        nonlocal best_d, best_gain
        product, square = (w * x * v).sum(axis=1, keepdims=True), (w * v * v).sum(axis=1, keepdims=True)
        gain = product * product * inverse(square)           # what scale * v takes off the error of all zeros
        better = gain > best_gain
        best_d = np.where(better, product * inverse(square), best_d)
        best_gain = np.where(better, gain, best_gain)

    for extreme in project.extremes:
        for offset in project.jitter:
            consider(project(x * ((np.float32(extreme) + offset) * inverse(top)), w))
    for _ in range(polish):
        consider(project(x * inverse(best_d), w))
    d = best_d.astype(np.float16).astype(np.float32)
    return d, project(x * inverse(d), w)


def solve_affine(x: np.ndarray, w: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The p, q (n, 1) that minimize the sum of w (x - p a - q b)^2; where a and b are parallel, q is 0."""
    aa, ab, bb = ((w * u * v).sum(axis=1, keepdims=True, dtype=np.float64) for u, v in ((a, a), (a, b), (b, b)))
    xa, xb = ((w * x * u).sum(axis=1, keepdims=True, dtype=np.float64) for u in (a, b))
    det = aa * bb - ab * ab
    sound = det > 1e-6 * aa * bb
    p = np.where(sound, (xa * bb - xb * ab) * inverse(det), xa * inverse(aa))
    q = np.where(sound, (xb * aa - xa * ab) * inverse(det), 0)
    return p.astype(np.float32), q.astype(np.float32)


def fit_affine(x: np.ndarray, w: np.ndarray, top: int, *, min_is_negative: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale, minimum (n, 1) and codes 0..top (n, k) of least weighted squared error of scale * code + minimum."""
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    if min_is_negative:
        low = np.minimum(low, 0)
    ones = np.ones_like(x)
    best = [np.zeros_like(low), low, np.full_like(low, np.inf)]            # scale, minimum, error

    def consider(scale: np.ndarray, minimum: np.ndarray) -> None:
        q = np.clip(np.rint((x - minimum) * inverse(scale)), 0, top)
        scale, minimum = solve_affine(x, w, q, ones)
        if min_is_negative:
            positive = minimum > 0
            scale, minimum = np.where(positive, best_scale(x, w, q), scale), np.where(positive, 0, minimum)
        error = (w * (x - scale * q - minimum) ** 2).sum(axis=1, keepdims=True)
        better = error < best[2]
        best[:] = [np.where(better, new, old) for new, old in zip((scale, minimum, error), best, strict=True)]

    for offset in np.linspace(-1, 1.4, 25, dtype=np.float32):
        consider((high - low) / (top + offset), low)
    for _ in range(2):
        consider(best[0], best[1])
    scale, minimum = (v.astype(np.float16).astype(np.float32) for v in best[:2])
    return scale, minimum, np.clip(np.rint((x - minimum) * inverse(scale)), 0, top)


@dataclass(frozen=True)
class Multipliers:
    """The factors a block scale may be multiplied by: step * s + offset for s in low .. high."""

    low: int
    high: int
    step: float = 1.0
    offset: float = 0.0

    def nearest(self, ratio: np.ndarray) -> np.ndarray:
        return np.clip(np.rint((ratio - np.float32(self.offset)) * np.float32(1 / self.step)), self.low, self.high)

    def value(self, s: np.ndarray) -> np.ndarray:
        return s * np.float32(self.step) + np.float32(self.offset)

    @property
    def extreme(self) -> float:
        """The multiplier that the largest scale gets."""
        low, high = (self.step * s + self.offset for s in (self.low, self.high))
        return low if -low > high else high


def fit_scaled(x: np.ndarray, w: np.ndarray, group: int, project: Projection, factors: Multipliers,
               rounds: int = 4) -> tuple[np.ndarray, ...]:
    """Blocks of groups of `group` weights: weight = d * factor[group] * value. x, w (n, k).

    Returns d (n,), the integers s (n, groups) that choose the factors, and the values (n, k).
    """
    n, k = x.shape
    xg, wg = x.reshape(-1, group), w.reshape(-1, group)
    scale, _ = fit_scale(xg, wg, project)
    scale = scale.reshape(n, -1)
    d = largest(scale) / np.float32(factors.extreme)
    best = [np.zeros((n, 1), np.float32), np.zeros_like(scale), np.zeros_like(x), np.full((n, 1), np.inf, np.float32)]
    for _ in range(rounds):
        d = d.astype(np.float16).astype(np.float32)
        s = factors.nearest(scale * inverse(d))
        factor = factors.value(s)
        v = project(xg * inverse(d * factor).reshape(-1, 1), wg)
        base = np.repeat(factor, group, axis=1) * v.reshape(n, k)
        error = (w * (x - d * base) ** 2).sum(axis=1, keepdims=True)
        better = error < best[3]
        best = [np.where(better, new, old) for new, old in zip((d, s, v.reshape(n, k), error), best, strict=True)]
        d = best_scale(x, w, base)
        scale = best_scale(xg, wg, v).reshape(n, -1)
    return best[0][:, 0], best[1].astype(np.int32), best[2]


def fit_scaled_affine(x: np.ndarray, w: np.ndarray, group: int, top: int, most: int, rounds: int = 4) -> tuple[np.ndarray, ...]:
    """Blocks of groups: weight = d * s[group] * q - dmin * m[group], q in 0..top, s and m in 0..most. x, w (n, k).

    Returns d, dmin (n,), s, m (n, groups), q (n, k).
    """
    n, k = x.shape
    xg, wg = x.reshape(-1, group), w.reshape(-1, group)
    scale, minimum, _ = fit_affine(xg, wg, top, min_is_negative=True)
    scale, minimum = scale.reshape(n, -1), -minimum.reshape(n, -1)
    d, dmin = scale.max(axis=1, keepdims=True) / most, minimum.max(axis=1, keepdims=True) / most
    zero = np.zeros((n, 1), np.float32)
    best = [zero, zero, np.zeros_like(scale), np.zeros_like(scale), np.zeros_like(x), np.full((n, 1), np.inf, np.float32)]
    for _ in range(rounds):
        d, dmin = (np.maximum(v, 0).astype(np.float16).astype(np.float32) for v in (d, dmin))
        s, m = np.clip(np.rint(scale * inverse(d)), 0, most), np.clip(np.rint(minimum * inverse(dmin)), 0, most)
        q = np.clip(np.rint((xg + (dmin * m).reshape(-1, 1)) * inverse(d * s).reshape(-1, 1)), 0, top).reshape(n, k)
        a, b = np.repeat(s, group, axis=1) * q, -np.repeat(m, group, axis=1)
        error = (w * (x - d * a - dmin * b) ** 2).sum(axis=1, keepdims=True)
        better = error < best[5]
        best = [np.where(better, new, old) for new, old in zip((d, dmin, s, m, q, error), best, strict=True)]
        d, dmin = solve_affine(x, w, a, b)
    return best[0][:, 0], best[1][:, 0], best[2].astype(np.int32), best[3].astype(np.int32), best[4].astype(np.uint8)
