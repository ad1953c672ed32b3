"""Speculative decoding: guess the next tokens cheaply, check all guesses in one small batch, keep those that were right.

A batch of up to eight tokens reads the weights once, so checking a guess costs little while memory is what limits decoding.
`Speculation` wraps a context: `eval([token])` drafts what may follow, evaluates it along, and answers the next calls from the rows it
has as long as they ask for what was drafted. What decodes with it need not know: its stop strings, processors and limits work as ever.

Drafts come from the text itself (`PromptLookup`: after Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding) or from a
smaller model (`DraftModel`: Leviathan et al. 2023, arXiv:2211.17192). A guess that is not random is checked by drawing the token as
always and looking whether it is the guess, so a seed gives the tokens that it gives without drafts; a guess that a draft model drew
stays by rejection sampling (sampling.draw_beside), which keeps the distribution. Small batches have the bits of single tokens, so
greedy output is the same, too.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from pyggml.errors import ParameterError
from pyggml.lower import SMALL
from pyggml.sampling import Candidates, Sampler, SamplingParams, draw, probability

MOST = max(SMALL, 1) - 1        # guesses in one batch: beyond SMALL tokens other kernels, with other last bits, take over


@dataclass
class Draft:
    """Guesses of the tokens that follow, and for guesses drawn at random what each was drawn from. Drafts of one `kind` are right
    about equally often: for those that were looked up it is how many tokens agreed, otherwise 0."""

    tokens: list[int] = field(default_factory=list)
    drawn_from: list[Candidates] | None = None
    kind: int = 0


class Drafter(Protocol):
    prior: float                # how often guesses are right, before anything was measured

    def draft(self, ids: np.ndarray, n: int) -> Draft:
        """At most `n` guesses of what follows `ids`, int32 (tokens so far)."""


# ---- where drafts come from ----

class PromptLookup:
    """Guesses that a text goes on as it did the last time its newest tokens occurred. Names are llama_cpp's LlamaPromptLookupDecoding's.

    max_ngram_size: tokens that must agree at most; the longest agreement is taken, and of those the latest.
    num_pred_tokens: guesses at most.
    """

    prior = 0.6

    def __init__(self, max_ngram_size: int = 4, num_pred_tokens: int = MOST) -> None:
        if max_ngram_size < 1 or num_pred_tokens < 0:
            raise ParameterError(f"max_ngram_size={max_ngram_size} and num_pred_tokens={num_pred_tokens}: use at least 1 and 0")
        self.max_ngram_size, self.num_pred_tokens = max_ngram_size, num_pred_tokens

    def draft(self, ids: np.ndarray, n: int) -> Draft:
        n = min(n, self.num_pred_tokens)
        ends = np.flatnonzero(ids[:-1] == ids[-1]) if n > 0 and len(ids) else np.empty(0, np.intp)      # of earlier n-grams like the newest
        size = 1
        while ends.size and size < self.max_ngram_size:
            longer = ends[ends >= size]
            longer = longer[ids[longer - size] == ids[-1 - size]]
            if not longer.size:
                break
            ends, size = longer, size + 1
        if not ends.size:
            return Draft()
        start = int(ends[-1]) + 1
        period = ids[start:start + n].tolist()
        return Draft([period[i % len(period)] for i in range(n)], kind=size)        # one that runs into its own end goes round

    def __call__(self, input_ids: np.ndarray, /, **_: Any) -> np.ndarray:
        """The guesses alone, as llama_cpp's draft models give them."""
        return np.array(self.draft(input_ids, self.num_pred_tokens).tokens, np.intc)


class OtherDrafts:
    """Guesses of a callable as llama_cpp's draft models are: draft_model(input_ids) -> token ids."""

    prior = 0.6

    def __init__(self, draft_model: Callable[[np.ndarray], Any], n_vocab: int) -> None:
        self._draft_model, self._n_vocab = draft_model, n_vocab

    def draft(self, ids: np.ndarray, n: int) -> Draft:
        tokens = [int(t) for t in self._draft_model(ids)][:n]
        return Draft(tokens if all(0 <= t < self._n_vocab for t in tokens) else [])


