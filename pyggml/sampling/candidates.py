"""Tokens that may still be drawn, and how likely they are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


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


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float32 (n), of logits (n)."""
    p = np.exp(logits - logits.max())
    return p / p.sum()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities, float32 (..., n), of logits (..., n)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
