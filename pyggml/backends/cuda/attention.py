"""Attention over the cache of keys and values, on the tensor cores.

A row is one query: a head of those that share a KV head, at one token (row = token * group + head). A warp takes 16 rows and walks over
the cells that they see (attend.py). Keys and values go from memory straight into the registers that the tensor cores read, 16 bytes a lane.

Few rows (decoding): the warps of a block and several blocks share out the cells; each block leaves its part and the last to arrive
puts them together (joined.py), and may quantize what comes out for the product that reads it. Many rows (prefill): each warp has its own rows
and all their cells; neighbours find keys and values in L1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import array_of, count_of
from pyggml.backends.cuda.attend import ROWS, STEP, WARPS, Form, cells_of, queries, walker
from pyggml.backends.cuda.base import DeviceStep, Launch, Needs, Scratch
from pyggml.backends.cuda.cachestore import rope_store
from pyggml.backends.cuda.cachetypes import plane_offset
from pyggml.backends.cuda.intrinsics import device, kernel
from pyggml.backends.cuda.joined import OUT_ROW, handing, of_blocks, of_warps, sink_share
from pyggml.backends.cuda.prims import LOG2_E, shfl_xor
from pyggml.backends.cuda.tails import arrive, counters
from pyggml.errors import PyggmlError

SPLIT_CELLS = 256               # a block of decoding takes at least so many cells
MOST_BLOCKS = 264               # enough blocks for every multiprocessor of a large GPU twice
MOST_SPLIT = 32
WIDEST = 256                    # numbers of a head
ALIGN = 256
f32, i32, i64 = np.float32, np.int32, np.int64


# ---- the kernel ------------------------------------------------------------------------------------------------------------------------------

@cache
def attention_kernel(form: Form) -> Any:
    load_queries, walk, join_warps, join_blocks, hand = queries(form), walker(form), of_warps(form), of_blocks(form), handing(form)
    sink = sink_share(form)
    dv, split, wide, hands_on = form.dv, form.split, form.wide, form.hands_on
    q_words, k_words, v_words, n_acc, blocks = 8 * form.chunks, 8 * form.chunks, 16 * form.blocks, 32 * form.blocks, form.blocks
    q_shared, q_local = (q_words * 32 * (1 if split else WARPS), 1) if wide else (1, q_words)
    shared_out, shared_max = (WARPS * ROWS * OUT_ROW, WARPS * ROWS * 2) if split else (1, 1)

    @device
    def put(acc, dst, row, here, at, total, t):
        """What a warp of its own rows found for one of them; its numbers of acc start at `at`."""
        for h in range(blocks):
            for j in range(8):
                d = 64 * h + 16 * t + j
                if here and d < dv:
                    dst[row * dv + d] = acc[32 * h + 4 * j + at] / total
                if here and d + 8 < dv:
                    dst[row * dv + d + 8] = acc[32 * h + 4 * j + at + 1] / total

    @kernel
    def attention(q, keys, plane_k, values, plane_v, cell, first, sinks, dst, made, parts, sums, arrived, heads, kv_heads, cells, window, scale,
                  softcap, slots, slot, limit):
        tid = cuda.threadIdx.x
        lane, warp = tid & 31, tid >> 5
        g, t = lane >> 2, lane & 3
        group, head0 = heads // kv_heads, i32(cuda.blockIdx.y)
        rows = count_of(slots, slot, 1, limit) * group
        tile = i32(cuda.blockIdx.x) if split else i32(cuda.blockIdx.x) * WARPS + warp
        row_a, row_b = tile * ROWS + g, tile * ROWS + g + 8
        if tile * ROWS >= rows:
            return
        # the cells that rows a and b see, the tile as a whole, and this warp
        low_a, high_a = cells_of(row_a, rows, group, first, cell, window)
        low_b, high_b = cells_of(row_b, rows, group, first, cell, window)
        start, stop = min(low_a, low_b), max(high_a, high_b)
        for m in (4, 8, 16):
            start, stop = min(start, shfl_xor(start, m)), max(stop, shfl_xor(stop, m))
        last = stop
        if split:
            share = cuda.gridDim.z * WARPS
            each = ((stop - start + share) // share + STEP - 1) // STEP * STEP
            start += (i32(cuda.blockIdx.z) * WARPS + warp) * each
            stop = min(stop, start + each - 1)

        q_regs = cuda.local.array(q_local, np.uint32)
        q_waiting = cuda.shared.array(q_shared, np.uint32)      # word i of a lane
        q_mine = lane if split else lane + warp * q_words * 32
        k_regs = cuda.local.array(k_words, np.uint32)
        v_regs = cuda.local.array(v_words, np.uint32)
        acc = cuda.local.array(n_acc, np.float32)
        base_a = i64(row_a // group) * heads + head0 * group + row_a % group
        base_b = i64(row_b // group) * heads + head0 * group + row_b % group
        load_queries(q, base_a, base_b, row_a < rows, row_b < rows, t, scale, q_regs, q_waiting, q_mine)
        if wide and split:
            cuda.syncthreads()                          # the warps wrote the same words
        for i in range(n_acc):
            acc[i] = 0
        max_a, max_b, sum_a, sum_b = walk(q_regs, q_waiting, q_mine, keys, plane_k, values, plane_v, i64(head0) * cells, start, stop, last,
                                          low_a, high_a, low_b, high_b, softcap, g, t, k_regs, v_regs, acc)
        if split:
            out = cuda.shared.array(shared_out, np.float32)     # on lines of their own: the simulator tells shared arrays apart by line
            tops = cuda.shared.array(shared_max, np.float32)
            turn = cuda.shared.array(1, np.int32)
            sharing, z = i32(cuda.gridDim.z), i32(cuda.blockIdx.z)
            join_warps(acc, max_a, max_b, sum_a, sum_b, out, tops, dst, parts, sums, sinks, tile, rows, group, heads, kv_heads, head0, limit, z,
                       sharing, g, t, tid, warp)
            done = True
            if sharing > 1:
                done = arrive(arrived, tile * kv_heads + head0, sharing, turn, tid)
                if done:
                    join_blocks(dst, parts, sums, sinks, tile, rows, group, heads, kv_heads, head0, limit, sharing, tid)
            if hands_on and done:
                hand(dst, tile, rows, group, heads, head0, limit, made, tid)
        else:
            put(acc, dst, base_a, row_a < rows, 0, sum_a + sink(sinks, head0 * group + row_a % group, max_a), t)
            put(acc, dst, base_b, row_b < rows, 2, sum_b + sink(sinks, head0 * group + row_b % group, max_b), t)
    return attention


# ---- launching -----------------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Shape:
    """How a step is cut up, and how its temporary memory is shared out."""

    limit: int
    heads: int
    kv_heads: int
    dk: int
    dv: int
    cells: int                  # that the run may see

    @property
    def rows(self) -> int:
        return self.limit * self.heads // self.kv_heads

    @property
    def tiles(self) -> int:
        return -(-self.rows // ROWS)

    @property
    def split(self) -> bool:
        return self.tiles * self.kv_heads < 2 * MOST_BLOCKS

    @property
    def blocks(self) -> int:
        """Blocks that share out the cells of a tile."""
        if not self.split:
            return 1
        return max(1, min(MOST_SPLIT, self.cells // SPLIT_CELLS, MOST_BLOCKS // (self.tiles * self.kv_heads)))

    @property
    def places(self) -> tuple[int, int]:
        """Where the parts of rows start in temporary memory, behind their sums, and where they end."""
        parts = self.rows * self.kv_heads * self.blocks if self.blocks > 1 else 1
        start = -(-8 * parts // ALIGN) * ALIGN
        return start, start + 4 * parts * self.dv


def _shape(step: DeviceStep, cells: int) -> Shape:
    q, k, v = step.src[0], step.src[1], step.src[2]
    assert q is not None and k is not None and v is not None
    return Shape(q.shape[0], q.shape[1], k.shape[0], k.shape[2], v.shape[2], min(cells, k.shape[1]))


def _needs(step: DeviceStep, cells: int) -> tuple[int, int]:
    return 0, _shape(step, cells).places[-1]


def attention(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    q, keys, values, cell, first = step.src[:5]
    assert q is not None and keys is not None and values is not None and cell is not None and first is not None
    shape = _shape(step, scratch.cells)
    start, end = shape.places
    sums, parts = scratch.temp[:start].view(np.float32), scratch.temp[start:end].view(np.float32)
    roping = step.op == "attention_step"
    sinks = next(iter(step.src[8 if roping else 5:]), None)
    if roping and not step.settled:
        rope_store(stream, slots, step, scratch.roped)
    scale, softcap = step.f[0], step.f[1]
    if max(shape.dk, shape.dv) > WIDEST or shape.dk % 8 or shape.dv % 8:
        raise PyggmlError(f"heads of {shape.dk} and {shape.dv} numbers cannot be computed on the GPU (multiples of 8 up to {WIDEST} can); use -ngl 0")
    form = Form(keys.type, values.type, shape.dk, shape.dv, shape.split, softcap != 0, sinks is not None, step.hands_on is not None)
    grid = (shape.tiles, shape.kv_heads, shape.blocks) if shape.split else (-(-shape.tiles // WARPS), shape.kv_heads)
    attention_kernel(form)[grid, 32 * WARPS, stream](
        scratch.roped if roping else q.array, keys.array, plane_offset(keys.type, keys.shape), values.array,
        plane_offset(values.type, values.shape), cell.array, first.array, array_of(sinks, np.float32), step.dst.array,
        scratch.handing, parts, sums, counters(),
        shape.heads, shape.kv_heads, keys.shape[1], step.i[0], f32(scale if softcap else scale * LOG2_E), f32(softcap), slots, step.dst.slot,
        shape.limit)
    scratch.hand_on(step.hands_on)


def can_hand_on(step: DeviceStep, normed: bool) -> bool:
    """Can this step leave what it makes quantized? Groups of 32 must not reach over heads."""
    shape = _shape(step, 1)
    return not normed and shape.split and shape.dv % 32 == 0


LAUNCHES: dict[str, Launch] = {"attention": attention, "attention_step": attention}
NEEDS: dict[str, Needs] = {"attention": _needs, "attention_step": _needs}
