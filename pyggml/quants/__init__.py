"""Quantized tensors to floats and back: `quantize` and `dequantize`, for every tensor type and for types of your own.

The C kernels do the work where there are any; the numpy codecs beside this file say what each type means and are used otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.native import ffi, lib
from pyggml.quants import fp4, iquants, kquants, legacy, simple, ternary  # noqa: F401  (each registers its codecs)
from pyggml.quants.codec import CODECS, Codec, codec, register
from pyggml.types import TensorType, tensor_type

__all__ = ["CODECS", "Codec", "codec", "dequantize", "quantize", "register"]

_FLOAT, _BYTE = np.dtype(np.float32), np.dtype(np.uint8)
_FLOATS = ffi.typeof("float[]")
_CHUNK = 1 << 19         # weights handed to one worker at a time
# up to so many weights are decoded, or become plain numbers, before a helper wakes (measured: two threads break even at three million)
_QUICK = 1 << 21
# the result of so many weights passes the caches by, which would not hold it, if its array was there before: a new one's pages have just come
# through the caches, cleared (measured: faster into the old, 0.9 times as fast into the new)
_PLENTY = 1 << 22
_pool: list[ThreadPoolExecutor] = []        # the helpers of _in_chunks, once there were any; gone after a fork, as threads are
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.clear)


def _streams(weights: int) -> bool:
    """Whether a result that has a place goes there past the caches."""
    return weights >= _PLENTY and lib is not None and bool(lib.pyg_streams_stores())


def _is_one_call(weights: int, threads: int | None, most: int = _CHUNK) -> bool:
    """Whether a C call does it all: looked at first, as after megabytes of weights every line of Python comes from memory again."""
    return threads == 1 or weights <= most


def _in_chunks(rows: int, per_row: int, threads: int | None, work: Callable[[int, int], int]) -> int:
    """The largest of what work(first, last) returns over ranges of rows, on several threads (C calls release the GIL)."""
    step = max(1, _CHUNK // per_row)
    starts = range(0, rows, step)
    threads = min(threads or os.cpu_count() or 1, len(starts))
    if threads == 1:
        return work(0, rows)
    if not _pool or _pool[0]._max_workers < threads - 1:
        _pool[:] = [ThreadPoolExecutor(threads - 1, "pyggml-quants")]
    chunks = iter(starts)

    def take() -> int:
        return max((work(i, min(rows, i + step)) for i in chunks), default=0)
    helpers = [_pool[0].submit(take) for _ in range(threads - 1)]
    worst = 0
    try:
        worst = take()
    finally:
        for helper in helpers:
            worst = max(worst, helper.result())
    return worst


def _result(out: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Where a result of this shape goes: a new array, or the caller's `out` if it is one that C can fill."""
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.carray:
        raise PyggmlError(f"out is {out.dtype} of shape {out.shape}; pass a writable, contiguous {dtype} array of shape {shape}")
    return out


def dequantize(blocks: np.ndarray, type: int | str | TensorType, *, out: np.ndarray | None = None, threads: int | None = None) -> np.ndarray:
    """The weights of rows of blocks as float32: (..., bytes) -> (..., weights).

    `blocks` holds whole rows, last axis first in memory, of any dtype (its bytes are what counts).
    out: an array to fill and return, where a new one each time (and the pages that the system has to clear for it) costs too much.
    PyggmlError when a row is not a whole number of blocks, or `out` does not fit.
    """
    row = tensor_type(type)
    raw = np.ascontiguousarray(blocks)
    row_bytes = raw.shape[-1] * raw.itemsize
    if row_bytes % row.bytes:
        raise PyggmlError(f"rows of {row_bytes} bytes do not divide into {row} blocks of {row.bytes} bytes")
    per_row = row_bytes // row.bytes * row.block
    stream = out is not None and _streams(out.size)
    out = _result(out, (*raw.shape[:-1], per_row), _FLOAT)
    if out.size == 0:
        return out
    if lib is not None and not row.user_defined:
        src, dst = ffi.from_buffer(raw), ffi.from_buffer(_FLOATS, out)
        if _is_one_call(out.size, threads, _QUICK):
            lib.pyg_dequantize(row.id, out.size, src, dst, stream)
        else:
            _in_chunks(out.size // per_row, per_row, threads, lambda first, last: lib.pyg_dequantize(
                row.id, (last - first) * per_row, src + first * row_bytes, dst + first * per_row, stream))
    else:
        with np.errstate(all="ignore"):
            out[:] = codec(row).decode(raw.view(np.uint8).reshape(-1).view(row.layout)).reshape(out.shape)
    return out


