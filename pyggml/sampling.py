"""From logits to the next token: plain functions over candidates, chained in llama.cpp's order and with its names and defaults.

A step takes candidates and gives back fewer of them, or the same ones with other logits. `SAMPLERS` holds the steps by name; `Sampler`
keeps what outlives a token: the random numbers, the recent tokens and mirostat's running surprise.

Sources of the algorithms: top-p, Holtzman et al. 2020 (arXiv:1904.09751); locally typical, Meister et al. 2023 (arXiv:2202.00666);
min-p, Nguyen et al. 2024 (arXiv:2407.01082); repetition penalty, Keskar et al. 2019 (arXiv:1909.05858); mirostat, Basu et al. 2021
(arXiv:2007.14966).
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np

from pyggml.errors import ParameterError, PyggmlError
from pyggml.native import ffi, lib

RANDOM_SEED = 0xFFFFFFFF        # the seed that asks for a fresh one, as is -1


class Candidates(NamedTuple):
    """Tokens that may still be drawn. `ids` is None while they are the whole vocabulary: a token's id is then its index."""

    logits: np.ndarray          # float32 (n)
    ids: np.ndarray | None = None
    sorted: bool = False        # logits fall from first to last

    def take(self, index: np.ndarray, sorted: bool) -> Candidates:
        """The candidates at `index`."""
        return Candidates(self.logits[index], index if self.ids is None else self.ids[index], sorted)

    def first(self, n: int) -> Candidates:
        """The first `n` candidates."""
        return Candidates(self.logits[:n], np.arange(n) if self.ids is None else self.ids[:n], self.sorted)

    @property
    def peak(self) -> np.float32:
        """The largest logit."""
        return self.logits[0] if self.sorted else self.logits.max()


# ---- probabilities ----

def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float32 (n), of logits (n)."""
    p = np.exp(logits - logits.max())
    return p / p.sum()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities, float32 (..., n), of logits (..., n)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def top_logprobs(logits: np.ndarray, token: int, n: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of `token`, and the `n` likeliest (token, log-probability) in falling order."""
    log_p = log_softmax(logits)
    best = top_k(Candidates(log_p), n) if n > 0 else Candidates(log_p[:0], np.zeros(0, np.intp))
    assert best.ids is not None
    return float(log_p[token]), list(zip(best.ids.tolist(), best.logits.tolist(), strict=True))


# ---- steps: candidates -> candidates ----

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


# ---- choosing one ----

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


def mirostat_v2(c: Candidates, mu: float) -> Candidates:
    """Candidates whose surprise is at most `mu` bits, or the likeliest one. What is drawn of them moves mu (mirostat_next)."""
    with np.errstate(divide="ignore"):
        surprise = -np.log2(softmax(c.logits))
    keep = np.flatnonzero(surprise <= mu)
    return c.take(keep if keep.size else c.logits.argmax(axis=0, keepdims=True), False)


def mirostat_next(mu: float, p: float, tau: float, eta: float) -> float:
    """mu after a token of probability `p`: moved towards a mean surprise of `tau` bits."""
    return mu - eta * (-math.log2(p) - tau)


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


# ---- the chain ----

SAMPLERS: dict[str, Callable[[Candidates, Sampler], Candidates]] = {        # llama.cpp's names, in llama.cpp's order
    "penalties": lambda c, s: penalties(c, s.counts, s.params.repeat_penalty, s.params.frequency_penalty, s.params.presence_penalty),
    "top_k": lambda c, s: top_k(c, s.params.top_k),
    "typ_p": lambda c, s: typical(c, s.params.typical_p, s.params.min_keep),
    "top_p": lambda c, s: top_p(c, s.params.top_p, s.params.min_keep),
    "min_p": lambda c, s: min_p(c, s.params.min_p, s.params.min_keep),
    "temperature": lambda c, s: temperature(c, s.params.temp),
}


LARGEST = 1e30          # of a real parameter: arithmetic with float32 logits stays finite


def _within(low: float, high: float = math.inf, default: float | int = 0, *, integer: bool = False, help: str = "", above: bool = False):
    """A numeric parameter: its default, the closed range [low, high] (open at `low` with `above`), and a line for --help."""
    if not integer:
        low, high = max(low, -LARGEST), min(high, LARGEST)
    return field(default=default, metadata={"low": low, "high": high, "integer": integer, "help": help, "above": above})


