"""Perplexity of a text, and divergence from a reference whose log-probabilities are in a file: llama-perplexity's protocol."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.formats.atomic import replacing
from pyggml.measure import basefile
from pyggml.measure.chunks import Evaluator, first_scored, split, tokenize
from pyggml.measure.scores import Scores, Tokens, divergence, log_likelihood, mean
from pyggml.model import Model

# Called after every chunk with (done, total, what is known so far); returning False cancels.
OnChunk = Callable[[int, int, Any], Any]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `n_tokens` scored tokens; `nll` has one number for each."""

    nll: np.ndarray
    n_chunks: int

    @property
    def n_tokens(self) -> int:
        return len(self.nll)

    @property
    def value(self) -> float:
        with np.errstate(over="ignore"):                # of a damaged model: infinity
            return float(np.exp(self.nll.mean()))

    @property
    def error(self) -> float:
        """Its standard error."""
        return self.value * mean(self.nll).error


def running(model: Model, text: str, *, n_ctx: int = 512, n_chunks: int = -1, stride: int = 0, base: str | os.PathLike[str] | None = None,
            **options: Any) -> tuple[int, Iterator[Perplexity]]:
    """(number of chunks, the perplexity so far after each of them).

    stride: chunks overlap: each begins `stride` tokens after the last, and only its last `stride` tokens are scored.
    base: write the log-probabilities of all scored tokens into this file.
    options: n_ubatch, n_threads and others of Context.
    """
    tokens = tokenize(model, text, n_ctx)
    if stride > 0:
        if base is not None:
            raise PyggmlError("--ppl-stride and --kl-divergence-base cannot be used together")
        return _strided(model, tokens, n_ctx + stride // 2, n_chunks, stride, options)
    chunks = split(tokens, n_ctx, n_chunks)
    return len(chunks), _plain(model, chunks, base, options)


def _plain(model: Model, chunks: np.ndarray, base: str | os.PathLike[str] | None, options: dict[str, Any]) -> Iterator[Perplexity]:
    if base is not None:
        with replacing(base, basefile.size(chunks.shape[1], model.n_vocab, len(chunks))) as out:
            out.write(basefile.header(chunks, model.n_vocab))
            yield from _score(model, chunks, options, lambda logits: out.write(basefile.encode(logits)))
    else:
        yield from _score(model, chunks, options, None)


def _score(model: Model, chunks: np.ndarray, options: dict[str, Any], write: Any) -> Iterator[Perplexity]:
    evaluator, first = Evaluator(model, chunks.shape[1], **options), first_scored(chunks.shape[1])
    scored = chunks.shape[1] - 1 - first
    nll = np.empty((len(chunks), scored))
    done = 0
    for group in evaluator.groups(chunks):
        for logits, targets in zip(evaluator.logits(group, first), evaluator.targets(group, first), strict=True):
            if write is not None:
                write(logits)
            nll[done] = _surprise(model, done, logits, targets)
            done += 1
            yield Perplexity(nll[:done].reshape(-1), done)


def _surprise(model: Model, chunk: int, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-ln p(target) for each row of logits of a chunk: float64 (rows)."""
    nll = -log_likelihood(logits, targets)
    if not np.isfinite(nll).all():
        raise PyggmlError(f"{model.file.path}: the logits of chunk {chunk + 1} are not finite: the model is damaged, or its numbers overflow")
    return nll


def _strided(model: Model, tokens: np.ndarray, n_ctx: int, n_chunks: int, stride: int, options: dict[str, Any]) -> tuple[int, Iterator[Perplexity]]:
    """Chunks of n_ctx tokens; like llama.cpp's, they begin without the vocabulary's first token."""
    most = -(-(len(tokens) - n_ctx) // stride)
    if stride > n_ctx - 1 or most < 1:
        raise PyggmlError(f"a stride of {stride} over {len(tokens)} tokens leaves nothing to score in chunks of {n_ctx}; use a smaller --ppl-stride")
    starts = np.arange(most if n_chunks < 0 else min(n_chunks, most)) * stride

    def score() -> Iterator[Perplexity]:
        evaluator, first = Evaluator(model, n_ctx, **options), n_ctx - stride - 1
        nll = np.empty((len(starts), stride))
        for i, start in enumerate(starts):
            chunk = tokens[None, start:start + n_ctx]
            logits = evaluator.logits(chunk, first, bos=False)[0]
            nll[i] = _surprise(model, i, logits, evaluator.targets(chunk, first)[0])
            yield Perplexity(nll[:i + 1].reshape(-1), i + 1)

    return len(starts), score()


def against(model: Model, path: str | os.PathLike[str], **options: Any) -> tuple[int, Iterator[Tokens]]:
    """(number of chunks, the scores so far after each of them) of a model against the reference whose log-probabilities are in `path`."""
    base = basefile.BaseFile(path)
    if base.n_vocab != model.n_vocab:
        raise PyggmlError(f"{base.path}: its model has {base.n_vocab} tokens, this one {model.n_vocab}; compare models with one vocabulary")

    def score() -> Iterator[Tokens]:
        evaluator, first = Evaluator(model, base.n_ctx, **options), first_scored(base.n_ctx)
        tokens, at = Scores(base.n_chunks), 0
        for group in evaluator.groups(np.asarray(base.chunks)):
            for logits, targets in zip(evaluator.logits(group, first), evaluator.targets(group, first), strict=True):
                tokens.add(divergence(base.log_probs(at), logits, targets, floor=-basefile.SPAN))
                at += 1
                yield tokens.so_far

    return base.n_chunks, score()


def perplexity(model: Model, text: str, *, progress: OnChunk | None = None, **options: Any) -> Perplexity:
    """The perplexity of a text; options are those of `running`. progress(done, total, so far) may return False to cancel."""
    total, results = running(model, text, **options)
    return _last(total, results, progress)


def kl_divergence(model: Model, path: str | os.PathLike[str], *, progress: OnChunk | None = None, **options: Any) -> Tokens:
    """Per-token scores of a model against a file of log-probabilities; scores.summary makes statistics of them."""
    total, results = against(model, path, **options)
    return _last(total, results, progress)


def _last(total: int, results: Iterator[Any], progress: OnChunk | None) -> Any:
    from pyggml.errors import Cancelled

    last = None
    for done, last in enumerate(results, 1):
        if progress is not None and progress(done, total, last) is False:
            raise Cancelled(f"stopped after {done} of {total} chunks")
    return last
