"""One tensor from its type to another: decoded, checked and encoded piece by piece on several threads.

A piece is some rows of one matrix. Rows are encoded one by one, so the result does not depend on the pieces or the threads, and
the memory needed is that of the pieces under way, however large the tensor is.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from pyggml import quants
from pyggml.errors import PyggmlError
from pyggml.types import TensorType

PIECE = 1 << 18          # weights in a piece: a megabyte of floats stays in a core's cache between decoding and encoding
AHEAD = 4                # pieces under way for each thread, so that none waits for the disk
F16_MAX = 65504.0


def n_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(matrix, first row, end row) of every piece, rows counted over all matrices of a tensor of this shape."""
    if 0 in shape:
        return
    per_matrix = shape[-2] if len(shape) > 1 else 1
    n_matrices = int(np.prod(shape[:-2], dtype=np.int64)) if len(shape) > 2 else 1
    step = max(1, PIECE // shape[-1])
    for matrix in range(n_matrices):
        start = matrix * per_matrix
        for row in range(start, start + per_matrix, step):
            yield matrix, row, min(row + step, start + per_matrix)


class Encoder:
    """Encodes tensors on `n_threads` threads; `search` looks for better scales than ggml does, at the same size."""

    def __init__(self, n_threads: int | None = None, *, search: bool = True) -> None:
        self.n_threads, self.search = n_threads or n_cpus(), search
        self._pool = ThreadPoolExecutor(self.n_threads, "pyggml-quantize") if self.n_threads > 1 else None

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, tensor: Any, kind: TensorType, importance: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """The blocks of `tensor` in type `kind`, in order: uint8 arrays (rows, bytes of a row).

        importance: float32 (matrices, columns), how much an error in each column weighs.
        PyggmlError for weights that are not finite or that the type cannot hold.
        """
        raw = tensor.raw

        def piece(matrix: int, start: int, end: int) -> np.ndarray:
            rows = decode(raw[start:end], tensor.type)
            check(rows, kind, tensor, start)
            return encode_rows(rows, kind, None if importance is None else importance[matrix], self.search)

        yield from self._in_order(piece, pieces(tensor.shape))

    def _in_order(self, work: Any, jobs: Iterable[tuple[int, int, int]]) -> Iterator[np.ndarray]:
        if self._pool is None:
            yield from (work(*job) for job in jobs)
            return
        waiting: deque[Future[np.ndarray]] = deque()
        try:
            for job in jobs:
                waiting.append(self._pool.submit(work, *job))
                if len(waiting) >= AHEAD * self.n_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:          # an error or a cancelled run: what has not started never does
                future.cancel()


def decode(raw: np.ndarray, kind: TensorType) -> np.ndarray:
    """Rows of blocks as float32 (rows, columns); a view for F32."""
    return raw.view(np.float32) if kind.name == "F32" else quants.dequantize(raw, kind, threads=1)


def encode_rows(rows: np.ndarray, kind: TensorType, importance: np.ndarray | None, search: bool) -> np.ndarray:
    """Finite float32 (rows, columns) as blocks, uint8 (rows, bytes of a row)."""
    if not kind.quantized:
        return quants.quantize(rows, kind)
    out = np.empty((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
    quants.quantize_rows(rows, kind, quants.usable(importance, search), out, search, threads=1)
    return out


def check(rows: np.ndarray, kind: TensorType, tensor: Any, start: int) -> None:
    """PyggmlError for weights that are not finite, or beyond what a type with F16 scales can hold."""
    low, high = float(rows.min()), float(rows.max())         # NaN and infinities survive both
    if not np.isfinite(low + high):
        bad = int(np.argwhere(~np.isfinite(rows).all(-1))[0, 0])
        value = rows[bad][~np.isfinite(rows[bad])][0]
        raise PyggmlError(f'{tensor.source.name}: tensor "{tensor.name}" holds {value} in row {start + bad}; '
                          "the model is damaged or badly trained, convert it again from its source")
    if max(-low, high) > F16_MAX and kind.name not in ("F32", "BF16"):
        raise PyggmlError(f'{tensor.source.name}: tensor "{tensor.name}" holds {max(-low, high):g}, beyond the {F16_MAX:g} that {kind.name} '
                          "can scale to; keep it with --tensor-type or use BF16")