def quantize(array: np.ndarray, type: int | str | TensorType, imatrix: np.ndarray | None = None, *, search: bool = False,
             out: np.ndarray | None = None, threads: int | None = None) -> np.ndarray:
    """Rows of weights as rows of blocks: (..., weights) of any numeric dtype -> uint8 (..., bytes).

    imatrix: how much the squared error of each column matters, (weights,), or one such row per leading index of `array`,
    (..., weights) without the row axis, as for a stack of experts. Types that a formula defines ignore it.
    search: look for the least squared error (Q4_0: weighted by x^2, Q3_K: by sqrt(16 mean squares + x^2)); with an imatrix weighted nearly
    as ggml weighs it, by importance * sqrt(1 to 4 mean squares + x^2) (Q6_K and the formula types: by importance). Then what least squares
    shrinks is taken back (native/kernels/loss.h says why). Without `search` scales are ggml's choice, and so is every byte but for a rare tie.
    out: an array to fill and return, as for `dequantize`.
    The bytes do not depend on `threads`.
    PyggmlError when a row is not a whole number of blocks, `out` does not fit, or a value is not finite (a blocked type cannot hold it).
    """
    row = tensor_type(type)
    x = np.asarray(array)
    if x.ndim == 0:
        raise PyggmlError(f"cannot quantize a single number to {row}; pass an array whose last axis is a row of weights")
    n = x.shape[-1]
    stream = out is not None and _streams(x.size)
    out = _result(out, (*x.shape[:-1], row.row_bytes(n)), _BYTE)
    if out.size == 0:
        return out
    if not row.quantized and row.layout.kind in "if" and row.layout.itemsize == 8:         # float32 would round these
        out.view(row.layout)[:] = x
        return out
    x = np.ascontiguousarray(x, _FLOAT)
    for rows, blocks, importance in _stacks(x, out, imatrix):
        if not quantize_rows(rows, row, usable(importance, search), blocks, search, threads, stream):
            where = np.argwhere(~np.isfinite(x))[0]
            raise PyggmlError(f"cannot quantize {x[tuple(where)]} at index {where.tolist()} to {row}; repair the tensor or keep it in F32")
    return out


def _stacks(x: np.ndarray, out: np.ndarray, imatrix: np.ndarray | None) -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """The stacks of rows of x that share an importance row, each with its part of `out` and that row."""
    if imatrix is None:
        return ((x, out, None),)
    w = np.ascontiguousarray(imatrix, _FLOAT)
    if w.shape not in {x.shape[-1:], (*x.shape[:-2], x.shape[-1])}:
        raise PyggmlError(f"an importance of shape {w.shape} does not fit weights of shape {x.shape}; pass {x.shape[-1:]}")
    if not (np.isfinite(w).all() and (w >= 0).all()):
        raise PyggmlError("the importance matrix has a negative or non-finite entry; compute it again")
    w = w.reshape(-1, x.shape[-1])
    return zip(x.reshape(len(w), -1, x.shape[-1]), out.reshape(len(w), -1, out.shape[-1]), w, strict=True)


def usable(w: np.ndarray | None, search: bool) -> np.ndarray | None:
    """An importance row as encoders want it: not all zeros, and for a search nowhere zero: columns that were never active still deserve
    some fit, far below what could move the others."""
    if w is None or not w.any():
        return None
    return np.where(w > 0, w, np.float32(1e-6) * w.mean()) if search else w


def quantize_rows(x: np.ndarray, row: TensorType, w: np.ndarray | None, out: np.ndarray, search: bool, threads: int | None,
                  stream: bool = False) -> bool:
    """x, float32 (..., n), with importance w (n,) or None into out, uint8 (..., bytes), both contiguous. False when a blocked type gets
    what is not finite. stream: past the caches."""
    n, row_bytes = x.shape[-1], out.shape[-1]
    if lib is not None and not row.user_defined:
        importance = ffi.NULL if w is None else ffi.from_buffer(_FLOATS, w)
        src, dst = ffi.from_buffer(_FLOATS, x), ffi.from_buffer(out)
        if _is_one_call(x.size, threads, _CHUNK if row.quantized else _QUICK):
            status = lib.pyg_quantize(row.id, x.size // n, n, src, dst, importance, search, row.quantized, stream)
        else:
            status = _in_chunks(x.size // n, n, threads, lambda first, last: lib.pyg_quantize(
                row.id, last - first, n, src + first * n, dst + first * row_bytes, importance, search, row.quantized, stream))
        if status == 3:
            raise PyggmlError(f"no memory for the codebook of {row}, a few megabytes; free some, or choose another type")
        if status != 1:
            return status == 0
    if row.quantized and not np.isfinite(x).all():
        return False
    columns = None if w is None else np.ascontiguousarray(np.broadcast_to(w, x.shape)).reshape(-1, row.block)
    with np.errstate(all="ignore"):
        out[:] = codec(row).encode(x.reshape(-1, row.block), columns).view(np.uint8).reshape(out.shape)
    return True
