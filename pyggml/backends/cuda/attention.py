"""Attention over the cache of keys and values, on the tensor cores.

A row is one query: a head of those that share a KV head, at one token (row = token * group + head). A warp takes 16 rows and walks over
the cells that they see, 16 at a time, with the softmax kept online. Keys and values go from memory straight into the registers that
the tensor cores read, 16 bytes a lane: which of the inner dimensions a register stands for is free as long as both factors agree, so
lane 4g + t takes numbers 8t .. 8t + 7 of every 32 of a key (cell g), and numbers 8g .. 8g + 7 of every 64 of a value (cells 2t, 2t + 1,
2t + 8, 2t + 9). The probabilities are already where the second product wants them (Dao 2023).

Few rows (decoding): the warps of a block and several blocks share out the cells; each block leaves its part and the last to arrive
puts them together, and may quantize what comes out for the product that reads it. Many rows (prefill): each warp has its own rows and
all their cells; neighbours find keys and values in L1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import arrive, count_of, counters, hand_on
from pyggml.backends.cuda.base import DeviceStep, Launch, Needs, Scratch
from pyggml.backends.cuda.cachestore import rope_store
from pyggml.backends.cuda.cachetypes import fetcher, plane_offset
from pyggml.backends.cuda.intrinsics import device, kernel
from pyggml.backends.cuda.prims import LOG2_E, exp2, float_of, half2, load128_now, mma, prmt, shfl_xor, warp_any
from pyggml.errors import PyggmlError

WARPS = 4
ROWS = 16                       # of a warp's tile
STEP = 16                       # cells at a time
OUT_ROW = 65                    # floats between rows of 64 in shared memory: rows start at different banks
SPLIT_CELLS = 256               # a block of decoding takes at least so many cells
MOST_BLOCKS = 264               # enough blocks for every multiprocessor of a large GPU twice
MOST_SPLIT = 32
WIDEST = 256                    # numbers of a head
LOWEST = np.float32(-1e30)      # a running maximum before any cell: finite, so that no difference is NaN
f32, i32, i64, u32 = np.float32, np.int32, np.int64, np.uint32


# ---- attention ------------------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Form:
    """What an attention kernel is compiled for."""

    type_k: str
    type_v: str
    dk: int
    dv: int
    split: bool             # the warps of a block, and several blocks, share out the cells of one tile
    softcap: bool = False
    hands_on: bool = False  # dst is also left quantized; only where cells are shared out


@cache
def attention_kernel(form: Form) -> Any:
    fetch_k, fetch_v = fetcher(form.type_k, form.split), fetcher(form.type_v, form.split)
    dk, dv, split, capped, hands_on = form.dk, form.dv, form.split, form.softcap, form.hands_on
    chunks, blocks = -(-dk // 32), -(-dv // 64)         # 32 numbers of a key, 64 of a value
    q_words, k_words, v_words, n_acc = 8 * chunks, 8 * chunks, 16 * blocks, 32 * blocks
    # wide heads leave no registers for queries, which then wait in shared memory, nor for values before the scores are done
    wide = dk > 128 or dv > 128
    q_shared, q_local = (q_words * 32 * (1 if split else WARPS), 1) if wide else (1, q_words)
    shared_out, shared_max = (WARPS * ROWS * OUT_ROW, WARPS * ROWS * 2) if split else (1, 1)

    @device
    def fetch_keys(keys, plane, row0, row1, t, words):
        """Keys of two cells: words 8c .. 8c + 3 are of the first, the next four of the second."""
        for c in range(chunks):
            d = 32 * c + 8 * t
            if dk % 32 == 0 or d < dk:
                a, b = fetch_k(keys, plane, row0, d, dk), fetch_k(keys, plane, row1, d, dk)
                for i in range(4):
                    words[8 * c + i], words[8 * c + 4 + i] = a[i], b[i]
            else:
                for i in range(8):
                    words[8 * c + i] = u32(0)

    @device
    def fetch_values(values, plane, row0, row1, row8, row9, g, words):
        for h in range(blocks):
            d = 64 * h + 8 * g
            if dv % 64 == 0 or d < dv:
                a, b = fetch_v(values, plane, row0, d, dv), fetch_v(values, plane, row1, d, dv)
                e, f = fetch_v(values, plane, row8, d, dv), fetch_v(values, plane, row9, d, dv)
                for i in range(4):
                    words[16 * h + i], words[16 * h + 4 + i], words[16 * h + 8 + i], words[16 * h + 12 + i] = a[i], b[i], e[i], f[i]
            else:
                for i in range(16):
                    words[16 * h + i] = u32(0)

    @device
    def query(q, row, d, scale, here):
        """Eight numbers of a query, scaled, as four words."""
        if not here or (dk % 32 != 0 and d >= dk):
            return u32(0), u32(0), u32(0), u32(0)
        a, b = load128_now(q, 4 * (row * dk + d)), load128_now(q, 4 * (row * dk + d) + 16)
        return (half2(float_of(a[0]) * scale, float_of(a[1]) * scale), half2(float_of(a[2]) * scale, float_of(a[3]) * scale),
                half2(float_of(b[0]) * scale, float_of(b[1]) * scale), half2(float_of(b[2]) * scale, float_of(b[3]) * scale))

    @device
    def seen(s, cell_, low, high, softcap):
        if capped:
            s = softcap * (f32(1) - f32(2) / (exp2(s / softcap * f32(2 * LOG2_E)) + f32(1))) * f32(LOG2_E)
        return s if low <= cell_ and cell_ <= high else LOWEST

    @device
    def lay_out(acc, h, out, place, keep_a, keep_b):
        for j in range(8):
            at = 32 * h + 4 * j
            out[place + j], out[place + j + 8] = acc[at] * keep_a, acc[at + 1] * keep_a
            out[place + j + 8 * OUT_ROW], out[place + j + 8 * OUT_ROW + 8] = acc[at + 2] * keep_b, acc[at + 3] * keep_b

    @kernel
    def attention(q, keys, plane_k, values, plane_v, cell, first, dst, made, parts, sums, arrived, heads, kv_heads, cells, window, scale, softcap,
                  slots, slot, limit):
        tid = cuda.threadIdx.x
        lane, warp = tid & 31, tid >> 5
        g, t = lane >> 2, lane & 3
        group, head0 = heads // kv_heads, i32(cuda.blockIdx.y)
        rows = count_of(slots, slot, 1, limit) * group
        tile = i32(cuda.blockIdx.x) if split else i32(cuda.blockIdx.x) * WARPS + warp
        row_a, row_b = tile * ROWS + g, tile * ROWS + g + 8
        if tile * ROWS >= rows:
            return
        # the cells that rows g and g + 8 see, and the tile as a whole
        low_a, high_a, low_b, high_b = i32(0x7FFFFFFF), i32(-1), i32(0x7FFFFFFF), i32(-1)
        if row_a < rows:
            low_a, high_a = first[row_a // group], cell[row_a // group]
            if window > 0:
                low_a = max(low_a, high_a - window + 1)
        if row_b < rows:
            low_b, high_b = first[row_b // group], cell[row_b // group]
            if window > 0:
                low_b = max(low_b, high_b - window + 1)
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
        for c in range(chunks):
            a, b = query(q, base_a, 32 * c + 8 * t, scale, row_a < rows), query(q, base_b, 32 * c + 8 * t, scale, row_b < rows)
            for i in range(4):
                if wide:
                    q_waiting[q_mine + 32 * (8 * c + i)], q_waiting[q_mine + 32 * (8 * c + 4 + i)] = a[i], b[i]
                else:
                    q_regs[8 * c + i], q_regs[8 * c + 4 + i] = a[i], b[i]
        if wide and split:
            cuda.syncthreads()                          # the warps wrote the same words
        for i in range(n_acc):
            acc[i] = 0
        max_a, max_b, sum_a, sum_b = LOWEST, LOWEST, f32(0), f32(0)
        head_row = i64(head0) * cells
        for base in range(start, stop + 1, STEP):
            c0 = base + 2 * t
            mine = ((low_a <= base + 15 and base <= high_a) or (low_b <= base + 15 and base <= high_b))
            if not warp_any(mine):
                continue                                    # between the cells of one sequence and another's
            fetch_keys(keys, plane_k, head_row + min(base + g, last), head_row + min(base + 8 + g, last), t, k_regs)
            if not wide:
                fetch_values(values, plane_v, head_row + min(c0, last), head_row + min(c0 + 1, last), head_row + min(c0 + 8, last),
                             head_row + min(c0 + 9, last), g, v_regs)
            s0, s1, s2, s3, s4, s5, s6, s7 = f32(0), f32(0), f32(0), f32(0), f32(0), f32(0), f32(0), f32(0)
            for c in range(chunks):
                for j in range(2):
                    if wide:
                        at = q_mine + 32 * (8 * c + 2 * j)
                        a0, a1, a2, a3 = q_waiting[at], q_waiting[at + 128], q_waiting[at + 32], q_waiting[at + 160]
                    else:
                        a0, a1 = q_regs[8 * c + 2 * j], q_regs[8 * c + 4 + 2 * j]
                        a2, a3 = q_regs[8 * c + 2 * j + 1], q_regs[8 * c + 4 + 2 * j + 1]
                    s0, s1, s2, s3 = mma(s0, s1, s2, s3, a0, a1, a2, a3, k_regs[8 * c + 2 * j], k_regs[8 * c + 2 * j + 1])
                    s4, s5, s6, s7 = mma(s4, s5, s6, s7, a0, a1, a2, a3, k_regs[8 * c + 4 + 2 * j], k_regs[8 * c + 4 + 2 * j + 1])
            s0, s1 = seen(s0, c0, low_a, high_a, softcap), seen(s1, c0 + 1, low_a, high_a, softcap)
            s4, s5 = seen(s4, c0 + 8, low_a, high_a, softcap), seen(s5, c0 + 9, low_a, high_a, softcap)
            s2, s3 = seen(s2, c0, low_b, high_b, softcap), seen(s3, c0 + 1, low_b, high_b, softcap)
            s6, s7 = seen(s6, c0 + 8, low_b, high_b, softcap), seen(s7, c0 + 9, low_b, high_b, softcap)
            new_a, new_b = max(max(max_a, max(s0, s1)), max(s4, s5)), max(max(max_b, max(s2, s3)), max(s6, s7))
            new_a, new_b = max(new_a, shfl_xor(new_a, 1)), max(new_b, shfl_xor(new_b, 1))
            new_a, new_b = max(new_a, shfl_xor(new_a, 2)), max(new_b, shfl_xor(new_b, 2))
            keep_a, keep_b = exp2(max_a - new_a), exp2(max_b - new_b)
            max_a, max_b = new_a, new_b
            s0, s1, s4, s5 = weight(s0, new_a), weight(s1, new_a), weight(s4, new_a), weight(s5, new_a)
            s2, s3, s6, s7 = weight(s2, new_b), weight(s3, new_b), weight(s6, new_b), weight(s7, new_b)
            sum_a, sum_b = sum_a * keep_a + (s0 + s1 + s4 + s5), sum_b * keep_b + (s2 + s3 + s6 + s7)
            if wide:
                fetch_values(values, plane_v, head_row + min(c0, last), head_row + min(c0 + 1, last), head_row + min(c0 + 8, last),
                             head_row + min(c0 + 9, last), g, v_regs)
            p0, p1, p2, p3 = half2(s0, s1), half2(s2, s3), half2(s4, s5), half2(s6, s7)
            for h in range(blocks):
                for j in range(8):
                    at = 32 * h + 4 * j
                    pick = u32(0x5410) if j % 2 == 0 else u32(0x7632)       # low or high halves of two words
                    word = 16 * h + j // 2
                    b0, b1 = prmt(v_regs[word], v_regs[word + 4], pick), prmt(v_regs[word + 8], v_regs[word + 12], pick)
                    acc[at], acc[at + 1], acc[at + 2], acc[at + 3] = mma(acc[at] * keep_a, acc[at + 1] * keep_a, acc[at + 2] * keep_b,
                                                                         acc[at + 3] * keep_b, p0, p1, p2, p3, b0, b1)
        for m in (1, 2):
            sum_a, sum_b = sum_a + shfl_xor(sum_a, m), sum_b + shfl_xor(sum_b, m)
        if split:
            # the warps of the block put their parts together, 64 numbers of every row at a time
            out = cuda.shared.array(shared_out, np.float32)     # on lines of their own: the simulator tells shared arrays apart by line
            tops = cuda.shared.array(shared_max, np.float32)
            if t == 0:
                tops[2 * (warp * ROWS + g)], tops[2 * (warp * ROWS + g) + 1] = max_a, sum_a
                tops[2 * (warp * ROWS + g + 8)], tops[2 * (warp * ROWS + g + 8) + 1] = max_b, sum_b
            cuda.syncthreads()
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
                cuda.syncthreads()
                for i in range(tid, ROWS * 64, 32 * WARPS):
                    row, d = tile * ROWS + (i >> 6), 64 * h + (i & 63)
                    if row < rows and d < dv:
                        total = f32(0)
                        for w in range(WARPS):
                            total += out[(w * ROWS + (i >> 6)) * OUT_ROW + (i & 63)]
                        top, weights = block_sums(tops, i >> 6)
                        if cuda.gridDim.z == 1:
                            dst[(i64(row // group) * heads + head0 * group + row % group) * dv + d] = total / weights
                        else:
                            part = (i64(cuda.blockIdx.z) * kv_heads + head0) * limit * group + row
                            parts[part * dv + d] = total
                            if d == 0:
                                sums[2 * part], sums[2 * part + 1] = top, weights
                cuda.syncthreads()
            done = True
            if cuda.gridDim.z > 1:
                turn = cuda.shared.array(1, np.int32)
                done = arrive(arrived, tile * kv_heads + head0, cuda.gridDim.z, turn, tid)
                if done:
                    for i in range(tid, ROWS * dv, 32 * WARPS):
                        row, d = tile * ROWS + i // dv, i % dv
                        if row < rows:
                            to = (i64(row // group) * heads + head0 * group + row % group) * dv + d
                            part, stride = i64(head0) * limit * group + row, i64(kv_heads) * limit * group
                            dst[to] = of_all_blocks(parts, sums, part, stride, cuda.gridDim.z, d, dv)
            if hands_on and done:
                cuda.syncthreads()                              # all of the block's rows are in memory
                for i in range(4 * tid, ROWS * dv, 4 * 32 * WARPS):
                    row = tile * ROWS + i // dv
                    at = (head0 * group + row % group) * dv + i % dv
                    hand_on(dst, row // group, at if row < rows else heads * dv, heads * dv, limit, made)
        else:
            for h in range(blocks):
                for j in range(8):
                    at, d = 32 * h + 4 * j, 64 * h + 16 * t + j
                    if row_a < rows and d < dv:
                        dst[base_a * dv + d] = acc[at] / sum_a
                    if row_a < rows and d + 8 < dv:
                        dst[base_a * dv + d + 8] = acc[at + 1] / sum_a
                    if row_b < rows and d < dv:
                        dst[base_b * dv + d] = acc[at + 2] / sum_b
                    if row_b < rows and d + 8 < dv:
                        dst[base_b * dv + d + 8] = acc[at + 3] / sum_b
    return attention


@device
def weight(s, top):
    """A cell that is not seen weighs nothing, in a row that sees none so far too."""
    return exp2(s - top) if s > LOWEST else f32(0)


@device
def block_sums(tops, row):
    """(maximum, sum of weights) of a row over the warps of a block."""
    top, total = LOWEST, f32(0)
    for w in range(WARPS):
        top = max(top, tops[2 * (w * ROWS + row)])
    for w in range(WARPS):
        total += tops[2 * (w * ROWS + row) + 1] * exp2(tops[2 * (w * ROWS + row)] - top)
    return top, total


@device
def of_all_blocks(parts, sums, part, stride, blocks, d, dv):
    """Number d of a row whose cells several blocks shared out: block z's part of it is number part + z stride."""
    top, weights, total = LOWEST, f32(0), f32(0)
    for z in range(blocks):
        top = max(top, sums[2 * (part + z * stride)])
    for z in range(blocks):
        keep = exp2(sums[2 * (part + z * stride)] - top)
        weights += sums[2 * (part + z * stride) + 1] * keep
        total += parts[(part + z * stride) * dv + d] * keep
    return total / weights