@dataclass(frozen=True)
class SamplingParams:
    """What the user may set; names and defaults are llama.cpp's. A value outside its range raises ParameterError."""

    temp: float = _within(0, default=0.8, help="temperature; 0 always takes the likeliest token")
    top_k: int = _within(-1, default=40, integer=True, help="keep the k likeliest tokens (0: all)")
    top_p: float = _within(0, 1, 0.95, help="keep the likeliest tokens that together have this probability (1: all)")
    min_p: float = _within(0, 1, 0.05, help="keep tokens at least this many times as likely as the likeliest (0: all)")
    typical_p: float = _within(0, 1, 1.0, help="keep locally typical tokens of this total probability (1: all)")
    min_keep: int = _within(0, integer=True, help="tokens that top-p, min-p and typical keep at least")
    repeat_last_n: int = _within(-1, default=64, integer=True, help="recent tokens that penalties look at (0: none, -1: all)")
    repeat_penalty: float = _within(0, default=1.0, above=True, help="penalty on tokens seen lately (1: none)")
    frequency_penalty: float = _within(-math.inf, default=0.0, help="penalty for each time a token was seen lately (0: none)")
    presence_penalty: float = _within(-math.inf, default=0.0, help="penalty once for a token seen lately (0: none)")
    mirostat: int = _within(0, 2, 0, integer=True, help="2: mirostat 2.0 in place of the truncating samplers (0: off)")
    mirostat_tau: float = _within(0, default=5.0, help="mirostat's target surprise in bits")
    mirostat_eta: float = _within(0, default=0.1, help="mirostat's learning rate")
    seed: int | None = None                                     # None, -1 and 0xFFFFFFFF: a fresh one
    logit_bias: Mapping[int, float] = field(default_factory=dict)    # token -> added to its logit; -inf forbids it
    samplers: tuple[str, ...] = tuple(SAMPLERS)

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.metadata:
                _check(f.name, getattr(self, f.name), **f.metadata)
        if self.mirostat == 1:
            raise ParameterError("mirostat=1 is not supported; use 2, its simpler successor, or 0")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < -1):
            raise ParameterError(f"seed={self.seed!r} is not a whole number; use one from 0 up, or -1 for a fresh one")
        unknown = [name for name in self.samplers if name not in SAMPLERS]
        if unknown:
            raise ParameterError(f"sampler {unknown[0]!r} is unknown; known are {', '.join(SAMPLERS)}")
        for token, bias in self.logit_bias.items():
            if math.isnan(bias) or bias == math.inf:
                raise ParameterError(f"logit_bias of token {token} is {bias}; use a finite number, or -inf to forbid the token")


    @property
    def plain(self) -> bool:
        """Whether the next token is always the one with the largest logit."""
        return self.temp == 0.0 and self.unmoved

    @property
    def unmoved(self) -> bool:
        """Whether logits stay what the model made of them."""
        return not self.logit_bias and (self.repeat_penalty, self.frequency_penalty, self.presence_penalty) == (1.0, 0.0, 0.0)

    @property
    def usual(self) -> bool:
        """Whether pyg_draw (native/draw.c) draws what the chain would, once logits were moved."""
        return (lib is not None and self.temp >= COLDEST and not self.mirostat and self.typical_p >= 1.0 and self.samplers == tuple(SAMPLERS)
                and 0 < self.top_k <= lib.PYG_MOST_TOP_K)


def _check(name: str, value, *, low: float, high: float, integer: bool, help: str, above: bool) -> None:
    number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    if number and math.isfinite(value) and low <= value <= high and not (above and value == low):
        return
    kind = "a whole number" if integer else "a number"
    bounds = f" above {low:g}" if above else f" from {low:g}"
    raise ParameterError(f"{name}={value!r} is out of range; use {kind}{bounds}{f' to {high:g}' if math.isfinite(high) else ''}")


