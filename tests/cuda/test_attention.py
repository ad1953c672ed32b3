"""Storing into and attention over caches of every type, against numpy."""

import os

import numpy as np
import pytest
from device_case import Numbers, cache_numbers, cache_view, hands_on_what_it_makes, nmse, run, view

from pyggml import quants
from pyggml.backends.cuda import attention as kernels
from pyggml.backends.cuda.base import DeviceView
from pyggml.errors import PyggmlError
from pyggml.ops import OPS
from pyggml.ops.rope import MODES

rng = np.random.default_rng(7)
HALF = 3e-6                                              # queries and probabilities are half floats: NMSE


def numbers(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def want(q, k, v, cell, first, scale, softcap=0.0, window=0, sinks=None):
    return OPS["attention"].reference(q, Numbers(k), Numbers(v), cell, first, sinks, scale=scale, softcap=softcap, window=window)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_store(kind):
    heads, cells, d = 2, 6, 32
    dst, x, cell = cache_view(kind, np.zeros((heads, cells, d), np.float32)), numbers(3, heads, d), np.array([5, 0, 2], np.int32)
    run("store", dst, [view(x, 0), view(cell, 0)], tokens=2)
    expected = np.zeros((heads, cells, d), np.float32)
    for t in range(2):
        expected[:, cell[t]] = quants.dequantize(quants.quantize(x[t], kind), kind)
    got = cache_numbers(dst)
    step = np.abs(expected).max() / 127 if kind == "Q8_0" else np.abs(expected).max() / 8 if kind == "Q4_0" else 0
    # a code may differ by one where the GPU's fast division lands on the other side of a half
    assert np.abs(got - expected).max() <= 1.001 * step and (got != expected).mean() < 0.02


@pytest.mark.skipif("PYGGML_PTX" in os.environ, reason="as PTX every type is compiled for one of the tests below")
@pytest.mark.parametrize("type_k,type_v", [("F16", "F16"), ("Q8_0", "Q8_0"), ("F32", "BF16"), ("Q4_0", "F16")])
def test_attention_of_a_token_over_few_cells(type_k, type_v):
    heads, kv, cells, d = 4, 2, 24, 32
    k, v = cache_view(type_k, numbers(kv, cells, d)), cache_view(type_v, numbers(kv, cells, d))
    q, cell, first = numbers(1, heads, d), np.array([20], np.int32), np.array([2], np.int32)
    out = np.zeros((1, heads * d), np.float32)
    run("attention", view(out), [view(q), k, v, view(cell), view(first)], i=[0, 0], f=[d**-0.5, 0])
    assert nmse(out, want(q, k, v, cell, first, d**-0.5)) < HALF


@pytest.mark.parametrize("d,dv,types", [(80, 72, ("F32", "BF16")), (136, 144, ("F16", "F16"))])
def test_heads_of_any_multiple_of_eight(d, dv, types):
    k, v = cache_view(types[0], numbers(1, 20, d)), cache_view(types[1], numbers(1, 20, dv))
    q, cell, first = numbers(2, 2, d), np.array([17, 18], np.int32), np.array([0, 0], np.int32)
    out = np.zeros((2, 2 * dv), np.float32)
    run("attention", view(out), [view(q), k, v, view(cell), view(first)], i=[0, 0], f=[0.3, 0])
    assert nmse(out, want(q, k, v, cell, first, 0.3)) < HALF


def test_sequences_windows_and_softcap():
    k, v = cache_view("Q8_0", numbers(1, 130, 32)), cache_view("Q4_0", numbers(1, 130, 32))
    q, cell, first = numbers(4, 1, 32) * 3, np.array([12, 13, 129, 40], np.int32), np.array([0, 0, 100, 20], np.int32)
    out = np.full((4, 32), 7, np.float32)
    run("attention", view(out, 0), [view(q, 0), k, v, view(cell, 0), view(first, 0)], i=[9, 0], f=[0.5, 2.0], tokens=3)
    assert nmse(out[:3], want(q, k, v, cell, first, 0.5, 2.0, 9)[:3]) < HALF
    assert (out[3] == 7).all()


@pytest.mark.parametrize("cells", [20, 70])               # of one block, and shared out to two
def test_attention_hands_on_what_it_makes(monkeypatch, cells):
    monkeypatch.setattr(kernels, "SPLIT_CELLS", 32)
    k, v = cache_view("F16", numbers(2, cells, 32)), cache_view("F16", numbers(2, cells, 32))
    q, cell, first = numbers(3, 6, 32), np.array([cells - 3, 5, cells - 1], np.int32), np.array([1, 0, 0], np.int32)
    out = np.full((3, 6 * 32), 7, np.float32)
    hands_on_what_it_makes("attention", view(out, 0), [view(q, 0), k, v, view(cell, 0), view(first, 0)], i=[0, 0], f=[0.3, 0], tokens=2, cells=cells)
    assert nmse(out[:2], want(q, k, v, cell, first, 0.3)[:2]) < HALF and (out[2] == 7).all()


def test_many_tokens_have_warps_of_their_own(monkeypatch):
    monkeypatch.setattr(kernels, "MOST_BLOCKS", 0)       # as if there were many tiles
    tokens, heads, d = 20, 2, 16
    k, v = cache_view("F16", numbers(1, tokens, d)), cache_view("F16", numbers(1, tokens, d))
    q, cell, first = numbers(tokens, heads, d), np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.int32)
    out = np.full((tokens, heads * d), 7, np.float32)
    run("attention", view(out, 0), [view(q, 0), k, v, view(cell, 0), view(first, 0)], i=[0, 0], f=[0.25, 0], tokens=tokens - 1)
    assert nmse(out[:-1], want(q, k, v, cell, first, 0.25)[:-1]) < HALF
    assert (out[-1] == 7).all()


