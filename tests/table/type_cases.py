"""What the tests over the type table share: the rows, instruction sets, golden vectors and comparisons."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from pyggml import native, quants
from pyggml.types import TYPES, TensorType

GOLDEN = Path(__file__).parents[1] / "golden" / "codec"
ISAS = [name for name, usable in native.isa_names().items() if usable]
BLOCKED = [t for t in TYPES if t.quantized]
FORMULA = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q8_K", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0",
           "Q2_0"}
SEARCHED = [t for t in BLOCKED if t.name not in FORMULA]

every_type = pytest.mark.parametrize("row", TYPES, ids=str)
every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)


@pytest.fixture
def isa(request):
    """Selects an instruction set for one test."""
    before = native.isa
    native.select_isa(request.param)
    yield request.param
    native.select_isa(before)


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    """A golden file by type name (or `input`, `more`); {} where there is none."""
    path = GOLDEN / f"{name.lower().replace('_k', '_K')}.npz"
    return dict(np.load(path)) if path.exists() else {}


def as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1)


def random_blocks(row: TensorType, n: int, seed: int = 0) -> np.ndarray:
    """uint8 (n, bytes): random, but the first block all ones and the second all zeros."""
    blocks = np.random.default_rng(seed).integers(0, 256, (n, row.bytes), np.uint8)
    blocks[:1], blocks[1:2] = 255, 0
    return blocks


def numpy_decode(row: TensorType, blocks: np.ndarray) -> np.ndarray:
    """The numpy codec's weights of whole blocks (n, bytes), flat."""
    with np.errstate(all="ignore"):
        return quants.codec(row).decode(np.ascontiguousarray(blocks).reshape(-1).view(row.layout)).reshape(-1)


def numpy_encode(row: TensorType, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    """The numpy codec's blocks of rows x (rows, n), importance w (n,): uint8 (rows, bytes)."""
    columns = None if w is None else np.ascontiguousarray(np.broadcast_to(w, x.shape)).reshape(-1, row.block)
    with np.errstate(all="ignore"):
        return quants.codec(row).encode(x.reshape(-1, row.block), columns).view(np.uint8).reshape(len(x), -1)


def assert_same_floats(a: np.ndarray, b: np.ndarray) -> None:
    """Equal bit for bit, NaNs anywhere in the same places."""
    a, b = np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1)
    assert a.dtype == b.dtype == np.float32 and a.shape == b.shape
    different = (a.view(np.uint32) != b.view(np.uint32)) & ~(np.isnan(a) & np.isnan(b))
    where = np.flatnonzero(different)[:3]
    assert not different.any(), f"{different.sum()} of {len(a)} differ, first at {where}: {a[where]} and {b[where]}"


def squared_error(row: TensorType, blocks: np.ndarray, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    """(Weighted) squared error of each row."""
    y = quants.dequantize(blocks, row).astype(np.float64)
    return ((y - x) ** 2 * (1 if w is None else w)).sum(axis=1)
