"""Re-laying on the GPU: ggml's blocks, as they were copied there, into the planes of layout.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.intrinsics import SIMULATED, kernel
from pyggml.backends.cuda.layout import FLOATS, GROUP, LAYOUTS, RelaidWeight, bit_sources, float_row
from pyggml.types import tensor_type

THREADS = 128
_tables: dict[tuple[int, Any], Any] = {}


def device_constant(name: Any, make: Any) -> Any:
    """A constant array in the current GPU's memory, made once per GPU."""
    key = (0 if SIMULATED else cuda.get_current_device().id, name)
    if key not in _tables:
        _tables[key] = cuda.to_device(np.ascontiguousarray(make()))
        cuda.synchronize()                  # it goes through the default stream, for which the device's own does not wait
    return _tables[key]


@kernel
def _relay(raw, sources, out, first, blocks, block_bytes, low, high, scales, shared, o1, o2, o3):
    """One thread makes one byte of a block's planes; low, high, scales and shared are bytes of a block in each plane."""
    per_block = low + high + scales + shared
    t = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    block = t // per_block
    if block >= blocks:
        return
    at, base = t - block * per_block, block * block_bytes
    value = 0
    for bit in range(8):
        source = np.int32(sources[8 * at + bit])
        if source >= 0:
            value |= (np.int32(raw[base + (source >> 3)]) >> (source & 7) & 1) << bit
    block += first
    if at < low:
        to = block * low + at
    elif at < low + high:
        to = o1 + block * high + (at - low)
    elif at < low + high + scales:
        to = o2 + block * scales + (at - low - high)
    else:
        to = o3 + block * shared + (at - low - high - scales)
    out[to] = value


@kernel
def _relay_tq1_0(raw, out, first, blocks, o3):
    """TQ1_0, whose base-3 digits are no bits: one thread makes four 2-bit codes, or copies a byte of the scale."""
    t = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if t >= np.int64(blocks) * 66:
        return
    block, at = t // 66, np.int32(t % 66)
    base = block * 54
    if at >= 64:
        out[o3 + (block + first) * 2 + (at - 64)] = raw[base + 52 + (at - 64)]
        return
    group, byte = at >> 3, at & 7                        # byte b of word w holds weights 8p + 4w + b in its pairs p
    value = 0
    for p in range(4):
        j = 32 * group + 8 * p + byte
        if j < 160:
            source, digit = j & 31, j >> 5
        elif j < 240:
            source, digit = 32 + (j - 160 & 15), (j - 160) >> 4
        else:
            source, digit = 48 + (j - 240 & 3), (j - 240) >> 2
        q = np.int32(raw[base + source])
        for _ in range(digit):
            q = q * 3 & 255
        value |= (q * 3 >> 8) << 2 * p
    out[(block + first) * 64 + at] = value


@kernel
def _pad_rows(raw, out, per_row, padded, first, count):
    """Rows of `per_row` bytes to rows of `padded`, with zeros behind."""
    t = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if t < np.int64(count) * padded:
        row, at = t // padded, t % padded
        out[(first + row) * padded + at] = raw[row * per_row + at] if at < per_row else 0


def relay_blocks(type_name: str, k: int, total_rows: int, raw: Any, out: Any, start: int, stop: int, stream: Any) -> None:
    layout, row = LAYOUTS[type_name], tensor_type(type_name)
    groups = row.block // GROUP
    per_plane = [entry * groups // (layout.shared if n == 3 else 1) for n, entry in enumerate(layout.entries)]
    first, blocks = start * k // row.block, (stop - start) * k // row.block
    grid = -(-blocks * sum(per_plane) // THREADS)
    if grid == 0:
        return
    offsets = layout.offsets(total_rows * k // GROUP)[:3]
    if type_name == "TQ1_0":
        _relay_tq1_0[grid, THREADS, stream](raw, out, first, blocks, offsets[2])
        return
    sources = device_constant(("bits", type_name), lambda: bit_sources(type_name))
    _relay[grid, THREADS, stream](raw, sources, out, first, blocks, row.bytes, *per_plane, *offsets)


def pad_rows(type_name: str, k: int, raw: Any, out: Any, start: int, stop: int, stream: Any) -> None:
    size = np.dtype(FLOATS[type_name]).itemsize
    per_row, padded = k * size, float_row(k) * size
    if stop > start:
        _pad_rows[-(-(stop - start) * padded // THREADS), THREADS, stream](raw, out, per_row, padded, start, stop - start)


def relay(type_name: str, shape: Sequence[int], raw_blocks: Any, out: Any, stream: Any, rows: tuple[int, int] | None = None) -> RelaidWeight:
    """Re-lay rows [start, stop) (all of them by default) of a weight on the GPU.

    raw_blocks: device uint8 array whose first bytes are those rows of ggml's blocks; out: device uint8 array of relaid_bytes.
    Work is enqueued on `stream`; raw_blocks may be used again once that is done.
    """
    total = math.prod(shape[:-1])
    start, stop = rows or (0, total)
    if type_name in FLOATS:
        pad_rows(type_name, shape[-1], raw_blocks, out, start, stop, stream)
        return RelaidWeight(type_name, tuple(shape), out.view(FLOATS[type_name]))
    relay_blocks(type_name, shape[-1], total, raw_blocks, out, start, stop, stream)
    return RelaidWeight(type_name, tuple(shape), out)
