"""Text cut into chunks of tokens, and their logits: the protocol of llama.cpp's perplexity tool.

The whole text becomes tokens once; chunk i is tokens[i * n_ctx : (i + 1) * n_ctx], evaluated on its own. Where the vocabulary puts
a token before every text, it replaces the first token of each chunk. Only the second half of a chunk is scored, so that every scored
token has some context: the logits after token j, for n_ctx // 2 <= j < n_ctx - 1, are held against token j + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pyggml import native
from pyggml.context import Context
from pyggml.errors import PyggmlError
from pyggml.model import Model


def tokenize(model: Model, text: str, n_ctx: int, *, parse_special: bool = False) -> np.ndarray:
    """The tokens of a text, int32; PyggmlError when there are fewer than two chunks of them."""
    if n_ctx < 4:
        raise PyggmlError(f"chunks of {n_ctx} tokens are too short to score; use at least 4 (-c)")
    tokens = np.asarray(model.tokenizer.encode(text, parse_special=parse_special), np.int32)
    if len(tokens) < 2 * n_ctx:
        raise PyggmlError(f"the text has {len(tokens)} tokens, and {2 * n_ctx} are needed for chunks of {n_ctx}; use more text or a smaller -c")
    return tokens


def split(tokens: np.ndarray, n_ctx: int, n_chunks: int = -1) -> np.ndarray:
    """The first `n_chunks` chunks (-1: all): int32 (chunks, n_ctx)."""
    whole = len(tokens) // n_ctx
    n = whole if n_chunks < 0 else min(n_chunks, whole)
    if n < 1:
        raise PyggmlError(f"{n_chunks} chunks were asked for; at least one is needed (--chunks)")
    return tokens[:n * n_ctx].reshape(n, n_ctx)


def first_scored(n_ctx: int) -> int:
    return n_ctx // 2


def with_bos(model: Model, chunks: np.ndarray) -> np.ndarray:
    """The chunks, the token that the vocabulary puts before every text in the place of their first, where it has one."""
    tokens = chunks.copy()
    if model.tokenizer.options["add_bos"] and model.tokenizer.bos is not None:
        tokens[:, 0] = model.tokenizer.bos
    return tokens


class Evaluator:
    """Logits of chunks by one model; several chunks go through the model together where they fit into `n_ubatch` tokens.

    On a CPU activations are rounded as llama.cpp rounds them, in batches of any size: a matrix unit, which rounds less, would make a figure
    depend on the machine that it is taken on, by half a percent of a perplexity.
    """

    def __init__(self, model: Model, n_ctx: int, *, n_ubatch: int = 512, n_threads: int | None = None, watch: Any = None, **options: Any) -> None:
        self.model, self.n_ctx, self.n_ubatch = model, n_ctx, n_ubatch
        self.at_once = max(1, n_ubatch // n_ctx)
        options |= {"n_ctx": self.at_once * n_ctx, "n_ubatch": n_ubatch, "n_batch": max(n_ubatch, n_ctx), "n_threads": n_threads, "watch": watch}
        self.context = Context(model, **options)
        if native.lib is not None and not self.context.gpu_layers and not options.get("exact"):
            self.context = Context(model, **options | {"deterministic": True})

    def groups(self, chunks: np.ndarray) -> Iterator[np.ndarray]:
        """The chunks in the groups that are evaluated together."""
        for at in range(0, len(chunks), self.at_once):
            yield chunks[at:at + self.at_once]

    def logits(self, group: np.ndarray, first: int, *, bos: bool = True, last: bool = False) -> np.ndarray:
        """Logits after the tokens first..n_ctx - 2 of each chunk of a group: float32 (chunks, n_ctx - 1 - first, n_vocab).

        bos: put the vocabulary's first token in front, where it has one. last: one row more, after the last token.
        The array is overwritten by the next call.
        """
        count, n = group.shape
        tokens = with_bos(self.model, group) if bos else group
        room = self.n_ubatch // count
        parts = []
        for start in range(0, n, room):
            end = min(n, start + room)
            wanted = range(max(first - start, 0), min(n - (not last), end) - start)
            out = self.context.sequences(tokens[:, start:end], start, wanted)
            if len(wanted):
                rows = out.reshape(count, len(wanted), -1)
                parts.append(rows if end == n else rows.copy())
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def targets(self, group: np.ndarray, first: int) -> np.ndarray:
        """The tokens that those logits should predict: (chunks, n_ctx - 1 - first)."""
        return group[:, first + 1:]
