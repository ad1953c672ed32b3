"""Models side by side: every chunk goes through the reference and through the others, and only their divergence is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.measure.chunks import Evaluator, first_scored
from pyggml.measure.scores import Scores, Tokens, divergence, log_softmax
from pyggml.model import Model


def check_vocabulary(reference: Model, model: Model) -> None:
    """PyggmlError when two models do not speak of the same tokens."""
    ours, theirs = (m.file.kv.get("tokenizer.ggml.tokens", []) for m in (reference, model))
    if reference.n_vocab != model.n_vocab or ours != theirs:
        raise PyggmlError(f"{model.file.path}: its vocabulary of {model.n_vocab} tokens is not that of {reference.file.path} ({reference.n_vocab}); "
                          "compare files made from one model")


def lockstep(reference: Model, models: Sequence[Model], chunks: np.ndarray, **options: Any) -> Iterator[list[Tokens]]:
    """The scores of every model so far, after each chunk of tokens (chunks, n_ctx). Memory: the logits of one group of chunks."""
    for model in models:
        check_vocabulary(reference, model)
    n_ctx = chunks.shape[1]
    base, first = Evaluator(reference, n_ctx, **options), first_scored(n_ctx)
    others = [Evaluator(m, n_ctx, **options) for m in models]
    scores = [Scores(len(chunks)) for _ in models]
    for group in base.groups(chunks):
        targets = base.targets(group, first)
        expected = [log_softmax(logits) for logits in base.logits(group, first)]
        for evaluator, score in zip(others, scores, strict=True):
            found = evaluator.logits(group, first)
            for i in range(len(group)):
                score.add(divergence(expected[i], found[i], targets[i]))
        yield [score.so_far for score in scores]
