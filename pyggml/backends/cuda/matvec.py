"""Products of a weight matrix with few columns: decoding, where the weights' way from memory is all the time there is.

A warp takes R rows (or, for matrices with few rows, the four warps of a block take R rows together) and walks over K, a lane a group
of 32 weights at a time, U groups ahead: R x U loads of 16 bytes are on their way in every lane before the first is needed. Weights pass
L1 by; activations are read through it, 16 bytes a lane, by all rows. Codes are multiplied as bytes (dp4a) with columns of INT8
activations (act.py); scales, minimums and what codes are raised by are applied once per group, with the sums of its activations.

The epilogue adds bias and residual, or, for a gated unit, multiplies the gate's activation with the row of the second matrix. The tail may
hand the columns on, prepared for the product that comes next (tails.py). Queries, keys and values are made by one launch (qkv.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import INT8, array_of, capped, count_of, gated_unit, none_of, prepare, row_length
from pyggml.backends.cuda.base import DeviceView, HandOn, Scratch
from pyggml.backends.cuda.decode import grid_bytes
from pyggml.backends.cuda.factors import factor
from pyggml.backends.cuda.intrinsics import device, kernel
from pyggml.backends.cuda.layout import LAYOUTS, RelaidWeight
from pyggml.backends.cuda.prims import block_barrier, warp_sum
from pyggml.backends.cuda.tails import HANDED, arrive, counters, hand_on, hand_on_normed
from pyggml.backends.cuda.upload import device_constant

WARPS = 4                       # of a block
COLUMNS = 8                     # most columns of one launch's tile
FULL_WARPS = 132 * 16           # a grid with fewer warps than this leaves a large GPU idle: split K over a block's warps
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
    softcap: bool = False
    onto: bool = False      # dst holds the gate, whose activation the product is multiplied with
    hands_on: int = -1      # dst is also left prepared as INT8 or FLOAT
    normed: bool = False    # ... and normed, by the last of all blocks

    @property
    def sums(self) -> int:
        """Of a warp: the first matrix's, then the second's."""
        return self.rows * self.columns * (2 if self.up else 1)

    @property
    def parts(self) -> int:
        """Floats of shared memory."""
        return self.sums * WARPS if self.split > 1 else 1

    @property
    def per_block(self) -> int:
        """Rows of a block."""
        return self.rows * (WARPS // self.split)


@cache
def product(form: Form) -> Any:
    """What a block does, as a device function: `block` counts along the rows, t0 is its first column; acc and shared are its sums."""
    fetch_a, times_a = factor(form.gate).fetch, factor(form.gate).times
    fetch_b, times_b = factor(form.up or form.gate).fetch, factor(form.up or form.gate).times
    rows, columns, ahead, split, experts, glu = form.rows, form.columns, form.ahead, form.split, form.experts, form.glu
    gated, with_bias, with_residual, with_cap, onto = bool(form.up), form.bias, form.residual, form.softcap, form.onto
    cells = rows * columns
    sums = form.sums
    tiles = WARPS // split

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
    def finish(y, z, bias_at, at, dst, bias, bias_b, residual, scale, cap):
        """The epilogue of one number."""
        if gated:
            if with_bias:
                y, z = y + bias[bias_at], z + bias_b[bias_at]
            dst[at] = gated_unit(y, z, glu)
        else:
            y *= scale
            if with_bias:
                y += bias[bias_at]
            if with_residual:
                y += residual[at]
            if with_cap:
                y = capped(y, cap)
            if onto:
                y = gated_unit(dst[at], y, glu)
            dst[at] = y

    @device
    def block_of(acc, shared, tid, block, t0, w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, ids, per_token, share, dst, bias,
                 bias_b, residual, scale, cap, m, units, slots, slot, limit):
        lane, warp = tid & 31, tid >> 5
        row0 = (block * tiles + warp // split) * rows
        count = count_of(slots, slot, per_token, limit)
        first, column = i64(0), t0
        if experts and t0 < count:
            first, column = i64(ids[t0]) * m, t0 // share
        if t0 >= count or (split == 1 and row0 >= m):
            return
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
            if lane == 0:
                for i in range(sums):
                    shared[sums * warp + i] = acc[i]
            block_barrier()
            if warp > 0:
                return
            for i in range(sums):
                for other in range(1, WARPS):
                    acc[i] += shared[sums * other + i]
        # lane i finishes sum i: picked in a loop so small that it is unrolled, as an index known late would put the sums into memory (so would one
        # of a branch that is taken when the lane is i: the compiler then takes the lane for the index)
        y, z = f32(0), f32(0)
        for i in range(cells):
            one = acc[i]
            y = one if lane == i else y
        if gated:
            for i in range(cells):
                one = acc[cells + i]
                z = one if lane == i else z
        row, n = row0 + lane // columns, t0 + lane % columns
        if lane < cells and row < m and n < count:
            finish(y, z, first + row, i64(n) * m + row, dst, bias, bias_b, residual, scale, cap)
    return block_of


@cache
def matvec_kernel(form: Form) -> Any:
    block_of, columns, hands_on, normed = product(form), form.columns, form.hands_on, form.normed
    sums, parts, per_block = form.sums, form.parts, form.per_block

    @kernel
    def matvec(w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, total, ids, per_token, share, dst, bias, bias_b, residual, scale, cap, m, units,
               norm, eps, made, arrived, slots, slot, limit):
        tid, block, t0, rows = cuda.threadIdx.x, i32(cuda.blockIdx.x), i32(cuda.blockIdx.y) * columns, i32(m)   # Python's integers come as 64 bits
        acc = cuda.local.array(sums, np.float32)
        shared = cuda.shared.array(parts, np.float32)
        block_of(acc, shared, tid, block, t0, w, o1, o2, o3, grid, w_b, p1, p2, p3, grid_b, act, i32(total), ids, per_token, share, dst, bias,
                 bias_b, residual, scale, cap, rows, i32(units), slots, slot, limit)
        if hands_on >= 0:
            count = count_of(slots, slot, per_token, limit)
            turn = cuda.shared.array(1, np.int32)
            if normed:
                squares = cuda.shared.array(WARPS, np.float32)
                if arrive(arrived, cuda.blockIdx.y, cuda.gridDim.x, turn, tid):
                    for n in range(t0, min(t0 + columns, count)):
                        hand_on_normed(dst, n, rows, norm, eps, hands_on, limit, made, squares, tid, 32 * WARPS)
            else:
                part = block * per_block // HANDED
                blocks = (min(HANDED, rows - HANDED * part) + per_block - 1) // per_block
                if arrive(arrived, i32(cuda.blockIdx.y) * ((rows + HANDED - 1) // HANDED) + part, blocks, turn, tid) and tid < 32:
                    for n in range(t0, t0 + columns):
                        hand_on(dst, n, HANDED * part + 4 * tid if n < count else rows, rows, limit, made)
    return matvec


# ---- launching ---------------------------------------------------------------------------------------------------------------------------

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
           scratch: Scratch, *, act_id: int = -1, eps: float = 0, scale: float = 1, softcap: float = 0, bias: DeviceView | None = None,
           bias_up: DeviceView | None = None, residual: DeviceView | None = None, ids: DeviceView | None = None, glu: int = 0, onto: bool = False,
           hands_on: HandOn | None = None) -> None:
    """dst (T, M) = x Wᵀ with its epilogue, or with `ids` (T, U) dst (T, U, M), one expert's product for each of a token's pairs."""
    if up is not None and ids is None and dst.shape[0] > 1:         # two matrices' sums of several columns would not fit the registers
        matvec(weight, None, x, norm, dst, slots, stream, scratch, act_id=act_id, eps=eps, bias=bias)
        matvec(up, None, x, norm, dst, slots, stream, scratch, act_id=act_id, eps=eps, bias=bias_up, glu=glu, onto=True, hands_on=hands_on)
        return
    m, units, total = weight.rows, weight.k // factor(weight.type).unit, math.prod(x.shape[:-1])
    act = prepared(x, weight, norm, act_id, eps, slots, stream, scratch)
    limit, per_token = math.prod(dst.shape[:-1]), math.prod(dst.shape[1:-1])
    columns = 1 if ids is not None else tile_of(limit)
    shape = shape_of(m, units, columns, up is not None)
    after = hands_on.norm if hands_on is not None else None
    form = Form(weight.type, up.type if up is not None else "", columns=columns, experts=ids is not None, glu=glu, bias=bias is not None,
                residual=residual is not None, softcap=softcap != 0, onto=onto,
                hands_on=hands_on.kind if hands_on is not None else -1, normed=after is not None, **shape)
    second = planes_of(up if up is not None else weight)
    matvec_kernel(form)[(-(-m // form.per_block), -(-limit // columns)), 32 * WARPS, stream](
        *planes_of(weight), *second, act, total, array_of(ids, np.int32), per_token, limit // total, dst.array, array_of(bias, np.float32),
        array_of(bias_up, np.float32), array_of(residual, np.float32), f32(scale), f32(softcap), m, units, array_of(after, np.float32),
        f32(hands_on.eps if hands_on is not None else 0), scratch.handing, counters(), slots, dst.slot, limit)
    scratch.hand_on(hands_on)