# ---- launching -----------------------------------------------------------------------------------------------------------------------------

ALIGN = 256


@dataclass(frozen=True)
class Shape:
    """How a step is cut up, and how its temporary memory is shared out."""

    limit: int
    heads: int
    kv_heads: int
    dk: int
    dv: int
    cells: int                  # that the run may see
    roping: bool

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
    def places(self) -> tuple[int, ...]:
        """Where sums, parts and roped queries start in temporary memory, and where they end."""
        all_rows = self.rows * self.kv_heads
        parts = all_rows * self.blocks if self.blocks > 1 else 1
        sizes = (8 * parts, 4 * parts * self.dv, 4 * all_rows * self.dk if self.roping else 0)
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + -(-size // ALIGN) * ALIGN)
        return tuple(ends)


def _shape(step: DeviceStep, cells: int) -> Shape:
    q, k, v = step.src[0], step.src[1], step.src[2]
    assert q is not None and k is not None and v is not None
    return Shape(q.shape[0], q.shape[1], k.shape[0], k.shape[2], v.shape[2], min(cells, k.shape[1]), step.op == "attention_step")


def _needs(step: DeviceStep, cells: int) -> tuple[int, int]:
    return 0, _shape(step, cells).places[-1]


def attention(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    q, keys, values, cell, first = step.src[:5]
    assert q is not None and keys is not None and values is not None and cell is not None and first is not None
    shape = _shape(step, scratch.cells)
    sums, parts, roped = (scratch.temp[a:b].view(np.float32) for a, b in zip(shape.places, shape.places[1:], strict=False))
    if shape.roping:
        rope_store(stream, slots, step, roped)
    scale, softcap = step.f[0], step.f[1]
    if max(shape.dk, shape.dv) > WIDEST or shape.dk % 8 or shape.dv % 8:
        raise PyggmlError(f"heads of {shape.dk} and {shape.dv} numbers cannot be computed on the GPU (multiples of 8 up to {WIDEST} can); use -ngl 0")
    form = Form(keys.type, values.type, shape.dk, shape.dv, shape.split, softcap != 0, step.hands_on >= 0)
    grid = (shape.tiles, shape.kv_heads, shape.blocks) if shape.split else (-(-shape.tiles // WARPS), shape.kv_heads)
    attention_kernel(form)[grid, 32 * WARPS, stream](
        roped if shape.roping else q.array, keys.array, plane_offset(keys.type, keys.shape), values.array, plane_offset(values.type, values.shape),
        cell.array, first.array, step.dst.array, scratch.handed, parts, sums, counters(), shape.heads, shape.kv_heads, keys.shape[1], step.i[0],
        f32(scale if softcap else scale * LOG2_E), f32(softcap), slots, step.dst.slot, shape.limit)
    if step.hands_on >= 0:
        scratch.handed_id = step.hands_on


def can_hand_on(step: DeviceStep) -> bool:
    """Can this step leave what it makes quantized? Groups of 32 must not reach over heads."""
    shape = _shape(step, 1)
    return shape.split and shape.dv % 32 == 0


LAUNCHES: dict[str, Launch] = {"attention": attention, "attention_step": attention}
NEEDS: dict[str, Needs] = {"attention": _needs, "attention_step": _needs}
