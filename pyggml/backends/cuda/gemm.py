"""Products of a weight matrix with many columns, on the tensor cores: prefill, and batches.

A block makes a tile of BM tokens x BN weight rows; its four warps stand two by two on it. K goes by in steps of BK. While one step's
tiles are multiplied from shared memory, the next step's activations (half floats, see act.py) are copied there behind the kernel's back,
and the next step's weights are on their way into registers, where each thread then makes half floats of its group of 32 and stores them.
So a weight is decoded once per tile, its quantized bytes are all that leaves memory, and no decoded matrix lies anywhere.

Shared rows are BK half floats; the 16-byte chunks of a row are permuted by its number, so that the eight rows that ldmatrix reads
together, and the eight threads that store together, meet eight different groups of banks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import HALF, array_of, capped, count_of, gated_unit, none_of, prepare
from pyggml.backends.cuda.base import DeviceView, Scratch
from pyggml.backends.cuda.decode import decoder
from pyggml.backends.cuda.factors import HIGH
from pyggml.backends.cuda.intrinsics import device, kernel
from pyggml.backends.cuda.layout import FLOATS, RelaidWeight
from pyggml.backends.cuda.matvec import planes_of
from pyggml.backends.cuda.prims import add_rn, copies_done, copies_issued, copy16, float_of, half2, ldmatrix, load128, mma, prmt, shared_store128

THREADS = 128
f32, i32, i64, u32 = np.float32, np.int32, np.int64, np.uint32


# ---- a thread's part of a step of weights: 32 numbers of one row, as four 16-byte chunks of half floats -----------------------------------

FLOAT_BIAS = u32(0x4B000000)                # 2^23: a byte in its lowest bits is added to it


@device
def byte_float(word, n, lower):
    return add_rn(float_of(prmt(word, FLOAT_BIAS, u32(0x7540 + n))), lower)


@device
def chunk_of(low, high, lower, s, m):
    """Eight codes of two words as a chunk of half floats s (code - zero) + m; `lower` takes away 2^23, the sign's bias and zero."""
    a, b = low ^ u32(0x80808080), high ^ u32(0x80808080)
    return (half2(byte_float(a, 0, lower) * s + m, byte_float(a, 1, lower) * s + m),
            half2(byte_float(a, 2, lower) * s + m, byte_float(a, 3, lower) * s + m),
            half2(byte_float(b, 0, lower) * s + m, byte_float(b, 1, lower) * s + m),
            half2(byte_float(b, 2, lower) * s + m, byte_float(b, 3, lower) * s + m))


@dataclass(frozen=True)
class Source:
    """How a type's weights get into shared memory."""

    load: Any               # (w, o1, o2, o3, row of the tensor, group, groups, K) -> words
    chunks: Any             # (words, grid, group) -> four chunks of four words


def quantized(type_name: str) -> Source:
    d = decoder(type_name)
    load_, codes, scales = d.load_again, d.codes, d.scales
    lower = f32(-(2.0**23) - 128 - d.zero)

    @device
    def load(w, o1, o2, o3, row, group, groups, k):
        return load_(w, o1, o2, o3, row * groups + group)

    @device
    def chunks(x, grid, group):
        q, s = codes(x, grid), scales(x, group)
        return (chunk_of(q[0], q[1], lower, s[0], s[2]), chunk_of(q[2], q[3], lower, s[0], s[2]),
                chunk_of(q[4], q[5], lower, s[1], s[3]), chunk_of(q[6], q[7], lower, s[1], s[3]))
    return Source(load, chunks)


def floats(type_name: str) -> Source:
    bfloat = type_name == "BF16"

    @device
    def part(w, at, here):
        if not here:                        # the last group of a row whose length is no multiple of 32
            return u32(0), u32(0), u32(0), u32(0)
        a = load128(w, at)
        return a[0], a[1], a[2], a[3]

    @device
    def load(w, o1, o2, o3, row, group, groups, k):
        at, d = 2 * (row * k + 32 * group), 32 * group
        return part(w, at, d < k) + part(w, at + 16, d + 8 < k) + part(w, at + 32, d + 16 < k) + part(w, at + 48, d + 24 < k)

    @device
    def word(x):
        return half2(float_of(x << 16), float_of(x & HIGH)) if bfloat else x

    @device
    def chunks(x, grid, group):
        return ((word(x[0]), word(x[1]), word(x[2]), word(x[3])), (word(x[4]), word(x[5]), word(x[6]), word(x[7])),
                (word(x[8]), word(x[9]), word(x[10]), word(x[11])), (word(x[12]), word(x[13]), word(x[14]), word(x[15])))
    return Source(load, chunks)


@cache
def source(type_name: str) -> Source:
    return floats(type_name) if type_name in FLOATS else quantized(type_name)


# ---- the kernel ------------------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for. BM in tokens and BN in rows; BN BK = 32 THREADS, a group for every thread."""

    type: str
    bm: int = 128
    bn: int = 128
    experts: bool = False   # the columns of each expert are listed (moe.py)
    glu: int = -1           # GLU_* to apply to the gate in dst, which is then multiplied; -1: no
    bias: bool = False
    residual: bool = False
    softcap: bool = False


