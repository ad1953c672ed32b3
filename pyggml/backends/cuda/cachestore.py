"""Storing keys and values in the cache: as a step of its own, or as what becomes of a token's heads of queries, keys and values before few
tokens attend: queries are roped aside, keys roped into the cache, values go there as they are (and heads that have a norm are normed first).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import count_of, none_of
from pyggml.backends.cuda.base import DeviceStep, DeviceView, Launch, Needs, Settle
from pyggml.backends.cuda.cachetypes import cache_type, plane_offset
from pyggml.backends.cuda.intrinsics import device, kernel
from pyggml.backends.cuda.prims import warp_sum
from pyggml.backends.cuda.rope import rope_at

WARPS = 4
f32, i32, i64 = np.float32, np.int32, np.int64


@cache
def _store_kernel(type_name: str) -> Any:
    put = cache_type(type_name).store

    @kernel
    def store(x, cell, cache, plane, heads, cells, d, slots, slot, limit):
        """A warp stores 32 numbers of one head of one token."""
        lane, parts = cuda.threadIdx.x & 31, (d + 31) >> 5
        at = i32(cuda.blockIdx.x) * WARPS + (cuda.threadIdx.x >> 5)
        row, n = at // parts, 32 * (at % parts) + lane
        t, head = row // heads, row % heads
        if t >= count_of(slots, slot, 1, limit):
            return
        value = x[i64(row) * d + n] if n < d else f32(0)
        put(cache, plane, i64(head) * cells + cell[t], n, d, value, n < d)
    return store


def store(stream: Any, slots: Any, step: DeviceStep, scratch: Any) -> None:
    x, cell = step.src[0], step.src[1]
    assert x is not None and cell is not None
    limit, heads, d = x.shape
    blocks = -(-limit * heads * -(-d // 32) // WARPS)
    _store_kernel(step.dst.type)[blocks, 32 * WARPS, stream](
        x.array, cell.array, step.dst.array, plane_offset(step.dst.type, step.dst.shape), heads, step.dst.shape[1], d, slots, x.slot, limit)


# ---- heads of queries, keys and values --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Heads:
    """What settling heads is compiled for."""

    type_k: str
    type_v: str
    normed: bool = False


NOTHING = Heads("F16", "F16")       # for kernels that settle none


@cache
def settler(form: Heads) -> Any:
    put_k, put_v, normed = cache_type(form.type_k).store, cache_type(form.type_v).store, form.normed

    @device
    def norm_factor(x, row, d, eps, lane):
        """What a head's numbers are multiplied by, beside the norm's weights; all lanes of a warp come here."""
        if not normed:
            return f32(1)
        squares = f32(0)
        for n in range(lane, d, 32):
            squares += x[row + n] * x[row + n]
        return f32(1) / math.sqrt(warp_sum(squares) / f32(d) + eps)

    @device
    def settle(head, t, lane, q, k, v, norm_q, norm_k, eps_q, eps_k, table, cell, keys, plane_k, values, plane_v, roped, heads, kv_heads, cells,
               dk, dv, half, mode):
        """A warp takes a head of token t; heads are counted through queries, keys and values."""
        if head < heads:
            row = (i64(t) * heads + head) * dk
            factor = norm_factor(q, row, dk, eps_q, lane)
            for n in range(lane, dk, 32):
                roped[row + n] = rope_at(q, row, n, half, mode, table, t, norm_q, factor, normed)
        elif head < heads + kv_heads:
            row, to = (i64(t) * kv_heads + head - heads) * dk, i64(head - heads) * cells + cell[t]
            factor = norm_factor(k, row, dk, eps_k, lane)
            for start in range(0, dk, 32):
                n = start + lane
                put_k(keys, plane_k, to, n, dk, rope_at(k, row, n, half, mode, table, t, norm_k, factor, normed) if n < dk else f32(0), n < dk)
        else:
            head -= heads + kv_heads
            row, to = (i64(t) * kv_heads + head) * dv, i64(head) * cells + cell[t]
            for start in range(0, dv, 32):
                n = start + lane
                put_v(values, plane_v, to, n, dv, v[row + n] if n < dv else f32(0), n < dv)
    return settle


def heads_of(settle: Settle) -> Heads:
    keys, values = settle.step.src[1:3]
    assert keys is not None and values is not None
    return Heads(keys.type, values.type, bool(settle.norms))


def head_arguments(settle: Settle | None, roped: Any) -> tuple[Any, ...]:
    """What a settler takes behind q, k and v; of nothing where there is nothing to settle."""
    floats, ints = none_of(np.float32), none_of(np.int32)
    if settle is None:
        return floats, floats, f32(0), f32(0), floats, ints, floats, 0, floats, 0, floats, 1, 1, 1, 1, 1, 1, 0
    q, keys, values, cell, _, _, _, table = settle.step.src[:8]
    assert q is not None and keys is not None and values is not None and cell is not None and table is not None
    (norm_q, eps_q), (norm_k, eps_k) = ((s.src[1].array, s.f[0]) for s in settle.norms) if settle.norms else ((floats, 0),) * 2    # type: ignore[union-attr]
    (heads, dk), (kv_heads, cells, dv) = q.shape[1:], values.shape
    return (norm_q, norm_k, f32(eps_q), f32(eps_k), table.array, cell.array, keys.array, plane_offset(keys.type, keys.shape),
            values.array, plane_offset(values.type, values.shape), roped, heads, kv_heads, cells, dk, dv, settle.step.i[2] // 2, settle.step.i[1])


@cache
def _heads_kernel(form: Heads) -> Any:
    settle = settler(form)

    @kernel
    def rope_store(q, k, v, norm_q, norm_k, eps_q, eps_k, table, cell, keys, plane_k, values, plane_v, roped, heads, kv_heads, cells, dk, dv, half,
                   mode, slots, slot, limit):
        at, all_ = i32(cuda.blockIdx.x) * WARPS + (cuda.threadIdx.x >> 5), i32(heads + 2 * kv_heads)
        if at // all_ < count_of(slots, slot, 1, limit):
            settle(at % all_, at // all_, cuda.threadIdx.x & 31, q, k, v, norm_q, norm_k, eps_q, eps_k, table, cell, keys, plane_k, values, plane_v,
                   roped, heads, kv_heads, cells, dk, dv, half, mode)
    return rope_store


def rope_store(stream: Any, slots: Any, step: DeviceStep, roped: Any) -> None:
    """What an attention_step does before it attends, where the launch of its queries, keys and values has not."""
    q, _, values, _, _, k, v = step.src[:7]
    assert q is not None and values is not None and k is not None and v is not None
    settle, warps = Settle(step), q.shape[0] * (q.shape[1] + 2 * values.shape[0])
    _heads_kernel(heads_of(settle))[-(-warps // WARPS), 32 * WARPS, stream](
        q.array, k.array, v.array, *head_arguments(settle, roped), slots, step.dst.slot, q.shape[0])


def roped_bytes(step: DeviceStep) -> int:
    """Bytes of an attention_step's queries."""
    q: DeviceView | None = step.src[0]
    assert q is not None
    return 4 * math.prod(q.shape)


LAUNCHES: dict[str, Launch] = {"store": store}
NEEDS: dict[str, Needs] = {}
