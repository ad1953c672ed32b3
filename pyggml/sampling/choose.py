"""Choosing one of the candidates, and how likely a choice was."""

from __future__ import annotations

import numpy as np

from pyggml.sampling.candidates import Candidates, log_softmax
from pyggml.sampling.steps import top_k

_BLOCK = 512        # a running sum over a whole vocabulary is slow, one over blocks and then inside one of them is not


def draw(c: Candidates, u: float) -> tuple[int, float]:
    """The (token, its probability) that the number `u` in [0, 1) falls on when probabilities are laid end to end."""
    weights = np.exp(c.logits - c.peak)
    start, before, total = 0, 0.0, None
    if weights.size > _BLOCK:
        ends = np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK), dtype=np.float64).cumsum()
        total = float(ends[-1])
        block = min(int(ends.searchsorted(u * total, side="right")), ends.size - 1)
        start, before = block * _BLOCK, float(ends[block - 1]) if block else 0.0
    sums = weights[start:start + _BLOCK].cumsum(dtype=np.float64)
    total = total or float(sums[-1])
    i = int(sums.searchsorted(u * total - before, side="right"))
    i = start + i if i < sums.size else int(weights.argmax())           # rounding put the point behind the end
    return (i if c.ids is None else int(c.ids[i])), float(weights[i]) / total


def probability(c: Candidates, token: int) -> float:
    """Of drawing `token`."""
    weights = np.exp(c.logits - c.peak)
    at = np.asarray([token] if c.ids is None else np.flatnonzero(c.ids == token))
    return float(weights[at].sum() / weights.sum())


def dense(c: Candidates, n_vocab: int) -> np.ndarray:
    """The probability of every token, float64 (n_vocab)."""
    weights = np.exp(c.logits.astype(np.float64) - c.peak)
    if c.ids is None:
        return weights / weights.sum()
    every = np.zeros(n_vocab)
    every[c.ids] = weights / weights.sum()
    return every


def draw_beside(c: Candidates, drafted: int, draft: Candidates, n_vocab: int, u: float, v: float) -> tuple[int, float]:
    """(token, its probability among `c`): distributed as a draw from `c`, and as often as can be the token `drafted`, which was drawn from
    the candidates `draft`. u, v: numbers in [0, 1).

    Rejection sampling as in Leviathan et al. 2023 (arXiv:2211.17192, section 2.3): the drafted token x stays with probability
    min(1, p(x) / q(x)); otherwise one is drawn in proportion to max(0, p - q).
    """
    p = probability(c, drafted)
    if u * probability(draft, drafted) < p:
        return drafted, p
    wanted = dense(c, n_vocab)
    rest = np.maximum(wanted - dense(draft, n_vocab), 0.0).cumsum()
    if rest[-1] <= 0.0:                 # the two are the same but for rounding
        return draw(c, v)
    token = int(rest.searchsorted(v * rest[-1], side="right"))
    return token, float(wanted[token])


def top_logprobs(logits: np.ndarray, token: int, n: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of `token`, and the `n` likeliest (token, log-probability) in falling order."""
    log_p = log_softmax(logits)
    best = top_k(Candidates(log_p), n) if n > 0 else Candidates(log_p[:0], np.zeros(0, np.intp))
    assert best.ids is not None
    return float(log_p[token]), list(zip(best.ids.tolist(), best.logits.tolist(), strict=True))
