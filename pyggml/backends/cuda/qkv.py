"""Queries, keys and values of few tokens by one launch: three products of the same columns, and what becomes of each head.

The blocks that made a head's rows count themselves in, and the last of them settles the head: a query is roped for attention, a key roped
into the cache, a value goes there as it is. So a layer's attention needs no launch between this one and itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import array_of, count_of, none_of
from pyggml.backends.cuda.base import DeviceStep, Scratch
from pyggml.backends.cuda.cachestore import NOTHING, Heads, head_arguments, heads_of, settler
from pyggml.backends.cuda.factors import factor
from pyggml.backends.cuda.intrinsics import kernel
from pyggml.backends.cuda.layout import RelaidWeight
from pyggml.backends.cuda.matvec import WARPS, planes_of, prepared, product, shape_of, tile_of
from pyggml.backends.cuda.matvec import Form as MatvecForm
from pyggml.backends.cuda.tails import arrive, counters

f32, i32 = np.float32, np.int32


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for: three products, and what it does with their heads (None: nothing)."""

    products: tuple[MatvecForm, MatvecForm, MatvecForm]
    heads: Heads | None = None


@cache
def qkv_kernel(form: Form) -> Any:
    """The grid's blocks are the first matrix's, then the second's, then the third's."""
    one, two, three = (product(p) for p in form.products)
    columns, rows, sums, parts = (getattr(form.products[0], name) for name in ("columns", "per_block", "sums", "parts"))     # the same for all
    settles, settle = form.heads is not None, settler(form.heads or NOTHING)

    @kernel
    def qkv(w, o1, o2, o3, grid, m, dst, bias, w_b, p1, p2, p3, grid_b, m_b, dst_b, bias_b, w_c, q1, q2, q3, grid_c, m_c, dst_c, bias_c,
            act, ids, units, arrived, norm_q, norm_k, eps_q, eps_k, table, cell, keys, plane_k, values, plane_v, roped, heads, kv_heads, cells,
            dk, dv, half, mode, slots, slot, limit):
        tid, block, t0, scale, total, k = cuda.threadIdx.x, i32(cuda.blockIdx.x), i32(cuda.blockIdx.y) * columns, f32(1), i32(limit), i32(units)
        blocks, blocks_b = (i32(m) + rows - 1) // rows, (i32(m_b) + rows - 1) // rows
        acc = cuda.local.array(sums, np.float32)
        shared = cuda.shared.array(parts, np.float32)
        if block < blocks:
            one(acc, shared, tid, block, t0, w, o1, o2, o3, grid, w, o1, o2, o3, grid, act, total, ids, 1, 1, dst, bias, bias, bias, scale,
                scale, i32(m), k, slots, slot, limit)
        elif block < blocks + blocks_b:
            two(acc, shared, tid, block - blocks, t0, w_b, p1, p2, p3, grid_b, w_b, p1, p2, p3, grid_b, act, total, ids, 1, 1, dst_b, bias_b,
                bias_b, bias_b, scale, scale, i32(m_b), k, slots, slot, limit)
        else:
            three(acc, shared, tid, block - blocks - blocks_b, t0, w_c, q1, q2, q3, grid_c, w_c, q1, q2, q3, grid_c, act, total, ids, 1, 1, dst_c,
                  bias_c, bias_c, bias_c, scale, scale, i32(m_c), k, slots, slot, limit)
        if settles:
            head, d = block * rows // i32(dk), i32(dk)          # queries' heads, then keys', then values'
            if head >= heads + kv_heads:
                head, d = i32(heads + kv_heads) + (block - blocks - blocks_b) * rows // i32(dv), i32(dv)
            turn = cuda.shared.array(1, np.int32)
            if arrive(arrived, head, d // rows, turn, tid):
                for t in range(tid >> 5, min(columns, count_of(slots, slot, 1, limit)), WARPS):
                    settle(head, t, tid & 31, dst, dst_b, dst_c, norm_q, norm_k, eps_q, eps_k, table, cell, keys, plane_k, values, plane_v, roped,
                           heads, kv_heads, cells, dk, dv, half, mode)
    return qkv


def qkv(step: DeviceStep, slots: Any, stream: Any, scratch: Scratch) -> None:
    """Three mul_mat steps over the same columns, the step and those beside it; and where it settles heads, that."""
    steps, settle = (step, *step.beside), step.settles
    weights: list[RelaidWeight] = [s.src[0].weight for s in steps]      # type: ignore[union-attr, misc]
    x, norm = step.src[1:3]
    assert x is not None
    act = prepared(x, weights[0], norm, step.i[0], step.f[0], slots, stream, scratch)
    limit, units = x.shape[0], weights[0].k // factor(weights[0].type).unit
    columns = tile_of(limit)
    shape = shape_of(sum(w.rows for w in weights), units, columns, False)
    products = tuple(MatvecForm(w.type, columns=columns, bias=s.src[3] is not None, **shape) for w, s in zip(weights, steps, strict=True))
    form = Form(products, heads_of(settle) if settle is not None else None)      # type: ignore[arg-type]
    each = [(*planes_of(w), w.rows, s.dst.array, array_of(s.src[3], np.float32)) for w, s in zip(weights, steps, strict=True)]
    qkv_kernel(form)[(sum(-(-w.rows // products[0].per_block) for w in weights), -(-limit // columns)), 32 * WARPS, stream](
        *each[0], *each[1], *each[2], act, none_of(np.int32), units, counters(), *head_arguments(settle, scratch.roped), slots, step.dst.slot, limit)
