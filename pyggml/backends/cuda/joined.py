"""Parts of attention put together: what the warps of a block, and then several blocks, found over the cells that they shared out.

A part of a row is its numbers, weighted by how far each score lies below the part's own maximum, with that maximum and the sum of its weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from pyggml.backends.cuda.attend import LOWEST, ROWS, WARPS, Form
from pyggml.backends.cuda.intrinsics import device
from pyggml.backends.cuda.prims import LOG2_E, block_barrier, exp2
from pyggml.backends.cuda.tails import hand_on

OUT_ROW = 65                    # floats between rows of 64 in shared memory: rows start at different banks
f32, i64 = np.float32, np.int64


@device
def block_sums(tops, row):
    """(maximum, sum of weights) of a row over the warps of a block."""
    top, total = LOWEST, f32(0)
    for w in range(WARPS):
        top = max(top, tops[2 * (w * ROWS + row)])
    for w in range(WARPS):
        total += tops[2 * (w * ROWS + row) + 1] * exp2(tops[2 * (w * ROWS + row)] - top)
    return top, total


@cache
def sink_share(form: Form) -> Any:
    """A device function: the weight that a head's sink has beside cells whose largest score is `top`."""
    there = form.sinks

    @device
    def share(sinks, head, top):
        return exp2(sinks[head] * f32(LOG2_E) - top) if there else f32(0)
    return share


@device
def of_all_blocks(parts, sums, part, stride, blocks, d, dv):
    """Number d of a row whose cells several blocks shared out, not yet divided, the sum of its weights, and the largest score that these are
    relative to: block z's part of it is number part + z stride."""
    top, weights, total = LOWEST, f32(0), f32(0)
    for z in range(blocks):
        top = max(top, sums[2 * (part + z * stride)])
    for z in range(blocks):
        keep = exp2(sums[2 * (part + z * stride)] - top)
        weights += sums[2 * (part + z * stride) + 1] * keep
        total += parts[(part + z * stride) * dv + d] * keep
    return total, weights, top


@cache
def of_warps(form: Form) -> Any:
    """A device function by which the warps of a block put their parts together, 64 numbers of every row at a time: into dst, or, where several
    blocks share the cells, as the part of block z."""
    dv, blocks, sink = form.dv, form.blocks, sink_share(form)

    @device
    def lay_out(acc, h, out, place, keep_a, keep_b):
        for j in range(8):
            at = 32 * h + 4 * j
            out[place + j], out[place + j + 8] = acc[at] * keep_a, acc[at + 1] * keep_a
            out[place + j + 8 * OUT_ROW], out[place + j + 8 * OUT_ROW + 8] = acc[at + 2] * keep_b, acc[at + 3] * keep_b

    @device
    def join(acc, max_a, max_b, sum_a, sum_b, out, tops, dst, parts, sums, sinks, tile, rows, group, heads, kv_heads, head0, limit, z, sharing, g, t,
             tid, warp):
        if t == 0:
            tops[2 * (warp * ROWS + g)], tops[2 * (warp * ROWS + g) + 1] = max_a, sum_a
            tops[2 * (warp * ROWS + g + 8)], tops[2 * (warp * ROWS + g + 8) + 1] = max_b, sum_b
        block_barrier()
        top_a, top_b = max_a, max_b
        for w in range(WARPS):
            top_a, top_b = max(top_a, tops[2 * (w * ROWS + g)]), max(top_b, tops[2 * (w * ROWS + g + 8)])
        keep_a, keep_b = exp2(max_a - top_a), exp2(max_b - top_b)
        for h in range(blocks):
            place = (warp * ROWS + g) * OUT_ROW + 16 * t
            if h == 0:                                      # written out: an index known late would put the sums into memory
                lay_out(acc, 0, out, place, keep_a, keep_b)
            if blocks > 1 and h == 1:
                lay_out(acc, 1, out, place, keep_a, keep_b)
            if blocks > 2 and h == 2:
                lay_out(acc, 2, out, place, keep_a, keep_b)
            if blocks > 3 and h == 3:
                lay_out(acc, 3, out, place, keep_a, keep_b)
            block_barrier()
            for i in range(tid, ROWS * 64, 32 * WARPS):
                row, d = tile * ROWS + (i >> 6), 64 * h + (i & 63)
                if row < rows and d < dv:
                    total = f32(0)
                    for w in range(WARPS):
                        total += out[(w * ROWS + (i >> 6)) * OUT_ROW + (i & 63)]
                    top, weights = block_sums(tops, i >> 6)
                    if sharing == 1:
                        head = head0 * group + row % group
                        dst[(i64(row // group) * heads + head) * dv + d] = total / (weights + sink(sinks, head, top))
                    else:
                        part = (i64(z) * kv_heads + head0) * limit * group + row
                        parts[part * dv + d] = total
                        if d == 0:
                            sums[2 * part], sums[2 * part + 1] = top, weights
            block_barrier()
    return join


@cache
def of_blocks(form: Form) -> Any:
    """A device function by which the last block to come puts the parts of all blocks together."""
    dv, sink = form.dv, sink_share(form)

    @device
    def join(dst, parts, sums, sinks, tile, rows, group, heads, kv_heads, head0, limit, sharing, tid):
        for i in range(tid, ROWS * dv, 32 * WARPS):
            row, d = tile * ROWS + i // dv, i % dv
            if row < rows:
                head = head0 * group + row % group
                part, stride = i64(head0) * limit * group + row, i64(kv_heads) * limit * group
                total, weights, top = of_all_blocks(parts, sums, part, stride, sharing, d, dv)
                dst[(i64(row // group) * heads + head) * dv + d] = total / (weights + sink(sinks, head, top))
    return join


@cache
def handing(form: Form) -> Any:
    """A device function by which a block leaves its finished rows quantized for the next product."""
    dv = form.dv

    @device
    def hand(dst, tile, rows, group, heads, head0, limit, made, tid):
        block_barrier()                                     # all of the block's rows are in memory
        for i in range(4 * tid, ROWS * dv, 4 * 32 * WARPS):
            row = tile * ROWS + i // dv
            at = (head0 * group + row % group) * dv + i % dv
            hand_on(dst, row // group, at if row < rows else heads * dv, heads * dv, limit, made)
    return hand
