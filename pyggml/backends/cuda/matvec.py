"""Products of a weight matrix with few columns: decoding, where the weights' way from memory is all the time there is.

A warp takes R rows (or, for matrices with few rows, the four warps of a block take R rows together) and walks over K, a lane a group
of 32 weights at a time, U groups ahead: R x U loads of 16 bytes are on their way in every lane before the first is needed. Weights pass
L1 by; activations are read through it, 16 bytes a lane, by all rows. Codes are multiplied as bytes (dp4a) with columns of INT8
activations (act.py); scales, minimums and what codes are raised by are applied once per group, with the sums of its activations.

The epilogue adds bias and residual, or, for a gated unit, multiplies the gate's activation with the row of the second matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import FLOAT, INT8, activation, count_of, none_of, prepare, row_length
from pyggml.backends.cuda.base import DeviceView, Scratch
from pyggml.backends.cuda.decode import decoder, grid_bytes
from pyggml.backends.cuda.layout import FLOATS, LAYOUTS, RelaidWeight
from pyggml.backends.cuda.prims import device, dp4a, float_of, halves, kernel, load64, load128, stream128, warp_sum
from pyggml.backends.cuda.upload import device_constant

WARPS = 4                       # of a block
COLUMNS = 8                     # most columns of one launch's tile
GATED_COLUMNS = 4               # ... with two matrices, whose sums would not fit the registers otherwise
FULL_WARPS = 132 * 16           # a grid with fewer warps than this leaves a large GPU idle: split K over a block's warps
f32, i32, i64, u32 = np.float32, np.int32, np.int64, np.uint32


@dataclass(frozen=True)
class Factor:
    """How a type takes part: `fetch` a lane's unit of weights, `times` that unit with a column of activations of kind `act`."""

    fetch: Any              # (w, o1, o2, o3, grid, unit of the matrix, unit of the row) -> decoded
    times: Any              # (decoded, act, column, columns, units, unit of the row, 0 or 1) -> f32
    unit: int               # weights
    act: int


def quantized(type_name: str) -> Factor:
    d = decoder(type_name)
    load, codes, scales, zero, two, has_min = d.load, d.codes, d.scales, d.zero, d.halves, d.has_min

    @device
    def fetch(w, o1, o2, o3, grid, at, here):
        x = load(w, o1, o2, o3, at)
        return codes(x, grid), scales(x, here)

    @device
    def times(decoded, act, column, columns, groups, here, keep):
        q, s = decoded
        k = i64(groups) * 32
        at = column * k + 16 * here
        a, b = load128(act, at), load128(act, at + (k >> 1))
        meta = load64(act, columns * k + 8 * (i64(column) * groups + here))
        low = dp4a(q[3], a[3], dp4a(q[2], a[2], dp4a(q[1], a[1], dp4a(q[0], a[0], 0))))
        high = dp4a(q[7], b[3], dp4a(q[6], b[2], dp4a(q[5], b[1], dp4a(q[4], b[0], 0))))
        sum_low, sum_high = i32(meta[1] << 16) >> 16, i32(meta[1]) >> 16
        if two:
            y = s[0] * f32(low - zero * sum_low) + s[1] * f32(high - zero * sum_high)
            if has_min:
                y += s[2] * f32(sum_low) + s[3] * f32(sum_high)
        else:
            y = s[0] * f32(low + high - zero * (sum_low + sum_high))
            if has_min:
                y += s[2] * f32(sum_low + sum_high)
        return float_of(meta[0]) * keep * y
    return Factor(fetch, times, 32, INT8)


HIGH = u32(0xFFFF0000)


@device
def eight_F32(w, i):
    a, b = stream128(w, 32 * i), stream128(w, 32 * i + 16)
    return (float_of(a[0]), float_of(a[1]), float_of(a[2]), float_of(a[3]), float_of(b[0]), float_of(b[1]), float_of(b[2]), float_of(b[3]))


@device
def eight_F16(w, i):
    a = stream128(w, 16 * i)
    p, q, r, s = halves(a[0]), halves(a[1]), halves(a[2]), halves(a[3])
    return p[0], p[1], q[0], q[1], r[0], r[1], s[0], s[1]


@device
def eight_BF16(w, i):
    a = stream128(w, 16 * i)
    return (float_of(a[0] << 16), float_of(a[0] & HIGH), float_of(a[1] << 16), float_of(a[1] & HIGH),
            float_of(a[2] << 16), float_of(a[2] & HIGH), float_of(a[3] << 16), float_of(a[3] & HIGH))