class DraftModel:
    """Guesses of a smaller model with the same vocabulary, each drawn from what the sampling parameters leave of its logits.

    context: one for this alone, with room for as many tokens. p_min: it stops before a guess that it finds less likely than this.
    """

    prior = 0.8
    MOST_EXTRA = 128            # rows by which vocabularies of one tokenizer may differ: some are padded

    def __init__(self, context: Any, params: SamplingParams | None = None, p_min: float = 0.0) -> None:
        self.context, self.p_min = context, p_min
        self._ids = np.zeros(context.n_ctx, np.int32)       # what its cache holds
        self.use(params or SamplingParams(temp=0.0))

    def use(self, params: SamplingParams) -> None:
        """Draw guesses as a sampler with `params` would, but for what depends on earlier tokens."""
        seed = None if params.seed is None or params.seed < 0 else params.seed ^ 0x9E3779B9     # guesses must not follow the sampler's numbers
        self._sampler = Sampler(replace(params, repeat_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, mirostat=0, seed=seed))

    def check(self, model: Any) -> None:
        """ParameterError unless it has the vocabulary of `model`."""
        ours, theirs = self.context.model, model
        name, other = ours.file.path, theirs.file.path
        if abs(ours.n_vocab - theirs.n_vocab) > self.MOST_EXTRA:
            raise ParameterError(f"{name} has {ours.n_vocab} tokens and {other} {theirs.n_vocab}; a draft model needs the same vocabulary")
        key = "tokenizer.ggml.tokens"
        for i, (a, b) in enumerate(zip(ours.file.kv.get(key, ()), theirs.file.kv.get(key, ()), strict=False)):
            if a != b:
                raise ParameterError(f"token {i} is {a!r} in {name} and {b!r} in {other}; a draft model needs the same vocabulary")

    def draft(self, ids: np.ndarray, n: int) -> Draft:
        n_vocab, n = self.context.model.n_vocab, min(n, self.context.n_ctx - len(ids) + 1)
        if n <= 0 or ids.max() >= n_vocab:
            return Draft()
        known = self._ids[:self.context.n_past]
        same = min(len(known), len(ids) - 1)
        differs = np.flatnonzero(known[:same] != ids[:same])
        self.context.truncate(int(differs[0]) if differs.size else same)
        draft = Draft([], None if self._sampler.params.temp == 0.0 else [])
        new = ids[self.context.n_past:].tolist()
        while new:
            start = self.context.n_past
            row = self.context.eval(new)[-1]
            self._ids[start:start + len(new)] = new
            candidates = self._sampler.candidates(row)
            token, p = self._choose(row, candidates)
            if p < self.p_min:
                break
            draft.tokens.append(token)
            if draft.drawn_from is not None:
                draft.drawn_from.append(Candidates(candidates.logits.copy(), candidates.ids))       # logits may be the context's own
            new = [token] if len(draft.tokens) < n else []
        return draft

    def _choose(self, row: np.ndarray, candidates: Candidates) -> tuple[int, float]:
        """(a guess, how likely it is): drawn, or the likeliest one."""
        if self._sampler.params.temp:
            return draw(candidates, self._sampler.random.random())
        assert candidates.ids is not None
        token = int(candidates.ids[0])
        return token, probability(Candidates(row), token) if self.p_min > 0 else 1.0


# ---- how much to draft ----

class Gate:
    """Chooses how many tokens to draft from what was measured: how often guesses were right, and what batches and drafts cost.

    With guesses right with probability a, independently, a draft of k gives (1 - a^(k+1)) / (1 - a) tokens (Leviathan et al. 2023,
    equation 1). The best k is the one with most tokens per second; it is 0 where drafting does not pay. What was measured is
    forgotten over MEMORY tokens, so a gate that has closed opens now and then to look again, at a cost of about a percent.
    """

    MEMORY = 128
    WEIGHT = 2.0            # guesses that the prior is worth
    GROWTH = 0.12           # what each token adds to a batch, as a share of one alone, until it was measured
    SAMPLES = 5             # batch times that count: the fastest of the last few, so that an interruption is not taken for a cost

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._right: dict[int, list[float]] = {}                    # kind of draft -> [guesses that were right, guesses], fading
        self._batches = [deque[float](maxlen=self.SAMPLES) for _ in range(MOST + 2)]       # seconds of a batch of n tokens
        self._draft = deque[float](maxlen=self.SAMPLES)             # seconds a drafted token

    def rate(self, kind: int) -> float:
        """How often guesses of this kind are right."""
        right, n = self._right.get(kind, (0.0, 0.0))
        prior = self._prior * (1 - 0.5 ** kind) if kind else self._prior
        return (right + self.WEIGHT * prior) / (n + self.WEIGHT)

    def seconds(self, n: int) -> float:
        """Of a batch of n tokens; that of a size that was hardly tried is taken from the next smaller one."""
        return next((min(times) * (1 + more * self.GROWTH) for more, times in enumerate(self._batches[n:0:-1]) if len(times) > 1), 0.0)

    def best(self, kind: int, most: int) -> int:
        """How many tokens to draft, at most `most`."""
        a, draft = min(self.rate(kind), 0.99), min(self._draft, default=0.0)
        if not (alone := self.seconds(1)):
            return 0                    # measure a token by itself first
        gains = [((1 - a ** (k + 1)) / (1 - a)) / (self.seconds(k + 1) + k * draft) for k in range(1, most + 1)]
        best = int(np.argmax(gains)) if gains else 0
        return best + 1 if gains and gains[best] > 1 / alone else 0

    def tell_batch(self, n: int, seconds: float) -> None:
        self._batches[n].append(seconds)
        fade = 0.5 ** (n / self.MEMORY)
        for counts in self._right.values():
            counts[0] *= fade
            counts[1] *= fade

    def tell_draft(self, n: int, seconds: float) -> None:
        self._draft.append(seconds / max(n, 1))

    def tell_guess(self, kind: int, right: bool) -> None:
        counts = self._right.setdefault(kind, [0.0, 0.0])
        counts[0] += right
        counts[1] += 1