@cache
def gemm_kernel(form: Form) -> Any:
    load, chunks = source(form.type).load, source(form.type).chunks
    bm, bn, experts, glu, with_bias, with_residual, with_cap = form.bm, form.bn, form.experts, form.glu, form.bias, form.residual, form.softcap
    per_row = THREADS // bn                             # threads, and groups of 32, of a weight row in one step
    bk = 32 * per_row
    row_chunks = bk // 8
    shift, mask = max(0, 3 - row_chunks.bit_length() + 1), min(7, row_chunks - 1)
    wm, wn = bm // 2, bn // 2                           # a warp's part of the tile
    tiles_m, tiles_n = wm // 16, wn // 8
    n_acc, n_b = 4 * tiles_m * tiles_n, 2 * tiles_n
    copies = bm * row_chunks // THREADS                 # 16-byte copies of activations for each thread in a step
    rows_apart = THREADS // row_chunks
    size_a, size_b = 2 * bm * bk, 2 * bn * bk           # bytes of a step's tiles
    shared_halves = size_a + size_b                     # two steps, of half floats

    @device
    def chunk_at(row, chunk):
        """Byte of a chunk in a tile."""
        return (row * row_chunks + (chunk ^ (row >> shift & mask))) * 16

    @device
    def copy_activations(shared, buffer, act, from_, step, groups, tid):
        """Zeros for tokens, and for numbers, that there are not."""
        for i in range(copies):
            row, chunk = tid // row_chunks + i * rows_apart, tid % row_chunks
            source_ = from_[i]
            here = source_ >= 0 and step * row_chunks + chunk < 4 * groups
            copy16(shared, buffer + chunk_at(row, chunk), act, (source_ if here else 0) + 2 * bk * step + 16 * chunk, 16 if here else 0)

    @device
    def put(shared, buffer, row, chunk, words):
        shared_store128(shared, buffer + chunk_at(row, chunk), words[0], words[1], words[2], words[3])

    @device
    def multiply(shared, buffer, acc, b, lane, warp):
        """One step: 16 numbers of K at a time, every 16 tokens with every 8 rows of the warp's part."""
        row_a, row_b = (warp >> 1) * wm + (lane & 7) + (lane & 8), (warp & 1) * wn + (lane & 7) + ((lane & 16) >> 1)
        for k16 in range(bk // 16):
            for j in range(tiles_n // 2):
                r = ldmatrix(shared, buffer + size_a + chunk_at(row_b + 16 * j, 2 * k16 + ((lane >> 3) & 1)))
                b[4 * j], b[4 * j + 1], b[4 * j + 2], b[4 * j + 3] = r[0], r[1], r[2], r[3]
            for i in range(tiles_m):
                a = ldmatrix(shared, buffer + chunk_at(row_a + 16 * i, 2 * k16 + (lane >> 4)))
                for j in range(tiles_n):
                    at = 4 * (i * tiles_n + j)
                    acc[at], acc[at + 1], acc[at + 2], acc[at + 3] = mma(acc[at], acc[at + 1], acc[at + 2], acc[at + 3], a[0], a[1], a[2], a[3],
                                                                         b[2 * j], b[2 * j + 1])

    @device
    def finish(acc, i, row0, column0, count, begin, list_, first_row, dst, bias, residual, scale, cap, m):
        """The epilogue of 16 tokens; called with numbers for i, so that sums stay in registers (an index known late puts them into memory)."""
        for half_ in range(2):
            row = row0 + 8 * half_
            if row < count:
                base = i64(list_[begin + row] if experts else row) * m
                for j in range(tiles_n):
                    for c in range(2):
                        column = column0 + 8 * j + c
                        if column < m:
                            y = acc[4 * (i * tiles_n + j) + 2 * half_ + c] * scale
                            if with_bias:
                                y += bias[first_row + column]
                            if with_residual:
                                y += residual[base + column]
                            if with_cap:
                                y = capped(y, cap)
                            if glu >= 0:
                                y = gated_unit(dst[base + column], y, glu)
                            dst[base + column] = y

    @kernel
    def gemm(w, o1, o2, o3, grid, act, act_row, list_, offsets, share, dst, bias, residual, scale, cap, m, k, groups, slots, slot, per_token, limit):
        shared = cuda.shared.array(shared_halves, np.float16, 16)       # aligned for copies of 16 bytes
        tid = cuda.threadIdx.x
        lane, warp = tid & 31, tid >> 5
        m0, n0 = i32(cuda.blockIdx.x) * bm, i32(cuda.blockIdx.y) * bn
        count, begin, first_row = count_of(slots, slot, per_token, limit), i32(0), i64(0)
        if experts:
            begin = offsets[cuda.blockIdx.z]
            count = offsets[cuda.blockIdx.z + 1] - begin
            first_row = i64(cuda.blockIdx.z) * m
        if m0 >= count:
            return
        # where this thread's copies of activations come from (-1: zeros), and its group of weights
        from_ = cuda.local.array(copies, np.int64)
        for i in range(copies):
            row = m0 + tid // row_chunks + i * rows_apart
            if row < count:
                from_[i] = 2 * i64(list_[begin + row] // share if experts else row) * act_row
            else:
                from_[i] = -1
        w_row, w_group = tid // per_row, tid % per_row
        w_at = first_row + min(n0 + w_row, m - 1)
        acc = cuda.local.array(n_acc, np.float32)
        b = cuda.local.array(n_b, np.uint32)
        for i in range(n_acc):
            acc[i] = 0
        steps = (groups + per_row - 1) // per_row
        words = load(w, o1, o2, o3, w_at, min(w_group, groups - 1), groups, k)
        copy_activations(shared, 0, act, from_, 0, groups, tid)
        copies_issued()
        for step in range(steps):
            buffer = (step & 1) * (size_a + size_b)
            group = step * per_row + w_group
            made = chunks(words, grid, min(group, groups - 1))
            put(shared, buffer + size_a, w_row, 4 * w_group, made[0])
            put(shared, buffer + size_a, w_row, 4 * w_group + 1, made[1])
            put(shared, buffer + size_a, w_row, 4 * w_group + 2, made[2])
            put(shared, buffer + size_a, w_row, 4 * w_group + 3, made[3])
            copies_done()
            cuda.syncthreads()                          # this step's tiles are there, and nobody reads the other buffer any more
            if step + 1 < steps:
                words = load(w, o1, o2, o3, w_at, min(group + per_row, groups - 1), groups, k)
                copy_activations(shared, size_a + size_b - buffer, act, from_, step + 1, groups, tid)
                copies_issued()
            multiply(shared, buffer, acc, b, lane, warp)
        g, t = lane >> 2, lane & 3
        row, column = m0 + (warp >> 1) * wm + g, n0 + (warp & 1) * wn + 2 * t
        finish(acc, 0, row, column, count, begin, list_, first_row, dst, bias, residual, scale, cap, m)
        if tiles_m > 1:
            finish(acc, 1, row + 16, column, count, begin, list_, first_row, dst, bias, residual, scale, cap, m)
        if tiles_m > 2:
            finish(acc, 2, row + 32, column, count, begin, list_, first_row, dst, bias, residual, scale, cap, m)
            finish(acc, 3, row + 48, column, count, begin, list_, first_row, dst, bias, residual, scale, cap, m)
    return gemm


# ---- launching -------------------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Lists:
    """The pairs of tokens and experts, sorted by expert: pairs list[offsets[e]] .. are expert e's. Device arrays (moe.py)."""

    list: Any
    offsets: Any
    experts: int
    per_token: int          # experts of a token
    share: int              # pairs that have the same row of x


def tile_of(m: int, columns: int) -> tuple[int, int]:
    """(BM, BN): large tiles where there are enough of them to fill the GPU, else many small ones."""
    if columns > 64 and -(-columns // 128) * -(-m // 128) >= 96:
        return 128, 128
    return (64, 64) if -(-columns // 64) * -(-m // 64) >= 128 else (64, 32)


def gemm(weight: RelaidWeight, x: DeviceView, norm: DeviceView | None, dst: DeviceView, slots: Any, stream: Any, scratch: Scratch, *,
         act_id: int = -1, eps: float = 0, scale: float = 1, softcap: float = 0, bias: DeviceView | None = None, residual: DeviceView | None = None,
         gate: DeviceView | None = None, glu: int = 0, lists: Lists | None = None) -> None:
    """dst (T, M) = x Wᵀ with its epilogue; with `gate` (dst itself) dst = activation(gate) * x Wᵀ; with `lists` one expert for each pair."""
    act = prepare(HALF, act_id, x, norm, eps, slots, stream, scratch)
    limit, per_token = math.prod(dst.shape[:-1]), math.prod(dst.shape[1:-1])
    m, groups = weight.rows, -(-x.shape[-1] // 32)
    columns = limit if lists is None else max(1, 2 * limit // lists.experts)        # an expert's likely share
    bm, bn = tile_of(m * (lists.experts if lists is not None else 1), columns)
    form = Form(weight.type, bm, bn, lists is not None, glu if gate is not None else -1, bias is not None, residual is not None,
                softcap != 0)
    ints = none_of(np.int32)
    tokens = limit if lists is None else limit // lists.per_token                   # an expert sees a token once
    blocks = (-(-tokens // bm), -(-m // bn), lists.experts if lists is not None else 1)
    gemm_kernel(form)[blocks, THREADS, stream](
        *planes_of(weight), act, groups * 32, lists.list if lists is not None else ints, lists.offsets if lists is not None else ints,
        lists.share if lists is not None else 1, dst.array, array_of(bias, np.float32), array_of(residual, np.float32), f32(scale), f32(softcap),
        m, weight.k, groups, slots, dst.slot, per_token, limit)
