"""Shapes of a graph's tensors: numbers in numpy order, and symbols for the sizes that change between runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Symbol:
    """A size that is known only when the graph runs; `slot` is its place among the run-time values."""

    name: str
    slot: int

    def __repr__(self) -> str:
        return self.name


TOKENS = Symbol("T", 0)         # tokens of this batch
OUTPUTS = Symbol("O", 1)        # rows of logits wanted from it
SYMBOLS = (TOKENS, OUTPUTS)

Dim = int | Symbol
Shape = tuple[Dim, ...]