@pytest.mark.parametrize("cells, blocks", [(20, 264), (70, 264), (20, 0)], ids=["a block", "two blocks", "a warp"])
def test_heads_with_sinks(monkeypatch, cells, blocks):
    monkeypatch.setattr(kernels, "SPLIT_CELLS", 32)
    monkeypatch.setattr(kernels, "MOST_BLOCKS", blocks)
    k, v = cache_view("F16", numbers(2, cells, 16)), cache_view("F16", numbers(2, cells, 16))
    q, sinks = numbers(2, 6, 16), np.float32([-1, 0, 2, 90, 1, -90])
    cell, first, out = np.array([cells - 1, 7], np.int32), np.array([0, 0], np.int32), np.full((2, 6 * 16), 7, np.float32)
    run("attention", view(out, 0), [view(q, 0), k, v, view(cell, 0), view(first, 0), view(sinks)], i=[0, 0], f=[0.3, 0], tokens=2, cells=cells)
    assert nmse(out, want(q, k, v, cell, first, 0.3, sinks=sinks)) < HALF


@pytest.mark.parametrize("mode", MODES)
def test_a_step_ropes_stores_and_attends(mode):
    heads, kv, cells, d, half = 4, 2, 40, 32, 8
    k, v = cache_view("F16", numbers(kv, cells, d)), cache_view("Q8_0", numbers(kv, cells, d))
    q, new_k, new_v = numbers(2, heads, d), numbers(2, kv, d), numbers(2, kv, d)
    table = OPS["rope_table"].reference(np.array([18, 19], np.int32), 100.0 ** -np.arange(half, dtype=np.float32), 1.0)
    cell, first, out = np.array([18, 19], np.int32), np.array([0, 0], np.int32), np.zeros((2, heads * d), np.float32)
    run("attention_step", view(out, 0), [view(q, 0), k, v, view(cell, 0), view(first, 0), view(new_k, 0), view(new_v, 0), view(table, 0)],
        i=[0, MODES.index(mode), 2 * half, 0], f=[d**-0.5, 0], tokens=2)
    rope = OPS["rope"].reference
    assert nmse(cache_numbers(k)[:, 18:20], rope(new_k, table, mode).transpose(1, 0, 2)) < 1e-6
    assert nmse(cache_numbers(v)[:, 18:20], new_v.transpose(1, 0, 2)) < 1e-4
    assert nmse(out, want(rope(q, table, mode), k, v, cell, first, d**-0.5)) < HALF


def test_a_cache_type_that_the_gpu_does_not_know_is_refused():
    k = DeviceView(np.zeros(16, np.uint8), "Q5_1", (1, 1, 32))
    with pytest.raises(PyggmlError, match="Q5_1 cannot lie on the GPU"):
        run("store", k, [view(numbers(1, 1, 32)), view(np.zeros(1, np.int32))])


def test_heads_too_wide_are_refused():
    k = DeviceView(np.zeros(264, np.float16), "F16", (1, 1, 264))
    one = view(np.zeros(1, np.int32))
    with pytest.raises(PyggmlError, match="heads of 264 and 264 numbers cannot be computed on the GPU"):
        run("attention", view(np.zeros((1, 264), np.float32)), [view(numbers(1, 1, 264)), k, k, one, one], i=[0, 0], f=[1, 0])
