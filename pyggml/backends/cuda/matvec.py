"""Products of a weight matrix with few columns: decoding, where the weights' way from memory is all the time there is.

A warp takes R rows (or, for matrices with few rows, the four warps of a block take R rows together) and walks over K, a lane a group
of 32 weights at a time, U groups ahead: R x U loads of 16 bytes are on their way in every lane before the first is needed. Weights pass
L1 by; activations are read through it, 16 bytes a lane, by all rows. Codes are multiplied as bytes (dp4a) with columns of INT8
activations (act.py); scales, minimums and what codes are raised by are applied once per group, with the sums of its activations.

The epilogue adds bias and residual, or, for a gated unit, multiplies the gate's activation with the row of the second matrix, and may hand
its columns on, quantized for the product that comes next. Queries, keys and values are made by one launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import INT8, activation, arrive, count_of, counters, hand_on, none_of, prepare, row_length
from pyggml.backends.cuda.base import DeviceStep, DeviceView, Scratch
from pyggml.backends.cuda.decode import grid_bytes
from pyggml.backends.cuda.factors import factor
from pyggml.backends.cuda.intrinsics import device, kernel
from pyggml.backends.cuda.layout import LAYOUTS, RelaidWeight
from pyggml.backends.cuda.prims import warp_sum
from pyggml.backends.cuda.upload import device_constant

WARPS = 4                       # of a block
COLUMNS = 8                     # most columns of one launch's tile
FULL_WARPS = 132 * 16           # a grid with fewer warps than this leaves a large GPU idle: split K over a block's warps
HANDED = 128                    # rows that are quantized together, by the last of the blocks that made them: 4 for each lane of a warp
f32, i32, i64, u32 = np.float32, np.int32, np.int64, np.uint32


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
    onto: bool = False      # dst holds the gate, whose activation the product is multiplied with
    hands_on: bool = False  # dst is also left quantized


@cache
def product(form: Form) -> Any:
    """What block `block` of a grid does, as a device function."""
    fetch_a, times_a = factor(form.gate).fetch, factor(form.gate).times
    fetch_b, times_b = factor(form.up or form.gate).fetch, factor(form.up or form.gate).times
    rows, columns, ahead, split, experts, glu = form.rows, form.columns, form.ahead, form.split, form.experts, form.glu
    gated, with_bias, with_residual, onto, hands_on = bool(form.up), form.bias, form.residual, form.onto, form.hands_on
    cells = rows * columns
    sums = 2 * cells if gated else cells        # of a warp: the first matrix's, then the second's
    parts = sums * WARPS if split > 1 else 1
    tiles = WARPS // split
    per_block = rows * tiles

    @device
    def add_unit(acc, w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, column, first, last, units, unit):
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
                    acc[cells + r * columns + n] += times_b(q_b, act, min(column + n, total - 1), total, units, here, keep)

    @device
    def finish(y, z, row, at, dst, bias, bias_b, residual, scale):
        """The epilogue of one number."""
        if gated:
            if with_bias:
                y, z = y + bias[row], z + bias_b[row]
            dst[at] = activation(y, glu) * z
        else:
            y *= scale
            if with_bias:
                y += bias[row]
            if with_residual:
                y += residual[at]
            if onto:
                y *= activation(dst[at], glu)
            dst[at] = y

    @device
    def block_of(block, w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, ids, per_token, share, dst, bias, bias_b, residual, scale, m,
                 units, made, arrived, slots, slot, limit):
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        row0 = (block * tiles + warp // split) * rows
        t0 = i32(cuda.blockIdx.y) * columns
        count = count_of(slots, slot, per_token, limit)
        first, column = i64(0), t0
        if experts and t0 < count:
            first, column = i64(ids[t0]) * m, t0 // share
        if t0 >= count or (split == 1 and row0 >= m):
            return
        acc = cuda.local.array(sums, np.float32)
        for i in range(sums):
            acc[i] = 0
        for base in range(lane + 32 * ahead * (warp % split), units, 32 * ahead * split):
            add_unit(acc, w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, column, first + row0, m - 1 - row0, units, base)
            if ahead > 1:
                add_unit(acc, w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, column, first + row0, m - 1 - row0, units, base + 32)
            if ahead > 2:
                add_unit(acc, w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, column, first + row0, m - 1 - row0, units, base + 64)
                add_unit(acc, w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, column, first + row0, m - 1 - row0, units, base + 96)
        for i in range(sums):
            acc[i] = warp_sum(acc[i])
        if split > 1:
            shared = cuda.shared.array(parts, np.float32)
            if lane == 0:
                for i in range(sums):
                    shared[sums * warp + i] = acc[i]
            cuda.syncthreads()
            if warp > 0:
                return
            for i in range(sums):
                for other in range(1, WARPS):
                    acc[i] += shared[sums * other + i]
        # lane i finishes sum i: picked in a loop so small that it is unrolled, as an index known late would put the sums into memory
        y, z = f32(0), f32(0)
        for i in range(cells):
            y = acc[i] if lane == i else y
        if gated:
            for i in range(cells):
                z = acc[cells + i] if lane == i else z
        row, n = row0 + lane // columns, t0 + lane % columns
        if lane < cells and row < m and n < count:
            finish(y, z, row, i64(n) * m + row, dst, bias, bias_b, residual, scale)
        if hands_on:
            turn = cuda.shared.array(1, np.int32)
            part = row0 // HANDED
            if arrive(arrived, part, (min(HANDED, m - HANDED * part) + per_block - 1) // per_block, turn, cuda.threadIdx.x) and warp == 0:
                for n in range(columns):
                    hand_on(dst, n, HANDED * part + 4 * lane if n < count else m, m, limit, made)
    return block_of


@cache
def matvec_kernel(form: Form) -> Any:
    block_of = product(form)

    @kernel
    def matvec(w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, ids, per_token, share, dst, bias, bias_b, residual, scale, m, units,
               made, arrived, slots, slot, limit):
        block_of(i32(cuda.blockIdx.x), w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, i32(total), ids, per_token, share, dst, bias, bias_b,
                 residual, scale, i32(m), i32(units), made, arrived, slots, slot, limit)        # Python's integers come as 64 bits
    return matvec


@cache
def three_kernel(first: Form, second: Form, third: Form) -> Any:
    """Three matrices that read the same columns: the grid's blocks are the first one's, then the second's, then the third's."""
    one, two, three = product(first), product(second), product(third)
    rows = first.rows * (WARPS // first.split)

    @kernel
    def matvec_three(w, o1, o2, o3, grid, m, dst, bias, w_b, p1, p2, p3, grid_b, m_b, dst_b, bias_b, w_c, q1, q2, q3, grid_c, m_c, dst_c, bias_c,
                     act, ids, units, made, arrived, slots, slot, limit):
        block, scale, columns, k = i32(cuda.blockIdx.x), f32(1), i32(limit), i32(units)
        blocks, blocks_b = (m + rows - 1) // rows, (m_b + rows - 1) // rows
        if block < blocks:
            one(block, w, o1, o2, o3, grid, w, o1, o2, o3, grid, act, columns, ids, 1, 1, dst, bias, bias, bias, scale, i32(m), k,
                made, arrived, slots, slot, limit)
        elif block < blocks + blocks_b:
            two(block - blocks, w_b, p1, p2, p3, grid_b, w_b, p1, p2, p3, grid_b, act, columns, ids, 1, 1, dst_b, bias_b, bias_b, bias_b, scale,
                i32(m_b), k, made, arrived, slots, slot, limit)
        else:
            three(block - blocks - blocks_b, w_c, q1, q2, q3, grid_c, w_c, q1, q2, q3, grid_c, act, columns, ids, 1, 1, dst_c, bias_c, bias_c, bias_c,
                  scale, i32(m_c), k, made, arrived, slots, slot, limit)
    return matvec_three


# ---- launching ---------------------------------------------------------------------------------------------------------------------------

def array_of(view: DeviceView | None, dtype: Any) -> Any:
    return none_of(dtype) if view is None else view.array


def planes_of(weight: RelaidWeight) -> tuple[Any, ...]:
    """A weight as kernels take it: its memory, where its planes start, and the codebook that its codes index."""
    grid = device_constant(("grid", weight.type), lambda: grid_bytes(weight.type)) if weight.quantized and LAYOUTS[weight.type].grid \
        else none_of(np.uint8)
    return weight.data, *weight.offsets, grid


def shape_of(m: int, units: int, columns: int, gated: bool) -> dict[str, Any]:
    """Rows a warp takes, units it fetches ahead, warps that share rows.

    With many columns the activations' way through L1 is what takes time, and rows share it; with one, it is how many loads are on their way.
    """
    rows = 1 if gated or m < (FULL_WARPS if columns > 2 else 2 * FULL_WARPS) else 2
    split = WARPS if m // rows < FULL_WARPS and units >= 64 else 1
    ahead = 1 if columns > 2 else 2 if rows > 1 or gated or columns > 1 or units <= 64 * split else 4
    return dict(rows=rows, ahead=ahead, split=split)


def prepared(x: DeviceView, weight: RelaidWeight, norm: DeviceView | None, act_id: int, eps: float, slots: Any, stream: Any,
             scratch: Scratch) -> Any:
    """The columns of x as this weight's kernel reads them."""
    kind, k = factor(weight.type).act, x.shape[-1]
    if kind == INT8 or norm is not None or k != row_length(kind, k):
        return prepare(kind, act_id, x, norm, eps, slots, stream, scratch)
    return x.array


