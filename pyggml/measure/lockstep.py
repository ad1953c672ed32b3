"""Models side by side: every chunk goes through the reference and through the others, and only their divergence is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pyggml.context import Model
from pyggml.errors import PyggmlError
from pyggml.formats.source import Memory
from pyggml.formats.tensorfile import Tensor, TensorFile
from pyggml.measure.chunks import Evaluator, first_scored
from pyggml.measure.scores import Scores, Tokens, divergence, log_softmax
from pyggml.types import TensorType


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


class Yardstick:
    """The log-probabilities of a reference over some chunks, kept to measure many variants of it one after the other."""

    def __init__(self, reference: Model, chunks: np.ndarray, **options: Any) -> None:
        self.reference, self.chunks, self.options = reference, chunks, options
        self.first = first_scored(chunks.shape[1])
        evaluator = Evaluator(reference, chunks.shape[1], **options)
        self._expected = [[log_softmax(logits) for logits in evaluator.logits(group, self.first)] for group in evaluator.groups(chunks)]

    def measure(self, model: Model) -> Tokens:
        """The scores of a model over all chunks."""
        evaluator, scores = Evaluator(model, self.chunks.shape[1], **self.options), Scores(len(self.chunks))
        for group, expected in zip(evaluator.groups(self.chunks), self._expected, strict=True):
            targets = evaluator.targets(group, self.first)
            for i, logits in enumerate(evaluator.logits(group, self.first)):
                scores.add(divergence(expected[i], logits, targets[i]))
        return scores.so_far

    def with_tensors(self, tensors: Mapping[str, Any]) -> Tokens:
        """The scores of the reference with some of its tensors replaced."""
        return self.measure(Model(overlay(self.reference.file, tensors)))


def overlay(file: TensorFile, tensors: Mapping[str, Any]) -> TensorFile:
    """`file` with some tensors replaced by others of the same shape."""
    return TensorFile(file.sources, file.kv, {**file.tensors, **tensors}, format=file.format, alignment=file.alignment,
                      data_offset=file.data_offset, order=file.order)


def in_memory(name: str, kind: TensorType, shape: tuple[int, ...], blocks: np.ndarray) -> Tensor:
    """A tensor whose blocks (uint8) are in memory."""
    return Tensor(Memory(np.ascontiguousarray(blocks), name), name, kind, shape, 0, blocks.nbytes)
