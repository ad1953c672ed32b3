"""How a warp attends: 16 rows (see attention.py) over the cells that they see, 16 at a time, with the softmax kept online.

Fragments are those of mma in prims.py, for lane 4g + t: rows g and g + 8, here a and b. Which of the inner dimensions a register stands
for is free as long as both factors agree, so the lane takes numbers 8t .. 8t + 7 of every 32 of a key (cell g), and numbers 8g .. 8g + 7 of
every 64 of a value (cells 2t, 2t + 1, 2t + 8, 2t + 9). The probabilities are already where the second product wants them (Dao 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pyggml.backends.cuda.cachetypes import fetcher
from pyggml.backends.cuda.intrinsics import device
from pyggml.backends.cuda.prims import LOG2_E, exp2, float_of, half2, load128_now, mma, prmt, shfl_xor, warp_any

WARPS = 4                       # of a block
ROWS = 16                       # of a warp's tile
STEP = 16                       # cells at a time
LOWEST = np.float32(-1e30)      # a running maximum before any cell: finite, so that no difference is NaN
f32, i32, i64, u32 = np.float32, np.int32, np.int64, np.uint32


@dataclass(frozen=True)
class Form:
    """What an attention kernel is compiled for."""

    type_k: str
    type_v: str
    dk: int
    dv: int
    split: bool             # the warps of a block, and several blocks, share out the cells of one tile
    softcap: bool = False
    sinks: bool = False     # each head has a score without a value
    hands_on: bool = False  # dst is also left quantized; only where cells are shared out

    @property
    def chunks(self) -> int:
        """32 numbers of a key."""
        return -(-self.dk // 32)

    @property
    def blocks(self) -> int:
        """64 numbers of a value."""
        return -(-self.dv // 64)

    @property
    def wide(self) -> bool:
        """Wide heads leave no registers for queries, which then wait in shared memory, nor for values before the scores are done."""
        return self.dk > 128 or self.dv > 128


@device
def cells_of(row, rows, group, first, cell, window):
    """The first and last cell that a row sees; (large, -1) for a row that there is not."""
    if row >= rows:
        return i32(0x7FFFFFFF), i32(-1)
    low, high = first[row // group], cell[row // group]
    if window > 0:
        low = max(low, high - window + 1)
    return low, high


@device
def weight(s, top):
    """A cell that is not seen weighs nothing, in a row that sees none so far too."""
    return exp2(s - top) if s > LOWEST else f32(0)


@cache
def queries(form: Form) -> Any:
    """A device function that loads a warp's queries, scaled, as half floats: into registers, or word by word into shared memory."""
    dk, chunks, wide = form.dk, form.chunks, form.wide

    @device
    def eight(q, row, d, scale, here):
        """Numbers d .. d + 7 of a query as four words."""
        if not here or (dk % 32 != 0 and d >= dk):
            return u32(0), u32(0), u32(0), u32(0)
        a, b = load128_now(q, 4 * (row * dk + d)), load128_now(q, 4 * (row * dk + d) + 16)
        return (half2(float_of(a[0]) * scale, float_of(a[1]) * scale), half2(float_of(a[2]) * scale, float_of(a[3]) * scale),
                half2(float_of(b[0]) * scale, float_of(b[1]) * scale), half2(float_of(b[2]) * scale, float_of(b[3]) * scale))

    @device
    def load(q, base_a, base_b, here_a, here_b, t, scale, registers, waiting, mine):
        for c in range(chunks):
            a, b = eight(q, base_a, 32 * c + 8 * t, scale, here_a), eight(q, base_b, 32 * c + 8 * t, scale, here_b)
            for i in range(4):
                if wide:
                    waiting[mine + 32 * (8 * c + i)], waiting[mine + 32 * (8 * c + 4 + i)] = a[i], b[i]
                else:
                    registers[8 * c + i], registers[8 * c + 4 + i] = a[i], b[i]
    return load