def tile_of(limit: int) -> int:
    """Columns of a block's tile, N."""
    return min(COLUMNS, 1 << (limit - 1).bit_length())


def matvec(weight: RelaidWeight, up: RelaidWeight | None, x: DeviceView, norm: DeviceView | None, dst: DeviceView, slots: Any, stream: Any,
           scratch: Scratch, *, act_id: int = -1, eps: float = 0, scale: float = 1, bias: DeviceView | None = None, bias_up: DeviceView | None = None,
           residual: DeviceView | None = None, ids: DeviceView | None = None, glu: int = 0, onto: bool = False, hands_on: int = -1) -> None:
    """dst (T, M) = x Wᵀ with its epilogue, or with `ids` (T, U) dst (T, U, M), one expert's product for each of a token's pairs.

    hands_on: the act_id under which dst is also left in scratch.handed.
    """
    if up is not None and ids is None and dst.shape[0] > 1:         # two matrices' sums of several columns would not fit the registers
        matvec(weight, None, x, norm, dst, slots, stream, scratch, act_id=act_id, eps=eps, bias=bias)
        matvec(up, None, x, norm, dst, slots, stream, scratch, act_id=act_id, eps=eps, bias=bias_up, glu=glu, onto=True, hands_on=hands_on)
        return
    m, units, total = weight.rows, weight.k // factor(weight.type).unit, math.prod(x.shape[:-1])
    act = prepared(x, weight, norm, act_id, eps, slots, stream, scratch)
    limit, per_token = math.prod(dst.shape[:-1]), math.prod(dst.shape[1:-1])
    columns = 1 if ids is not None else tile_of(limit)
    shape = shape_of(m, units, columns, up is not None)
    form = Form(weight.type, up.type if up is not None else "", columns=columns, experts=ids is not None, glu=glu, bias=bias is not None,
                residual=residual is not None, onto=onto, hands_on=hands_on >= 0, **shape)
    tiles = shape["rows"] * (WARPS // shape["split"])
    second = planes_of(up if up is not None else weight)
    matvec_kernel(form)[(-(-m // tiles), -(-limit // columns)), 32 * WARPS, stream](
        *planes_of(weight), *second, act, total, array_of(ids, np.int32), per_token, limit // total, dst.array, array_of(bias, np.float32),
        array_of(bias_up, np.float32), array_of(residual, np.float32), f32(scale), m, units, scratch.handed, counters(), slots, dst.slot, limit)
    if hands_on >= 0:
        scratch.handed_id = hands_on


def matvec_three(steps: tuple[DeviceStep, DeviceStep, DeviceStep], slots: Any, stream: Any, scratch: Scratch) -> None:
    """Three mul_mat steps over the same columns in one launch."""
    weights: list[RelaidWeight] = [s.src[0].weight for s in steps]      # type: ignore[union-attr, misc]
    x, norm = steps[0].src[1:3]
    assert x is not None
    act = prepared(x, weights[0], norm, steps[0].i[0], steps[0].f[0], slots, stream, scratch)
    limit, units = x.shape[0], weights[0].k // factor(weights[0].type).unit
    columns = tile_of(limit)
    shape = shape_of(sum(w.rows for w in weights), units, columns, False)
    forms = (Form(w.type, columns=columns, bias=s.src[3] is not None, **shape) for w, s in zip(weights, steps, strict=True))
    tiles = shape["rows"] * (WARPS // shape["split"])
    each = [(*planes_of(w), w.rows, s.dst.array, array_of(s.src[3], np.float32)) for w, s in zip(weights, steps, strict=True)]
    three_kernel(*forms)[(sum(-(-w.rows // tiles) for w in weights), -(-limit // columns)), 32 * WARPS, stream](
        *each[0], *each[1], *each[2], act, none_of(np.int32), units, scratch.handed, counters(), slots, steps[0].dst.slot, limit)
