"""From logits to numbers per token: log-likelihood, Kullback-Leibler divergence, probability of the true token, agreement on the best.

Rows are worked on in blocks by a few threads (numpy lets go of the interpreter inside its loops). Sums are float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

BLOCK = 1 << 19          # logits that one thread works on at a time


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "pyggml-scores")


def by_rows(work: Callable[[slice], None], n_rows: int, n_columns: int) -> None:
    """Call `work(slice of rows)` for all rows, in parallel."""
    step = max(1, BLOCK // n_columns)
    list(_pool().map(work, [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 (rows, n_vocab) -> logarithms of probabilities, float32."""
    out = np.empty_like(logits)

    def work(rows: slice) -> None:
        x = logits[rows]
        shifted = np.subtract(x, x.max(-1, keepdims=True), out=out[rows])
        shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)

    by_rows(work, *logits.shape)
    return out


def log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """ln p(target) for each row: float64 (rows)."""
    out = np.empty(len(logits))

    @np.errstate(invalid="ignore")              # infinite logits give NaN
    def work(rows: slice) -> None:
        x = logits[rows]
        top = x.max(-1)
        total = np.exp(x - top[:, None]).sum(-1, dtype=np.float64)
        out[rows] = np.take_along_axis(x, targets[rows, None], -1)[:, 0] - top - np.log(total)

    by_rows(work, *logits.shape)
    return out


@dataclass
class Tokens:
    """What is known about each scored token of a model against a reference; float64 (tokens)."""

    nll: np.ndarray = field(default_factory=lambda: np.empty(0))            # -ln q(target)
    nll_base: np.ndarray = field(default_factory=lambda: np.empty(0))       # -ln p(target) of the reference
    kld: np.ndarray = field(default_factory=lambda: np.empty(0))            # sum over the vocabulary of p ln(p / q)
    same_top: np.ndarray = field(default_factory=lambda: np.empty(0))       # 1 where both find the same token most likely

    @property
    def p_diff(self) -> np.ndarray:
        """q(target) - p(target)."""
        return np.exp(-self.nll) - np.exp(-self.nll_base)

    def __len__(self) -> int:
        return len(self.nll)


FIELDS = ("nll", "nll_base", "kld", "same_top")


class Scores:
    """The tokens of chunk after chunk, in arrays that are laid out once."""

    def __init__(self, n_chunks: int) -> None:
        self.n_chunks, self.done, self._data = n_chunks, 0, np.empty((len(FIELDS), 0))

    def add(self, chunk: Tokens) -> None:
        """The tokens of the next chunk; all chunks have the same number."""
        if not self.done:
            self._data = np.empty((len(FIELDS), self.n_chunks * len(chunk)))
        at = self.done * len(chunk)
        self._data[:, at:at + len(chunk)] = [getattr(chunk, name) for name in FIELDS]
        self.done += 1

    @property
    def so_far(self) -> Tokens:
        return Tokens(*self._data[:, :self.done * (self._data.shape[1] // self.n_chunks)])


def divergence(base: np.ndarray, logits: np.ndarray, targets: np.ndarray, floor: float = -np.inf) -> Tokens:
    """Hold logits (rows, n_vocab) against a reference's log-probabilities `base` of the same shape.

    floor: tokens that the reference gives less than exp(floor) are left out of the divergence (llama.cpp's files end at -16).
    """
    n = len(logits)
    t = Tokens(*(np.empty(n) for _ in range(4)))

    def work(rows: slice) -> None:
        p, q, target = base[rows], logits[rows], targets[rows, None]
        top = q.max(-1, keepdims=True)
        log_total = top[:, 0] + np.log(np.exp(q - top).sum(-1, dtype=np.float64))
        difference = p - q
        difference += log_total[:, None].astype(np.float32)
        difference *= np.exp(p)
        if floor > -np.inf:
            difference[p <= floor] = 0
        t.kld[rows] = difference.sum(-1, dtype=np.float64)
        t.nll[rows] = log_total - np.take_along_axis(q, target, -1)[:, 0]
        t.nll_base[rows] = -np.take_along_axis(p, target, -1)[:, 0].astype(np.float64)
        t.same_top[rows] = p.argmax(-1) == q.argmax(-1)

    by_rows(work, *logits.shape)
    return t


# ---- statistics -----------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Mean:
    """A mean and its standard error."""

    value: float
    error: float

    def __iter__(self):
        return iter((self.value, self.error))


def mean(x: np.ndarray) -> Mean:
    """The mean over tokens; the error takes tokens as independent, as llama.cpp does, and is 0 for ten or fewer."""
    n = len(x)
    return Mean(float(x.mean()) if n else 0.0, float(x.std() / np.sqrt(n - 1)) if n > 10 else 0.0)


KLD_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)
P_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)


def summary(t: Tokens) -> dict[str, Any]:
    """The statistics of llama-perplexity --kl-divergence by its names, each a Mean or a number. Probabilities are in percent."""
    ln_q, ln_p, ratio = mean(t.nll), mean(t.nll_base), mean(t.nll - t.nll_base)
    ppl, base = float(np.exp(ln_q.value)), float(np.exp(ln_p.value))
    dp = 100 * t.p_diff
    square = mean(dp**2)
    rms = float(np.sqrt(square.value))
    top = float(t.same_top.mean())
    variance = (ppl * ln_q.error) ** 2 + (base * ln_p.error) ** 2 - 2 * ppl * base * _covariance(t.nll, t.nll_base)
    return {
        "Mean PPL(Q)": Mean(ppl, ppl * ln_q.error),
        "Mean PPL(base)": Mean(base, base * ln_p.error),
        "Cor(ln(PPL(Q)), ln(PPL(base)))": 100 * _covariance(t.nll, t.nll_base) / (ln_q.error * ln_p.error) if ln_q.error and ln_p.error else 100.0,
        "Mean ln(PPL(Q)/PPL(base))": ratio,
        "Mean PPL(Q)/PPL(base)": Mean(float(np.exp(ratio.value)), float(np.exp(ratio.value)) * ratio.error),
        "Mean PPL(Q)-PPL(base)": Mean(ppl - base, float(np.sqrt(max(0.0, variance)))),
        "Mean KLD": mean(t.kld),
        "Maximum KLD": float(t.kld.max()),
        **{f"{_name(q)} KLD": float(np.percentile(t.kld, q)) for q in KLD_PERCENTILES},
        "Minimum KLD": float(t.kld.min()),
        "Mean Δp": mean(dp),
        "Maximum Δp": float(dp.max()),
        **{f"{_name(q)} Δp": float(np.percentile(dp, q)) for q in P_PERCENTILES},
        "Minimum Δp": float(dp.min()),
        "RMS Δp": Mean(rms, 0.5 / rms * square.error if rms else 0.0),
        "Same top p": Mean(100 * top, 100 * float(np.sqrt(top * (1 - top) / max(1, len(t) - 1)))),
    }


def _name(percent: float) -> str:
    return "Median" if percent == 50 else f"{percent:4.1f}%"


def _covariance(a: np.ndarray, b: np.ndarray) -> float:
    """Covariance of two means."""
    return float(((a * b).mean() - a.mean() * b.mean()) / (len(a) - 1)) if len(a) >= 10 else 0.0