class Sampler:
    """The chain with its memory. `sample(logits)` chooses, `accept(token)` remembers; prompts are accepted too."""

    params: SamplingParams

    def __init__(self, params: SamplingParams | None = None) -> None:
        self.params = params or SamplingParams()
        self._plain, self._usual, self._unmoved = self.params.plain, self.params.usual, self.params.unmoved
        self.reset()

    def reset(self) -> None:
        """Forget every token and start the random numbers anew (from a fresh seed where none was given)."""
        p = self.params
        self.seed: int = random.SystemRandom().randrange(RANDOM_SEED) if p.seed in (None, -1, RANDOM_SEED) else p.seed  # type: ignore[assignment]
        self.random = random.Random(self.seed)
        self.recent: deque[int] = deque(maxlen=None if p.repeat_last_n < 0 else p.repeat_last_n)
        self.counts: Counter[int] = Counter()       # of the recent tokens
        self.mu = 2.0 * p.mirostat_tau

    def accept(self, *tokens: int) -> None:
        """Remember tokens, those of the prompt too, for the penalties."""
        for token in tokens:
            if len(self.recent) == self.recent.maxlen:
                if not self.recent:
                    return
                oldest = self.recent[0]
                self.counts[oldest] -= 1
                if not self.counts[oldest]:
                    del self.counts[oldest]
            self.recent.append(token)
            self.counts[token] += 1

    def forget(self) -> None:
        """Forget the recent tokens."""
        self.recent.clear()
        self.counts.clear()

    def sample(self, logits: np.ndarray, drafted: int | None = None, draft: Candidates | None = None) -> int:
        """A token for `logits`, float32 (n_vocab), which are left as they are. Greedy when temp is 0, whatever else is set.

        drafted, draft: a guess of the token and what it was drawn from. They change how often the token is the guess, but not how
        tokens are distributed; a guess that was not drawn at random needs no mention.
        """
        if self._plain and math.isfinite(logits[token := int(logits.argmax())]):       # what is not finite is refused below
            return token
        if self._usual and draft is None and (token := self._draw(logits)) >= 0:
            return token
        c = self.candidates(logits)
        if self.params.temp == 0.0:
            return int(c.ids[0])  # type: ignore[index]
        if drafted is None or draft is None:
            token, p = draw(c, self.random.random())
        else:
            token, p = draw_beside(c, drafted, draft, logits.size, self.random.random(), self.random.random())
        if self.params.mirostat:
            self.mu = mirostat_next(self.mu, p, self.params.mirostat_tau, self.params.mirostat_eta)
        return token

    def _draw(self, logits: np.ndarray) -> int:
        """`sample` by the usual chain; -1 for what cannot be drawn from."""
        p = self.params
        if not self._unmoved:
            logits = SAMPLERS["penalties"](Candidates(self._biased(logits) if p.logit_bias else logits), self).logits
        x = ffi.from_buffer("float[]", np.ascontiguousarray(logits, np.float32))
        return lib.pyg_draw(x, len(x), p.top_k, p.top_p, p.min_p, p.min_keep, p.temp, self.random.random())

    def candidates(self, logits: np.ndarray) -> Candidates:
        """What the chain leaves of `logits`: the next token is drawn from this."""
        p = self.params
        c = Candidates(self._biased(logits) if p.logit_bias else logits)
        peak = float(c.logits.max())
        if not math.isfinite(peak):
            raise PyggmlError(_unusable(c.logits))
        if p.temp == 0.0 or p.mirostat:
            c = temperature(SAMPLERS["penalties"](c, self), p.temp)
            return mirostat_v2(c, self.mu) if p.mirostat and p.temp else c
        for name in p.samplers:
            c = SAMPLERS[name](c, self)
        return c

    def _biased(self, logits: np.ndarray) -> np.ndarray:
        logits = logits.copy()
        for token, bias in self.params.logit_bias.items():
            if not 0 <= token < logits.size:
                raise ParameterError(f"logit_bias names token {token}, but the vocabulary ends at {logits.size - 1}")
            logits[token] = bias if bias == -math.inf else logits[token] + bias         # forbidden even where it is infinite
        return logits


def _unusable(logits: np.ndarray) -> str:
    """Why no token can be drawn from logits whose largest is not finite."""
    n_nan, n_inf = int(np.isnan(logits).sum()), int(np.isposinf(logits).sum())
    if n_nan or n_inf:
        return f"{n_nan} of {logits.size} logits are NaN and {n_inf} are infinite: the model file is damaged, or its numbers overflow"
    return "every token is forbidden (all logits are -inf); loosen the logit bias or the logits processor"
