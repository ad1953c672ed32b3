"""What the last of several blocks does with what all of them made: the work of a launch of its own, without the launch.

Blocks count themselves in; who comes last finds in memory what the others wrote. It prepares the activations that the next product
reads (as act.py would), or ropes and stores a head of queries, keys or values (cachestore.py). A launch costs two or three microseconds on
the GPU even in a recording, a tail half of that: it is one pass over some kilobytes that lie in L2.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyggml.backends.cuda.act import INT8, block_sum, quantize
from pyggml.backends.cuda.intrinsics import device
from pyggml.backends.cuda.prims import bits_of, block_barrier, count_up, fence, float_of, load128_now, store128
from pyggml.backends.cuda.upload import device_constant

COUNTERS = 1024                 # groups of blocks that can be counted in one launch
HANDED = 128                    # rows that are quantized together: 4 for each lane of a warp
NORMED = 8192                   # numbers that one block norms in less time than a launch takes
f32, i32, i64 = np.float32, np.int32, np.int64


def counters() -> Any:
    """How many blocks have arrived, of COUNTERS groups; all 0 between launches."""
    return device_constant("counters", lambda: np.zeros(COUNTERS, np.int32))


@device
def arrive(arrived, group, blocks, turn, tid):
    """Is this block the last of `blocks` that come here? It may then read what the others wrote. `turn` is a shared int32.

    One thread's fence behind a barrier publishes what the whole block wrote, as in the grid barrier of CUDA's cooperative groups.
    """
    block_barrier()
    if tid == 0:
        fence()
        turn[0] = count_up(arrived, 4 * group)
    block_barrier()
    last = turn[0] == blocks - 1
    if last:
        fence()
        if tid == 0:
            arrived[group] = 0
    return last


@device
def hand_on(x, n, at, k, columns, made):
    """Numbers at .. at + 3 of column n of x (columns, k), which this launch wrote, to INT8; called as quantize is."""
    a, b, c, d = f32(0), f32(0), f32(0), f32(0)
    if at < k:
        v = load128_now(x, 4 * (i64(n) * k + at))
        a, b, c, d = float_of(v[0]), float_of(v[1]), float_of(v[2]), float_of(v[3])
    quantize(a, b, c, d, made, i64(n) * k, i64(columns) * k + 8 * (i64(n) * (k >> 5)), at, k)


@device
def hand_on_normed(x, n, k, norm, eps, kind, columns, made, shared, tid, threads):
    """Column n of x (columns, k), which this launch wrote, normed and prepared as `kind` by a whole block; k is a multiple of 8."""
    squares, column = f32(0), i64(n) * k
    for at in range(4 * tid, k, 4 * threads):
        v = load128_now(x, 4 * (column + at))
        a, b, c, d = float_of(v[0]), float_of(v[1]), float_of(v[2]), float_of(v[3])
        squares += a * a + b * b + c * c + d * d
    factor = f32(1) / math.sqrt(block_sum(squares, shared, tid, threads) / f32(k) + eps)
    for start in range(0, k, 4 * threads):                      # all lanes come along, as quantizing wants them
        at = start + 4 * tid
        a, b, c, d = f32(0), f32(0), f32(0), f32(0)
        if at < k:
            v = load128_now(x, 4 * (column + at))
            a, b = float_of(v[0]) * factor * norm[at], float_of(v[1]) * factor * norm[at + 1]
            c, d = float_of(v[2]) * factor * norm[at + 2], float_of(v[3]) * factor * norm[at + 3]
        if kind == INT8:
            quantize(a, b, c, d, made, column, i64(columns) * k + 8 * (i64(n) * (k >> 5)), at, k)
        elif at < k:
            store128(made, 4 * (column + at), bits_of(a), bits_of(b), bits_of(c), bits_of(d))
