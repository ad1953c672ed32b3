"""What differs between two models: metadata, the list of tensors, and how far apart the weights are."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from pyggml.formats.tensorfile import OpaqueType, Tensor, TensorFile
from pyggml.formats.values import StringArray, Typed
from pyggml.quants import dequantize

WEIGHTS_AT_ONCE = 1 << 18


class KeyChange(NamedTuple):
    """A metadata key that differs; None where it is missing."""

    key: str
    a: Typed | None
    b: Typed | None


class TensorChange(NamedTuple):
    """A tensor that differs. Distances are of b from a, over the weights as floats; NaN where they cannot be compared."""

    name: str
    a: Tensor | None
    b: Tensor | None
    rmse: float = math.nan
    relative: float = math.nan      # rmse over the root mean square of a
    cosine: float = math.nan
    max_error: float = math.nan


def metadata(a: TensorFile, b: TensorFile) -> list[KeyChange]:
    """Keys that differ in type or value, in the order of `a`, then the new ones of `b`."""
    changes = []
    for key in [*a.kv, *(k for k in b.kv if k not in a.kv)]:
        left, right = (f.kv.typed_value(key) if key in f.kv else None for f in (a, b))
        if left is None or right is None or not same(left, right):
            changes.append(KeyChange(key, left, right))
    return changes


def same(a: Typed, b: Typed) -> bool:
    """Equal in type and value; NaN equals NaN."""
    if a.type != b.type:
        return False
    if a.type == "arr[]":
        return len(a.value) == len(b.value) and all(same(x, y) for x, y in zip(a.value, b.value, strict=True))
    if isinstance(a.value, np.ndarray) and isinstance(b.value, np.ndarray):
        return np.array_equal(a.value, b.value, equal_nan=a.value.dtype.kind == "f")
    if isinstance(a.value, StringArray) and isinstance(b.value, StringArray):
        alike = a.value.order == b.value.order and a.value.prefix == b.value.prefix
        return a.value.encoded() == b.value.encoded() if alike else a.value == b.value
    return a.value == b.value or (a.value != a.value and b.value != b.value)


def tensors(a: TensorFile, b: TensorFile) -> list[TensorChange]:
    """Tensors that differ: missing ones and ones of another shape first, then the most different first. Several are read at a time."""
    names = [*a.tensors, *(name for name in b.tensors if name not in a.tensors)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        changes = list(pool.map(lambda name: compare(name, a.tensors.get(name), b.tensors.get(name)), names))
    found = [change for change in changes if change is not None]
    return sorted(found, key=lambda c: -math.inf if math.isnan(c.relative) else -c.relative)


def compare(name: str, a: Tensor | None, b: Tensor | None) -> TensorChange | None:
    """The distance of one tensor; None when type, shape and bytes are equal."""
    if a is None or b is None or a.shape != b.shape:
        return TensorChange(name, a, b)
    if a.type == b.type and all(np.array_equal(x, y) for x, y in zip(a.pieces(), b.pieces(), strict=True)):
        return None
    if isinstance(a.type, OpaqueType) or isinstance(b.type, OpaqueType):
        return TensorChange(name, a, b)
    squares = products = ours = theirs = largest = 0.0
    with np.errstate(invalid="ignore", over="ignore"):          # of damaged weights all this is NaN, and shown as that
        for x, y in zip(rows(a), rows(b), strict=True):
            error = (y - x).astype(np.float64)
            squares += float(error @ error)
            products += float(x.astype(np.float64) @ y)
            ours += float(x.astype(np.float64) @ x)
            theirs += float(y.astype(np.float64) @ y)
            largest = max(largest, float(np.abs(error).max(initial=0)))
    rmse = math.sqrt(squares / max(1, a.size))
    norm = math.sqrt(ours / max(1, a.size))
    lengths = math.sqrt(ours) * math.sqrt(theirs)
    relative = rmse / norm if norm else math.inf if rmse else 0.0
    return TensorChange(name, a, b, rmse, relative, products / lengths if lengths else math.nan, largest)


def rows(t: Tensor) -> Iterator[np.ndarray]:
    """The weights as float32, flat, in pieces of whole rows, the same for tensors of one shape whatever their types."""
    assert not isinstance(t.type, OpaqueType)       # the caller has looked
    per_row = t.shape[-1] if t.shape else 1
    row_bytes, n = t.type.row_bytes(per_row), t.size // per_row if per_row else 0
    step = max(1, WEIGHTS_AT_ONCE // max(1, per_row))
    for start in range(0, n, step):
        yield dequantize(t.part(start * row_bytes, (min(n, start + step) - start) * row_bytes), t.type, threads=1)