EIGHT = {"F32": eight_F32, "F16": eight_F16, "BF16": eight_BF16}       # numbers 8i .. 8i + 7 of a matrix of floats


def floats(type_name: str) -> Factor:
    eight = EIGHT[type_name]

    @device
    def fetch(w, o1, o2, o3, grid, at, here):
        return eight(w, at)

    @device
    def times(q, act, column, columns, eights, here, keep):
        at = 32 * (i64(column) * eights + here)
        a, b = load128(act, at), load128(act, at + 16)
        y = q[0] * float_of(a[0]) + q[1] * float_of(a[1]) + q[2] * float_of(a[2]) + q[3] * float_of(a[3])
        y += q[4] * float_of(b[0]) + q[5] * float_of(b[1]) + q[6] * float_of(b[2]) + q[7] * float_of(b[3])
        return keep * y
    return Factor(fetch, times, 8, FLOAT)


@cache
def factor(type_name: str) -> Factor:
    return floats(type_name) if type_name in FLOATS else quantized(type_name)


@dataclass(frozen=True)
class Form:
    """What a matvec kernel is compiled for."""

    gate: str               # type of the (first) matrix
    up: str = ""            # of the second, for gated units
    rows: int = 1           # R
    columns: int = 1        # N
    ahead: int = 1          # U
    split: int = 1          # warps that share rows: 1, or all of a block
    experts: bool = False   # a column is a pair of a token and one of its experts
    glu: int = 0            # GLU_*
    bias: bool = False
    residual: bool = False


