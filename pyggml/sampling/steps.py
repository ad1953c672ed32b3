"""Steps: functions from candidates to fewer of them, or to the same ones with other logits.

Sources of the algorithms: top-p, Holtzman et al. 2020 (arXiv:1904.09751); locally typical, Meister et al. 2023 (arXiv:2202.00666);
min-p, Nguyen et al. 2024 (arXiv:2407.01082); repetition penalty, Keskar et al. 2019 (arXiv:1909.05858); mirostat, Basu et al. 2021
(arXiv:2007.14966).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pyggml.sampling.candidates import Candidates, softmax


def penalties(c: Candidates, counts: Mapping[int, int], repeat: float = 1.0, frequency: float = 0.0, presence: float = 0.0) -> Candidates:
    """Make tokens seen `counts` times lately less likely: a logit moves away from +inf by the factor `repeat`, then by
    `presence` once and `frequency` for each time it was seen."""
    if not counts or (repeat == 1.0 and frequency == 0.0 and presence == 0.0):
        return c
    seen = np.fromiter(counts.keys(), np.intp, len(counts))
    times = np.fromiter(counts.values(), np.float32, len(counts))
    if c.ids is not None:
        place = {int(token): i for i, token in enumerate(c.ids)}
        here = [i for i, token in enumerate(seen.tolist()) if token in place]
        seen, times = np.array([place[int(seen[i])] for i in here], np.intp), times[here]
    logits = c.logits.copy()
    hit = logits[seen]
    logits[seen] = np.where(hit <= 0, hit * repeat, hit / repeat) - (times * frequency + presence)
    return Candidates(logits, c.ids)


def top_k(c: Candidates, k: int) -> Candidates:
    """The `k` largest logits, sorted; all of them, sorted, when k is larger. k <= 0 keeps everything as it is.

    The k-th largest of the maxima of disjoint groups is a lower bound of the k-th largest logit, and finding it costs one
    pass at memory speed; a selection over the whole vocabulary would cost twenty times as much.
    """
    n = c.logits.size
    if k <= 0 or (c.sorted and k >= n):
        return c
    if c.sorted:
        return c.first(k)
    k = min(k, n)
    per_group = min(64, n // (2 * k))
    index = None
    if per_group > 1:
        n_groups = n // per_group
        maxima = c.logits[:n_groups * per_group].reshape(per_group, n_groups).max(axis=0)
        index = np.flatnonzero(c.logits >= np.partition(maxima, n_groups - k)[n_groups - k])
    logits = c.logits if index is None else c.logits[index]
    if logits.size > 4 * k:             # many equal logits: sort only the k that stay
        part = np.argpartition(logits, logits.size - k)[logits.size - k:]
        logits, index = logits[part], part if index is None else index[part]
    order = np.argsort(-logits, kind="stable")[:k]
    return c.take(order if index is None else index[order], True)


def top_p(c: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """The fewest likeliest candidates that together have probability `p` or more, sorted, and at least `min_keep` of them."""
    if p >= 1.0:
        return c
    n = c.logits.size
    total = None if c.sorted else np.exp(c.logits - c.peak).sum()
    k = n if c.sorted else 256
    while True:                         # few candidates hold p as a rule: sort those first, all of them only if need be
        best = top_k(c, k)
        mass = np.exp(best.logits - best.logits[0]).cumsum()
        goal = p * (mass[-1] if total is None else total)
        if mass[-1] >= goal or k >= n:
            return best.first(max(int(mass.searchsorted(goal)) + 1, min_keep))
        k = min(n, 8 * k)


def min_p(c: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """Candidates at least `p` times as likely as the likeliest, or the `min_keep` likeliest where those are more."""
    if p <= 0.0:
        return c
    least = c.peak + np.float32(math.log(p))
    if c.sorted:
        return c.first(max(c.logits.size - int(c.logits[::-1].searchsorted(least)), min_keep))
    keep = np.flatnonzero(c.logits >= least)
    return c.take(keep, False) if keep.size >= min_keep else top_k(c, min_keep)


def typical(c: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """Candidates whose surprise is nearest to the expected surprise (the entropy), until together they exceed probability `p`."""
    if p >= 1.0:
        return c
    probability = softmax(c.logits)
    with np.errstate(divide="ignore"):
        surprise = -np.log(probability)
    possible = probability > 0
    entropy = float(np.sum(probability[possible] * surprise[possible]))
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    exceeded = np.cumsum(probability[order]) > p
    n = int(exceeded.argmax()) + 1 if exceeded[-1] else c.logits.size
    return c.take(order[:max(n, min_keep)], False)


COLDEST = 1e-6          # a temperature below it counts as 0: the division would overflow


def temperature(c: Candidates, temp: float) -> Candidates:
    """Logits divided by `temp`; 0 (and what is so near to it that the division overflows) leaves only the likeliest candidate."""
    if temp < COLDEST:
        return c.take(c.logits.argmax(axis=0, keepdims=True), True)
    return c if temp == 1.0 else Candidates(c.logits / np.float32(temp), c.ids, c.sorted)


def mirostat_v2(c: Candidates, mu: float) -> Candidates:
    """Candidates whose surprise is at most `mu` bits, or the likeliest one. What is drawn of them moves mu (mirostat_next)."""
    with np.errstate(divide="ignore"):
        surprise = -np.log2(softmax(c.logits))
    keep = np.flatnonzero(surprise <= mu)
    return c.take(keep if keep.size else c.logits.argmax(axis=0, keepdims=True), False)


def mirostat_next(mu: float, p: float, tau: float, eta: float) -> float:
    """mu after a token of probability `p`: moved towards a mean surprise of `tau` bits."""
    return mu - eta * (-math.log2(p) - tau)
