"""Paired measurement: the order in which contestants run, and what a list of per-pair ratios says.

Two programs are compared by running them alternately and dividing within each pair, so that whatever the machine does slowly
(heat, neighbours, page cache) falls on both. Figures of separate sessions are never divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb

import numpy as np

BOOTSTRAP_DRAWS = 10_000
CLAIM = 1.02            # a difference is claimed only when the whole interval lies beyond this ratio (or its inverse)
PAIRS_FOR_A_CLAIM = 6   # with fewer, even a unanimous sign test stays above 3%


def running_order(contestants: Sequence[str], turn: int) -> list[str]:
    """Who runs when in round `turn`: forwards, then backwards (ABBA for two), which cancels a linear drift."""
    return list(contestants) if turn % 2 == 0 else list(reversed(contestants))


def bootstrap_interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the median. A single value is its own interval."""
    sample = np.asarray(values, float)
    draws = np.random.default_rng(seed).choice(sample, (BOOTSTRAP_DRAWS, len(sample)))
    tail = 50 * (1 - level)
    low, high = np.percentile(np.median(draws, axis=1), [tail, 100 - tail])
    return float(low), float(high)


def sign_test(ratios: Sequence[float]) -> float:
    """Two-sided p-value of "ratios above and below 1 are equally likely"; ratios of exactly 1 say nothing and are left out."""
    above, below = sum(r > 1 for r in ratios), sum(r < 1 for r in ratios)
    n = above + below
    tail = sum(comb(n, k) for k in range(min(above, below) + 1)) / 2**n
    return min(1.0, 2 * tail)


@dataclass(frozen=True)
class Comparison:
    """What the pairs say: median of ours / theirs, its 95% interval, the number of pairs, the sign test's p-value."""

    ratio: float
    low: float
    high: float
    pairs: int
    p: float

    @property
    def verdict(self) -> str:
        """ahead, behind, or no claim."""
        if self.pairs < PAIRS_FOR_A_CLAIM:
            return "no claim"
        if self.low > CLAIM:
            return "ahead"
        return "behind" if self.high < 1 / CLAIM else "no claim"

    def as_dict(self) -> dict:
        return asdict(self) | {"verdict": self.verdict}


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Compare rates (more is better) measured in pairs: `ours[i]` ran beside `theirs[i]`."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"pairs need two equally long lists, got {len(ours)} and {len(theirs)} rates")
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, high = bootstrap_interval(ratios)
    return Comparison(float(np.median(ratios)), low, high, len(ratios), sign_test(ratios))