@cache
def matvec_kernel(form: Form) -> Any:
    fetch_a, times_a = factor(form.gate).fetch, factor(form.gate).times
    fetch_b, times_b = factor(form.up or form.gate).fetch, factor(form.up or form.gate).times
    rows, columns, ahead, split, experts, glu = form.rows, form.columns, form.ahead, form.split, form.experts, form.glu
    gated, with_bias, with_residual = bool(form.up), form.bias, form.residual
    cells = rows * columns                      # sums of a warp, and as many again for the second matrix
    parts = 2 * cells * WARPS if split > 1 else 1
    tiles = WARPS // split

    @device
    def add_unit(acc, acc_b, w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, column, first, last, units, unit):
        """What one unit of each row adds; written out `ahead` times, as the compiler would not unroll a loop of this size. `last`: the last row."""
        here = min(unit, units - 1)
        keep = f32(1) if unit < units else f32(0)
        for r in range(rows):
            at = (first + min(r, last)) * units + here
            q = fetch_a(w, o1, o2, o3, grid, at, here)
            if gated:
                q_b = fetch_b(w_b, p1, p2, p3, grid_b, at, here)
            for n in range(columns):
                acc[r * columns + n] += times_a(q, act, min(column + n, total - 1), total, units, here, keep)
            if gated:
                for n in range(columns):
                    acc_b[r * columns + n] += times_b(q_b, act, min(column + n, total - 1), total, units, here, keep)

    @kernel
    def matvec(w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, ids, per_token, share, dst, bias, bias_b, residual, scale, m, units,
               slots, slot, limit):
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        row0 = (i32(cuda.blockIdx.x) * tiles + warp // split) * rows
        t0 = i32(cuda.blockIdx.y) * columns
        count = count_of(slots, slot, per_token, limit)
        first, column = i64(0), t0
        if experts and t0 < count:
            first, column = i64(ids[t0]) * m, t0 // share
        if t0 >= count or (split == 1 and row0 >= m):
            return
        acc, acc_b = cuda.local.array(cells, np.float32), cuda.local.array(cells, np.float32)
        for i in range(cells):
            acc[i], acc_b[i] = 0, 0
        for base in range(lane + 32 * ahead * (warp % split), units, 32 * ahead * split):
            add_unit(acc, acc_b, w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, column, first + row0, m - 1 - row0, units, base)
            if ahead > 1:
                add_unit(acc, acc_b, w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, column, first + row0, m - 1 - row0, units, base + 32)
            if ahead > 2:
                add_unit(acc, acc_b, w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, column, first + row0, m - 1 - row0, units, base + 64)
                add_unit(acc, acc_b, w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, column, first + row0, m - 1 - row0, units, base + 96)
        for i in range(cells):
            acc[i] = warp_sum(acc[i])
        if gated:
            for i in range(cells):
                acc_b[i] = warp_sum(acc_b[i])
        if split > 1:
            shared = cuda.shared.array(parts, np.float32)
            if lane == 0:
                for i in range(cells):
                    shared[2 * cells * warp + i] = acc[i]
                    shared[2 * cells * warp + cells + i] = acc_b[i]
            cuda.syncthreads()
            if warp > 0:
                return
            for i in range(cells):
                for other in range(1, WARPS):
                    acc[i] += shared[2 * cells * other + i]
                    acc_b[i] += shared[2 * cells * other + cells + i]
        # lane i finishes sum i: picked in a loop so small that it is unrolled, as an index known late would put the sums into memory
        y, z = f32(0), f32(0)
        for i in range(cells):
            y = acc[i] if lane == i else y
        if gated:
            for i in range(cells):
                z = acc_b[i] if lane == i else z
        row, n = row0 + lane // columns, t0 + lane % columns
        if lane < cells and row < m and n < count:
            at = i64(n) * m + row
            if gated:
                if with_bias:
                    y, z = y + bias[row], z + bias_b[row]
                y = activation(y, glu) * z
            else:
                y *= scale
                if with_bias:
                    y += bias[row]
                if with_residual:
                    y += residual[at]
            dst[at] = y
    return matvec


# ---- launching ---------------------------------------------------------------------------------------------------------------------------

def array_of(view: DeviceView | None, dtype: Any) -> Any:
    return none_of(dtype) if view is None else view.array


def planes_of(weight: RelaidWeight) -> tuple[Any, ...]:
    """A weight as kernels take it: its memory, where its planes start, and the codebook that its codes index."""
    grid = device_constant(("grid", weight.type), lambda: grid_bytes(weight.type)) if weight.quantized and LAYOUTS[weight.type].grid \
        else none_of(np.uint8)
    return weight.data, *weight.offsets, grid


def shape_of(m: int, units: int, columns: int, gated: bool) -> dict[str, int]:
    """Rows a warp takes, units it fetches ahead, warps that share rows.

    With many columns the activations' way through L1 is what takes time, and rows share it; with one, it is how many loads are on their way.
    """
    rows = 1 if gated or m < (FULL_WARPS if columns > 2 else 2 * FULL_WARPS) else 2
    split = WARPS if m // rows < FULL_WARPS and units >= 64 else 1
    ahead = 1 if columns > 2 else 2 if rows > 1 or gated or columns > 1 or units <= 64 * split else 4
    return dict(rows=rows, ahead=ahead, split=split)


def matvec(weight: RelaidWeight, up: RelaidWeight | None, x: DeviceView, norm: DeviceView | None, dst: DeviceView, slots: Any, stream: Any,
           scratch: Scratch, *, act_id: int = -1, eps: float = 0, scale: float = 1, bias: DeviceView | None = None, bias_up: DeviceView | None = None,
           residual: DeviceView | None = None, ids: DeviceView | None = None, glu: int = 0) -> None:
    """dst (T, M) = x Wᵀ with its epilogue, or with `ids` (T, U) dst (T, U, M), one expert's product for each of a token's pairs."""
    f = factor(weight.type)
    k, m, units = x.shape[-1], weight.rows, weight.k // f.unit
    act, total = x.array, math.prod(x.shape[:-1])
    if f.act == INT8 or norm is not None or k != row_length(f.act, k):
        prepare(f.act, act_id, x, norm, eps, slots, stream, scratch)
        act = scratch.act
    limit, per_token = math.prod(dst.shape[:-1]), math.prod(dst.shape[1:-1])
    columns = 1 if ids is not None else min(GATED_COLUMNS if up is not None else COLUMNS, 1 << (limit - 1).bit_length())
    shape = shape_of(m, units, columns, up is not None)
    form = Form(weight.type, up.type if up is not None else "", columns=columns, experts=ids is not None, glu=glu, bias=bias is not None,
                residual=residual is not None, **shape)
    tiles = shape["rows"] * (WARPS // shape["split"])
    second = planes_of(up if up is not None else weight)
    matvec_kernel(form)[(-(-m // tiles), -(-limit // columns)), 32 * WARPS, stream](
        *planes_of(weight), *second, act, total, array_of(ids, np.int32), per_token, limit // total, dst.array, array_of(bias, np.float32),
        array_of(bias_up, np.float32), array_of(residual, np.float32), f32(scale), m, units, slots, dst.slot, limit)
