"""rope_table, rope and store."""

import numpy as np
import pytest
from kernel_case import ISAS, ROPE_NEOX, ROPE_NORM, THREADS, nmse, run
from rope_reference import rope, rope_table

rng = np.random.default_rng(11)


def floats(*shape) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("tokens, dims", [(1, 2), (3, 64), (130, 80)])
def test_rope_table(isa, threads, tokens, dims):
    positions = rng.integers(0, 131073, tokens).astype(np.int32)
    inv_freq = (10000.0 ** -(np.arange(0, dims, 2) / dims)).astype(np.float32)
    dst = np.full((tokens, dims // 2, 2), np.nan, np.float32)
    run("rope_table", isa, dst, [positions, inv_freq], f=[1.25], threads=threads)
    assert np.abs(dst - rope_table(positions, inv_freq, 1.25)).max() < 2e-7


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [ROPE_NORM, ROPE_NEOX])
@pytest.mark.parametrize("tokens, heads, D, R", [(1, 1, 64, 64), (5, 3, 80, 80), (40, 8, 96, 32), (2, 2, 48, 20), (300, 4, 128, 128)])
def test_rope(isa, kind, tokens, heads, D, R):
    x, table = floats(tokens, heads, D), rope_table(np.arange(tokens), 10000.0 ** -(np.arange(0, R, 2) / R)).astype(np.float32)
    dst, want = np.full_like(x, np.nan), rope(x, table, kind)
    run("rope", isa, dst, [x, table], i=[kind, R], threads=3)
    assert nmse(dst, want) < 1e-13
    assert np.array_equal(dst[..., R:], x[..., R:])
    run("rope", isa, x, [x, table], i=[kind, R], threads=2)
    assert np.array_equal(x, dst)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("cache_type, dtype", [("F32", np.float32), ("F16", np.float16), ("BF16", np.uint16)])
@pytest.mark.parametrize("D", [48, 100])
def test_store(isa, threads, cache_type, dtype, D):
    heads, cells, tokens = 3, 40, 25
    x, cell = floats(tokens, heads, D), rng.permutation(cells)[:tokens].astype(np.int32)
    x[0, 0, :2] = np.inf, np.nan
    cache = np.full((heads, cells, D), 7, dtype)
    want = cache.copy()
    if cache_type == "BF16":
        bits = x.view(np.uint32).astype(np.uint64)
        stored = np.where(np.isnan(x), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    else:
        stored = x.astype(dtype)
    want[:, cell] = stored.transpose(1, 0, 2)
    run("store", isa, (cache, {"type": cache_type, "shape": cache.shape}), [x, cell], threads=threads)
    assert np.array_equal(cache, want, equal_nan=cache_type != "BF16")
