"""The chain with its memory: random numbers, recent tokens, mirostat's running surprise."""

from __future__ import annotations

import math
import random
from collections import Counter, deque

import numpy as np

from pyggml.errors import ParameterError, PyggmlError
from pyggml.native import ffi, lib
from pyggml.sampling.candidates import Candidates
from pyggml.sampling.choose import draw, draw_beside
from pyggml.sampling.params import RANDOM_SEED, SAMPLERS, SamplingParams
from pyggml.sampling.steps import mirostat_next, mirostat_v2, temperature


class Sampler:
    """The chain with its memory. `sample(logits)` chooses, `accept(token)` remembers; prompts are accepted too."""

    params: SamplingParams

    def __init__(self, params: SamplingParams | None = None, path: str = "") -> None:
        """path: of the model whose logits these are, for errors."""
        self.params, self._path = params or SamplingParams(), path
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
            logits = SAMPLERS["penalties"](Candidates(self._biased(logits) if p.logit_bias else logits), p, self.counts).logits
        x = ffi.from_buffer("float[]", np.ascontiguousarray(logits, np.float32))
        return lib.pyg_draw(x, len(x), p.top_k, p.top_p, p.min_p, p.min_keep, p.temp, self.random.random())

    def candidates(self, logits: np.ndarray) -> Candidates:
        """What the chain leaves of `logits`: the next token is drawn from this."""
        p = self.params
        c = Candidates(self._biased(logits) if p.logit_bias else logits)
        peak = float(c.logits.max())
        if not math.isfinite(peak):
            raise PyggmlError(_unusable(c.logits, self._path))
        if p.temp == 0.0 or p.mirostat:
            c = temperature(SAMPLERS["penalties"](c, p, self.counts), p.temp)
            return mirostat_v2(c, self.mu) if p.mirostat and p.temp else c
        for name in p.samplers:
            c = SAMPLERS[name](c, p, self.counts)
        return c

    def _biased(self, logits: np.ndarray) -> np.ndarray:
        logits = logits.copy()
        for token, bias in self.params.logit_bias.items():
            if not 0 <= token < logits.size:
                raise ParameterError(f"logit_bias names token {token}, but the vocabulary ends at {logits.size - 1}")
            logits[token] = bias if bias == -math.inf else logits[token] + bias         # forbidden even where it is infinite
        return logits


def _unusable(logits: np.ndarray, path: str) -> str:
    """Why no token can be drawn from logits whose largest is not finite."""
    n_nan, n_inf = int(np.isnan(logits).sum()), int(np.isposinf(logits).sum())
    if n_nan or n_inf:
        where = f"{path}: " if path else ""
        return f"{where}{n_nan} of {logits.size} logits are NaN and {n_inf} are infinite: the model file is damaged, or its numbers overflow"
    return "every token is forbidden (all logits are -inf); loosen the logit bias or the logits processor"
