"""Storing keys and values in the cache: as a step of its own, or together with the rotation of a token's queries and keys."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import count_of
from pyggml.backends.cuda.base import DeviceStep, Launch, Needs, Scratch
from pyggml.backends.cuda.cachetypes import cache_type, plane_offset
from pyggml.backends.cuda.intrinsics import kernel
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


def store(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    x, cell = step.src[0], step.src[1]
    assert x is not None and cell is not None
    limit, heads, d = x.shape
    blocks = -(-limit * heads * -(-d // 32) // WARPS)
    _store_kernel(step.dst.type)[blocks, 32 * WARPS, stream](
        x.array, cell.array, step.dst.array, plane_offset(step.dst.type, step.dst.shape), heads, step.dst.shape[1], d, slots, x.slot, limit)


@cache
def _rope_store_kernel(type_k: str, type_v: str) -> Any:
    put_k, put_v = cache_type(type_k).store, cache_type(type_v).store

    @kernel
    def rope_store(q, k, v, table, cell, keys, plane_k, values, plane_v, roped, heads, kv_heads, cells, dk, dv, half, mode,
                   slots, slot, limit):
        """Before attention over few tokens: queries roped aside, keys roped and values as they are into the cache.

        A warp takes 32 numbers of a head: first the queries' heads, then the keys', then the values'.
        """
        lane = cuda.threadIdx.x & 31
        at = i32(cuda.blockIdx.x) * WARPS + (cuda.threadIdx.x >> 5)
        count = count_of(slots, slot, 1, limit)
        parts_k, parts_v = (dk + 31) >> 5, (dv + 31) >> 5
        queries, all_keys = limit * heads * parts_k, limit * kv_heads * parts_k
        if at < queries:
            row, n = at // parts_k, 32 * (at % parts_k) + lane
            if row // heads < count and n < dk:
                roped[i64(row) * dk + n] = rope_at(q, i64(row) * dk, n, half, mode, table, row // heads)
        elif at < queries + all_keys:
            at -= queries
            row, n = at // parts_k, 32 * (at % parts_k) + lane
            t = row // kv_heads
            if t < count:
                x = rope_at(k, i64(row) * dk, n, half, mode, table, t) if n < dk else f32(0)
                put_k(keys, plane_k, i64(row % kv_heads) * cells + cell[t], n, dk, x, n < dk)
        else:
            at -= queries + all_keys
            row, n = at // parts_v, 32 * (at % parts_v) + lane
            t = row // kv_heads
            if t < count:
                x = v[i64(row) * dv + n] if n < dv else f32(0)
                put_v(values, plane_v, i64(row % kv_heads) * cells + cell[t], n, dv, x, n < dv)
    return rope_store


def rope_store(stream: Any, slots: Any, step: DeviceStep, roped: Any) -> None:
    """What an attention_step does before it attends: rope its queries into `roped`, and its keys; store keys and values."""
    q, keys, values, cell, _, k, v, table = step.src
    assert q is not None and keys is not None and values is not None and cell is not None and k is not None and v is not None and table is not None
    (limit, heads, dk), (kv_heads, cells, dv) = q.shape, values.shape
    warps = limit * (heads * -(-dk // 32) + kv_heads * (-(-dk // 32) + -(-dv // 32)))
    _rope_store_kernel(keys.type, values.type)[-(-warps // WARPS), 32 * WARPS, stream](
        q.array, k.array, v.array, table.array, cell.array, keys.array, plane_offset(keys.type, keys.shape), values.array,
        plane_offset(values.type, values.shape), roped, heads, kv_heads, cells, dk, dv, step.i[2] // 2, step.i[1], slots, step.dst.slot, limit)


LAUNCHES: dict[str, Launch] = {"store": store}
NEEDS: dict[str, Needs] = {}
