"""llama.cpp's files of a reference model's log-probabilities (`--kl-divergence-base`).

    char[8] "_logits_"   i32 n_ctx   i32 n_vocab   i32 chunks   i32 tokens[chunks * n_ctx]
    then for every scored token a record of 16-bit words, n_vocab rounded up to even plus 4:
    +----------+-----------+--------------------+
    | f32 step | f32 floor | u16 code[n_vocab]  |      ln p(i) = floor + step * code[i]
    +----------+-----------+--------------------+
    The codes span the 16 nats below the best token; what is less likely is written as floor.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.measure.scores import by_rows

MAGIC = b"_logits_"
SPAN = 16.0              # nats
_LEVELS = 65535


def _words(n_vocab: int) -> int:
    return n_vocab + n_vocab % 2 + 4


def size(n_ctx: int, n_vocab: int, n_chunks: int) -> int:
    """Bytes of a file."""
    return 20 + 4 * n_ctx * n_chunks + 2 * _words(n_vocab) * (n_ctx - 1 - n_ctx // 2) * n_chunks


def header(chunks: np.ndarray, n_vocab: int) -> bytes:
    """What stands before the records, for chunks of tokens (chunks, n_ctx)."""
    return MAGIC + struct.pack("<iii", chunks.shape[1], n_vocab, len(chunks)) + chunks.astype("<i4").tobytes()


def encode(logits: np.ndarray) -> np.ndarray:
    """Records for logits (rows, n_vocab): uint16 (rows, words)."""
    out = np.zeros((len(logits), _words(logits.shape[1])), "<u2")

    def work(rows: slice) -> None:
        x = logits[rows]
        top = x.max(-1, keepdims=True)
        low = np.maximum(x.min(-1, keepdims=True), top - np.float32(SPAN))
        log_total = np.log(np.exp(x - top).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
        step = (top - low) / np.float32(_LEVELS)
        out[rows, :4] = np.concatenate([step, low - top - log_total], -1).astype("<f4").view("<u2")
        inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
        out[rows, 4:4 + x.shape[1]] = np.rint(inverse * np.maximum(x - low, 0))

    by_rows(work, *logits.shape)
    return out


def decode(records: np.ndarray, n_vocab: int) -> np.ndarray:
    """Log-probabilities, float32 (rows, n_vocab)."""
    numbers = np.ascontiguousarray(records[:, :4]).view("<f4")
    return records[:, 4:4 + n_vocab] * numbers[:, :1] + numbers[:, 1:]


class BaseFile:
    """A file that is read chunk by chunk."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            with open(self.path, "rb") as file:
                start = file.read(20)
        except OSError as error:
            raise PyggmlError(f"{self.path}: cannot read: {error.strerror}") from None
        if start[:8] != MAGIC or len(start) < 20:
            raise PyggmlError(f"{self.path}: this is not a file of log-probabilities; make one with `pyggml perplexity --kl-divergence-base`")
        self.n_ctx, self.n_vocab, self.n_chunks = struct.unpack("<iii", start[8:])
        actual = os.path.getsize(self.path)
        if min(self.n_ctx - 3, self.n_vocab, self.n_chunks) < 1 or size(self.n_ctx, self.n_vocab, self.n_chunks) > actual:
            raise PyggmlError(f"{self.path}: {self.n_chunks} chunks of {self.n_ctx} tokens over {self.n_vocab} do not fit its {actual} bytes; "
                              "it is incomplete, make it again")
        self._data = np.memmap(self.path, np.uint8, "r")
        tokens = 4 * self.n_ctx * self.n_chunks
        self.chunks = self._data[20:20 + tokens].view("<i4").reshape(self.n_chunks, self.n_ctx)
        self._records = self._data[20 + tokens:size(self.n_ctx, self.n_vocab, self.n_chunks)].view("<u2").reshape(
            self.n_chunks, -1, _words(self.n_vocab))

    def log_probs(self, chunk: int) -> np.ndarray:
        """float32 (scored tokens of the chunk, n_vocab)"""
        return decode(self._records[chunk], self.n_vocab)

    def __iter__(self) -> Iterator[Any]:
        return (self.log_probs(i) for i in range(self.n_chunks))
