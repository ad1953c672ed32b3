"""Tensors of more than 2^32 bytes, of which a kernel touches a few: every index on the way to them must have 64 bits.

Only on the machine that runs PTX: the memory is zeros that nobody looks at, which take none.
"""

import numpy as np
from device_case import nmse, run, view, weight
from ptx.memory import zeros

from pyggml.backends.cuda import layout
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
    want = OPS["attention"].reference(q, Rows(new_k), Rows(new_v), np.array([2]), np.array([0]), 0.2, 0.0, 0)
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
