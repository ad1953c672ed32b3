"""Tensors of more than 2^32 bytes, of which a kernel touches a few: every index on the way to them must have 64 bits.

Only on the machine that runs PTX: the memory is zeros that nobody looks at, which take none.
"""

import numpy as np
import on_machine
import pytest
from device_case import Numbers, cache_view, nmse, run, scratch, view, weight
from ptx.memory import zeros

from pyggml.backends.cuda import attention, gemm, layout
from pyggml.backends.cuda.act import INT8
from pyggml.backends.cuda.base import DeviceView, HandOn
from pyggml.ops import OPS

rng = np.random.default_rng(9)
FAR = 1 << 32


def numbers(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def at_the_end(small: DeviceView, rows: int) -> DeviceView:
    """A re-laid Q8_0 weight of so many rows (or experts) whose last ones are those of `small`."""
    shape = (rows, *small.shape[1:])
    memory = zeros(layout.relaid_bytes("Q8_0", shape), np.uint8)
    groups, all_groups = (int(np.prod(s)) // layout.GROUP for s in (small.shape, shape))
    starts = zip((0, *layout.LAYOUTS["Q8_0"].offsets(groups)[:2]), (0, *layout.LAYOUTS["Q8_0"].offsets(all_groups)[:2]), (16, 16, 2), strict=True)
    for here, there, size in starts:
        memory[there + size * (all_groups - groups):][:size * groups] = small.array[here:here + size * groups]
    assert 16 * (all_groups - groups) > FAR - (1 << 20)     # also in the first plane
    return DeviceView(memory, "Q8_0", shape, weight=layout.RelaidWeight("Q8_0", shape, memory))


def test_rows_of_a_large_table():
    small, numeric = weight(numbers(3, 64), "Q8_0")
    rows = FAR // 32
    out = np.zeros((2, 64), np.float32)
    run("get_rows", view(out), [at_the_end(small, rows), view(np.array([rows - 1, rows - 3], np.int32))], f=[1.0])
    assert (out == numeric[[2, 0]]).all()


def test_the_last_of_many_experts():
    small, numeric = weight(numbers(2, 3, 64), "Q8_0")
    experts = FAR // 96
    x, out, ids = numbers(1, 64), np.zeros((1, 2, 3), np.float32), np.array([[experts - 1, experts - 2]], np.int32)
    run("mul_mat_id", view(out), [at_the_end(small, experts), view(x), None, view(ids)], i=[0, 0], f=[0])
    assert nmse(out[0], numeric[[1, 0]] @ x[0]) < 1e-4


def test_the_end_of_a_large_cache():
    """Stored to, and attended over."""
    heads, cells, d = 2, FAR // 64, 32
    k, v = (zeros(heads * cells * d, np.float16) for _ in range(2))
    keys, values = (DeviceView(a, "F16", (heads, cells, d)) for a in (k, v))
    new_k, new_v, where = numbers(3, heads, d), numbers(3, heads, d), np.arange(cells - 3, cells, dtype=np.int32)
    for cache_, x in ((keys, new_k), (values, new_v)):
        run("store", cache_, [view(x), view(where)])
    assert (k.reshape(heads, cells, d)[:, -3:] == new_k.transpose(1, 0, 2).astype(np.float16)).all() and k.nbytes > FAR
    q, out = numbers(1, 4, d), np.zeros((1, 4 * d), np.float32)
    run("attention", view(out), [view(q), keys, values, view(where[-1:]), view(where[:1])], i=[0, 0], f=[0.2, 0],
        hands_on=HandOn(1, INT8))                                         # as in test_attention.py, where it is compiled
    want = OPS["attention"].reference(q, Rows(new_k), Rows(new_v), np.array([2]), np.array([0]), scale=0.2, softcap=0.0, window=0)
    assert nmse(out, want) < 1e-5


class Rows:
    """A cache for the reference."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x.transpose(1, 0, 2)

    def read(self) -> np.ndarray:
        return self.x


def test_the_last_row_of_a_large_batch():
    """Tokens x vocabulary, as they are looked up."""
    rows, n = FAR // 4 // 4096 + 2, 4096
    logits, out = zeros(rows * n, np.float32).reshape(rows, n), np.zeros((1, n), np.float32)
    logits[-1] = np.arange(n)
    run("get_rows", view(out), [view(logits), view(np.array([rows - 1], np.int32))], f=[1.0])
    assert (out == np.arange(n)).all()


# ---- results and activations behind 2^31 numbers, of which the last block's are computed -------------------------------------------------

MANY = (1 << 31) + 4096


@pytest.fixture
def last_block(monkeypatch):
    monkeypatch.setattr(on_machine, "LAST_ONLY", True)


def many(*shape: int) -> np.ndarray:
    """Zeros, as many rows of this shape as make MANY numbers, the last one random."""
    rows = -(-MANY // int(np.prod(shape)))
    x = zeros(rows * int(np.prod(shape)), np.float32).reshape(rows, *shape)
    x[-1] = numbers(*shape)
    return x


@pytest.mark.parametrize("op", ["add", "rms_norm"])
def test_the_last_of_many_rows(last_block, op):
    x = many(512)
    out, other = zeros(x.size, np.float32).reshape(x.shape), numbers(512)
    run(op, view(out), [view(x), view(other)], f=[1e-5])
    assert nmse(out[-1], OPS[op].reference(x[-1], other) if op == "add" else OPS[op].reference(x[-1], other, 1e-5)) < 1e-12


def test_the_last_of_many_heads(last_block):
    x, half = many(2, 64), 32
    table = zeros(len(x) * 2 * half, np.float32).reshape(len(x), half, 2)
    table[-1] = numbers(half, 2)
    want = OPS["rope"].reference(x[-1:].copy(), table[-1:], "neox")
    run("rope", view(x), [view(x), view(table)], i=[1, 64])
    assert nmse(x[-1:], want) < 1e-12


def test_the_last_logits_of_many_columns(last_block, monkeypatch):
    """On the tensor cores, with every epilogue (compiled in test_gemm.py), and by columns."""
    monkeypatch.setattr(gemm, "tile_of", lambda *_: (64, 32))
    m, k = 4096, 256
    w, numeric = weight(numbers(m, k), "Q4_K")
    residual, norm, bias = many(m), numbers(k), numbers(m)
    x, out = zeros(len(residual) * k, np.float32).reshape(-1, k), zeros(residual.size, np.float32).reshape(residual.shape)
    x[-1] = numbers(k)
    run("mul_mat", view(out), [w, view(x), view(norm), view(bias), view(residual)], i=[0, 0, 0], f=[1e-5, 0.5, 30])
    want = 30 * np.tanh((OPS["rms_norm"].reference(x[-1], norm, 1e-5) @ numeric.T * 0.5 + bias + residual[-1]) / 30)
    assert nmse(out[-1, -32:], want[-32:]) < 1e-6
    router, numeric = weight(numbers(4, 4608), "F32")
    x = many(4608)
    out = zeros(4 * len(x), np.float32).reshape(-1, 4)
    run("mul_mat", view(out), [router, view(x), None, None, None], i=[0, 0, 0], f=[0, 1], shared=scratch())
    assert nmse(out[-1, -1:], (numeric @ x[-1])[-1:]) < 1e-10


def test_the_best_of_the_last_of_many_rows(last_block):
    logits = many(4096)
    ids = np.zeros(len(logits), np.int32)
    run("argmax", view(ids), [view(logits)])
    assert ids[-1] == logits[-1].argmax() and logits.size > 1 << 31


def test_the_last_of_many_tokens_experts(last_block):
    y = many(2, 64)
    weights, out = zeros(2 * len(y), np.float32).reshape(-1, 2), zeros(64 * len(y), np.float32).reshape(-1, 64)
    weights[-1] = 0.5, 2
    run("moe_sum", view(out), [view(y), view(weights), None])
    assert nmse(out[-1], weights[-1] @ y[-1]) < 1e-12


def test_the_last_of_many_queries(last_block, monkeypatch):
    monkeypatch.setattr(attention, "MOST_BLOCKS", 0)
    q = many(2, 16)
    k, v = (cache_view("F16", numbers(1, 20, 16)) for _ in range(2))
    out = zeros(q.size, np.float32).reshape(len(q), 32)
    cell, first = (zeros(len(q), np.int32) for _ in range(2))
    cell[-1] = 19
    run("attention", view(out), [view(q), k, v, view(cell), view(first)], i=[0, 0], f=[0.25, 0])
    assert nmse(out[-1:], OPS["attention"].reference(q[-1:], Numbers(k), Numbers(v), cell[-1:], first[-1:], scale=0.25, softcap=0.0, window=0)) < 3e-6