@cache
def walker(form: Form) -> Any:
    """A device function that takes a warp over the cells start .. stop, adding to `acc`; -> (max, max, sum, sum) of rows a and b."""
    fetch_k, fetch_v = fetcher(form.type_k, form.split), fetcher(form.type_v, form.split)
    dk, dv, chunks, blocks, wide, capped = form.dk, form.dv, form.chunks, form.blocks, form.wide, form.softcap

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
    def fetch_values(values, plane, head_row, c0, last, g, words):
        """Values of the cells c0, c0 + 1, c0 + 8 and c0 + 9, four words each."""
        row0, row1, row8, row9 = (head_row + min(c0, last), head_row + min(c0 + 1, last), head_row + min(c0 + 8, last), head_row + min(c0 + 9, last))
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
    def scores(registers, waiting, mine, words):
        """Q Kᵀ: rows a and b with the cells 2t, 2t + 1 (s0, s1; s2, s3), then with those 8 on."""
        s0, s1, s2, s3, s4, s5, s6, s7 = f32(0), f32(0), f32(0), f32(0), f32(0), f32(0), f32(0), f32(0)
        for c in range(chunks):
            for j in range(2):
                if wide:
                    at = mine + 32 * (8 * c + 2 * j)
                    a0, a1, a2, a3 = waiting[at], waiting[at + 128], waiting[at + 32], waiting[at + 160]
                else:
                    a0, a1 = registers[8 * c + 2 * j], registers[8 * c + 4 + 2 * j]
                    a2, a3 = registers[8 * c + 2 * j + 1], registers[8 * c + 4 + 2 * j + 1]
                s0, s1, s2, s3 = mma(s0, s1, s2, s3, a0, a1, a2, a3, words[8 * c + 2 * j], words[8 * c + 2 * j + 1])
                s4, s5, s6, s7 = mma(s4, s5, s6, s7, a0, a1, a2, a3, words[8 * c + 4 + 2 * j], words[8 * c + 4 + 2 * j + 1])
        return s0, s1, s2, s3, s4, s5, s6, s7

    @device
    def seen(s, cell_, low, high, softcap):
        if capped:
            s = softcap * (f32(1) - f32(2) / (exp2(s / softcap * f32(2 * LOG2_E)) + f32(1))) * f32(LOG2_E)
        return s if low <= cell_ and cell_ <= high else LOWEST

    @device
    def add_values(acc, keep_a, keep_b, p0, p1, p2, p3, words):
        """acc, whose rows are kept in part, plus P V."""
        for h in range(blocks):
            for j in range(8):
                at = 32 * h + 4 * j
                pick = u32(0x5410) if j % 2 == 0 else u32(0x7632)       # low or high halves of two words
                word = 16 * h + j // 2
                b0, b1 = prmt(words[word], words[word + 4], pick), prmt(words[word + 8], words[word + 12], pick)
                acc[at], acc[at + 1], acc[at + 2], acc[at + 3] = mma(acc[at] * keep_a, acc[at + 1] * keep_a, acc[at + 2] * keep_b,
                                                                     acc[at + 3] * keep_b, p0, p1, p2, p3, b0, b1)

    @device
    def walk(registers, waiting, mine, keys, plane_k, values, plane_v, head_row, start, stop, last, low_a, high_a, low_b, high_b, softcap, g, t,
             k_words, v_words, acc):
        max_a, max_b, sum_a, sum_b = LOWEST, LOWEST, f32(0), f32(0)
        for base in range(start, stop + 1, STEP):
            c0 = base + 2 * t
            if not warp_any((low_a <= base + 15 and base <= high_a) or (low_b <= base + 15 and base <= high_b)):
                continue                                    # between the cells of one sequence and another's
            fetch_keys(keys, plane_k, head_row + min(base + g, last), head_row + min(base + 8 + g, last), t, k_words)
            if not wide:
                fetch_values(values, plane_v, head_row, c0, last, g, v_words)
            s0, s1, s2, s3, s4, s5, s6, s7 = scores(registers, waiting, mine, k_words)
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
                fetch_values(values, plane_v, head_row, c0, last, g, v_words)
            add_values(acc, keep_a, keep_b, half2(s0, s1), half2(s2, s3), half2(s4, s5), half2(s6, s7), v_words)
        for m in (1, 2):
            sum_a, sum_b = sum_a + shfl_xor(sum_a, m), sum_b + shfl_xor(sum_b, m)
        return max_a, max_b, sum_a, sum_b
    return walk