# ---- a context that looks ahead ----

class Speculation:
    """A context with a drafter. It is used as a context is; `n_past` counts the tokens that were asked for.

    n_max, n_min: guesses in a batch at most (and never over MOST), and at least: a shorter draft is not checked.
    ids: int32 (n_ctx) where the tokens so far are kept, the caller's own array if it has one.
    gate: None drafts n_max tokens whenever it can.
    """

    def __init__(self, context: Any, drafter: Drafter, *, n_max: int = MOST, n_min: int = 0, ids: np.ndarray | None = None,
                 gate: bool = True) -> None:
        self.context, self.drafter = context, drafter
        self.n_max, self.n_min = min(n_max, MOST), n_min
        self.n_past: int = context.n_past
        self.drafted = self.accepted = 0                # guesses that were checked, and that were right
        self._ids = np.zeros(context.n_ctx, np.int32) if ids is None else ids
        self._gate = Gate(drafter.prior) if gate else None
        self._draft, self._rows, self._at = Draft(), np.empty((0, 0), np.float32), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.context, name)              # n_ctx, model, pool, ...

    # ---- evaluation ----

    def eval(self, tokens: Sequence[int] | np.ndarray, logits: str = "last") -> np.ndarray:
        """As Context.eval. A single token is answered from the batch before when it was guessed, and evaluated with new guesses otherwise."""
        if len(tokens) == 1 and logits != "none":
            token = int(tokens[0])
            if self._at < len(self._draft.tokens):
                right = token == self._draft.tokens[self._at]
                self._tell(right)
                if right:
                    self._at += 1
                    self._ids[self.n_past] = token
                    self.n_past += 1
                    return self._rows[self._at:self._at + 1]
            self._forget()
            return self._ahead(token)
        self._forget()
        start = self.n_past
        out = self.context.eval(tokens, logits)
        self.n_past = self.context.n_past
        self._ids[start:self.n_past] = tokens
        return out

    def _ahead(self, token: int) -> np.ndarray:
        """Evaluate `token` and what may follow it."""
        start = self.n_past
        if start >= self.context.n_ctx:
            return self.context.eval([token])           # raises, with both sizes
        self._ids[start] = token
        draft = self._new_draft(min(self.n_max, self.context.n_ctx - start - 1))
        begin = time.perf_counter()
        rows = self.context.eval([token, *draft.tokens], "all")
        if self._gate is not None:
            self._gate.tell_batch(len(rows), time.perf_counter() - begin)
        self.n_past = start + 1
        self._draft, self._rows, self._at = draft, rows, 0
        return rows[:1]

    def _new_draft(self, most: int) -> Draft:
        """What may follow the tokens so far and the newest one; empty where that would not pay."""
        ids, gate = self._ids[:self.n_past + 1], self._gate
        if gate is not None and isinstance(self.drafter, DraftModel):
            most = gate.best(0, most)                   # its guesses cost: decide before
        if most <= 0 or most < self.n_min:
            return Draft()
        begin = time.perf_counter()
        draft = self.drafter.draft(ids, most)
        if gate is not None:
            gate.tell_draft(len(draft.tokens), time.perf_counter() - begin)
            del draft.tokens[gate.best(draft.kind, len(draft.tokens)):]
        return draft if len(draft.tokens) >= self.n_min else Draft()

    def _tell(self, right: bool) -> None:
        self.drafted += 1
        self.accepted += right
        if self._gate is not None:
            self._gate.tell_guess(self._draft.kind, right)

    def _forget(self) -> None:
        """Drop guesses, and take the cache back to the tokens that were asked for."""
        self._draft, self._at = Draft(), 0
        self.context.truncate(self.n_past)

    def use(self, params: SamplingParams) -> None:
        """Say how the tokens to come will be sampled."""
        if isinstance(self.drafter, DraftModel):
            self.drafter.use(params)

    def choose(self, sampler: Sampler, row: np.ndarray) -> int:
        """The next token from the logits of the last `eval` (or what a processor made of them)."""
        draft, at = self._draft, self._at
        if draft.drawn_from is not None and at < len(draft.tokens):
            return sampler.sample(row, draft.tokens[at], draft.drawn_from[at])
        return sampler.sample(row)

    def cancel(self) -> None:
        """Stop whatever is being evaluated."""
        if isinstance(self.drafter, DraftModel):
            self.drafter.context.cancel()
        self.context.cancel()

    # ---- the cache ----

    def truncate(self, n: int) -> None:
        if n != self.n_past:
            self._forget()
            self.context.truncate(n)
            self.n_past = n

    def reset(self) -> None:
        self.truncate(0)

    def save(self) -> list[np.ndarray]:
        self._forget()
        return self.context.save()

    def restore(self, saved: list[np.ndarray]) -> None:
        """As Context.restore; `ids` must be made to fit by who owns it."""
        self._draft, self._at = Draft(), 0
        self.context.restore(saved)
        self.n_past = self.context.n_past
