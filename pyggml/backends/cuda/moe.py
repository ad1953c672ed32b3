"""Mixture of experts: routing, the products of each token's experts, and their sum.

Few tokens: a matvec for every pair of a token and one of its experts. Many: the pairs are sorted by expert, on the device and in order,
and each expert's pairs go through the tensor cores together.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import HALF, act_bytes, array_of, count_of
from pyggml.backends.cuda.base import DeviceStep, Launch, Needs, Scratch
from pyggml.backends.cuda.factors import factor
from pyggml.backends.cuda.gemm import Lists, gemm
from pyggml.backends.cuda.intrinsics import SIMULATED, kernel
from pyggml.backends.cuda.matvec import matvec
from pyggml.backends.cuda.prims import LOG2_E, exp2, shfl_xor, warp_max, warp_sum
from pyggml.backends.cuda.tails import COUNTERS, HANDED, NORMED, arrive, counters, hand_on_normed

THREADS = 32 if SIMULATED else 128
SUMMED = 128                            # numbers of a block
WARPS = SUMMED // 32
PAIRS = 32                              # up to so many pairs, one matvec each
LOWEST = np.float32(-3.4e38)
NEVER = np.int32(0x7FFFFFFF)
f32, i32, i64 = np.float32, np.int32, np.int64


# ---- routing -------------------------------------------------------------------------------------------------------------------------------

@kernel
def _route(logits, ids, weights, experts, used, sigmoid, normalize, scale, slots, slot, limit):
    """A warp a token: `used` rounds, each finds the largest logit after the one before (of equals the lower expert)."""
    t, lane = cuda.blockIdx.x, cuda.threadIdx.x
    if t >= count_of(slots, slot, 1, limit):
        return
    row = i64(t) * experts
    top = LOWEST
    for e in range(lane, experts, 32):
        top = max(top, logits[row + e])
    top = warp_max(top)
    total = f32(0)
    for e in range(lane, experts, 32):
        total += exp2((logits[row + e] - top) * f32(LOG2_E))
    total = warp_sum(total)
    last, last_id, chosen = f32(3.4e38), i32(-1), f32(0)
    for u in range(used):
        x, at = LOWEST, NEVER
        for e in range(lane, experts, 32):
            y = logits[row + e]
            if (y < last or (y == last and e > last_id)) and (at == NEVER or y > x):
                x, at = y, i32(e)
        for m in (16, 8, 4, 2, 1):
            other, other_at = shfl_xor(x, m), shfl_xor(at, m)
            if other_at != NEVER and (at == NEVER or other > x or (other == x and other_at < at)):
                x, at = other, other_at
        at = at if at != NEVER else i32(0)                  # only NaN logits leave nothing to choose
        last, last_id = x, at
        p = f32(1) / (f32(1) + exp2(-x * f32(LOG2_E))) if sigmoid else exp2((x - top) * f32(LOG2_E)) / total
        chosen += p
        if lane == 0:
            ids[i64(t) * used + u] = at
            weights[i64(t) * used + u] = p
    if lane == 0:
        factor = scale / chosen if normalize else scale
        for u in range(used):
            weights[i64(t) * used + u] *= factor


def moe_route(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    logits, weights = step.src[0], step.src[1]
    assert logits is not None and weights is not None
    limit, experts = logits.shape
    _route[limit, 32, stream](logits.array, step.dst.array, weights.array, experts, step.dst.shape[1], step.i[0] == 1, step.i[1] != 0,
                              f32(step.f[0]), slots, step.dst.slot, limit)


@cache
def _sum_kernel(with_residual: bool, hands_on: int) -> Any:
    @kernel
    def moe_sum(y, weights, residual, dst, used, m, norm, eps, made, arrived, slots, slot, limit):
        """A thread a number; the last block may leave all rows normed and prepared for the next product."""
        tid, count = cuda.threadIdx.x, count_of(slots, slot, 1, limit)
        i = i64(cuda.blockIdx.x) * SUMMED + tid
        if i < i64(count) * m:
            t, c = i // m, i % m
            total = residual[i] if with_residual else f32(0)
            for u in range(used):
                total += y[(t * used + u) * m + c] * weights[t * used + u]
            dst[i] = total
        if hands_on >= 0:
            turn = cuda.shared.array(1, np.int32)
            squares = cuda.shared.array(WARPS, np.float32)
            if arrive(arrived, 0, cuda.gridDim.x, turn, tid):
                for n in range(count):
                    hand_on_normed(dst, n, i32(m), norm, eps, hands_on, limit, made, squares, tid, SUMMED)
    return moe_sum


def moe_sum(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    y, weights, residual = step.src
    assert y is not None and weights is not None
    (limit, used, m), on = y.shape, step.hands_on
    _sum_kernel(residual is not None, on.kind if on is not None else -1)[-(-limit * m // SUMMED), SUMMED, stream](
        y.array, weights.array, array_of(residual, np.float32), step.dst.array, used, m, array_of(on.norm if on is not None else None, np.float32),
        f32(on.eps if on is not None else 0), scratch.handing, counters(), slots, step.dst.slot, limit)
    scratch.hand_on(on)


# ---- pairs by expert -------------------------------------------------------------------------------------------------------------------------

@kernel
def _list_pairs(ids, list_, offsets, experts, used, slots, slot, limit):
    """Block e lists expert e's pairs in order; each thread looks at a run of pairs, counts, and then knows where its own go."""
    mine = cuda.shared.array(THREADS, np.int32)
    below = cuda.shared.array(THREADS, np.int32)
    e, tid = i32(cuda.blockIdx.x), cuda.threadIdx.x
    pairs = count_of(slots, slot, used, limit)
    each = (pairs + THREADS - 1) // THREADS
    start, stop = min(tid * each, pairs), min((tid + 1) * each, pairs)
    n, lower = i32(0), i32(0)
    for p in range(start, stop):
        if ids[p] == e:
            n += 1
        elif ids[p] < e:
            lower += 1
    mine[tid] = n
    below[tid] = lower
    cuda.syncthreads()
    at, total = i32(0), i32(0)
    for other in range(THREADS):
        at += below[other] + (mine[other] if other < tid else 0)
        total += below[other] + mine[other]
    if tid == 0:
        offsets[e] = at
        if e == experts - 1:
            offsets[experts] = total
    for p in range(start, stop):
        if ids[p] == e:
            list_[at] = p
            at += 1


def _lists(ids: Any, experts: int, slots: Any, slot: int, stream: Any, scratch: Scratch, share: int) -> Lists:
    pairs, used = math.prod(ids.shape), ids.shape[1]
    memory = scratch.temp[:4 * (pairs + experts + 1)].view(np.int32)
    list_, offsets = memory[:pairs], memory[pairs:]
    _list_pairs[experts, THREADS, stream](ids.array, list_, offsets, experts, used, slots, slot, pairs)
    return Lists(list_, offsets, experts, used, share)


# ---- products ----------------------------------------------------------------------------------------------------------------------------------

def mul_mat_id(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    w, x, norm, ids = step.src[:4]
    gated = step.op == "glu_mat_id"
    bias, bias_up = (*step.src[5 if gated else 4:], None, None)[:2]
    assert w is not None and w.weight is not None and x is not None and ids is not None
    up = step.src[4].weight if gated and step.src[4] is not None else None
    pairs, glu = math.prod(ids.shape), step.i[3] if gated else 0
    if _by_pairs(w.type, pairs):
        matvec(w.weight, up, x, norm, step.dst, slots, stream, scratch, act_id=step.i[0], eps=step.f[0], ids=ids, glu=glu,
               bias=bias, bias_up=bias_up, hands_on=step.hands_on)
        return
    share = ids.shape[1] if len(x.shape) == 2 else 1
    lists = _lists(ids, w.weight.shape[0], slots, step.dst.slot, stream, scratch, share)
    gemm(w.weight, x, norm, step.dst, slots, stream, scratch, act_id=step.i[0], eps=step.f[0], bias=bias, lists=lists)
    if up is not None:
        gemm(up, x, norm, step.dst, slots, stream, scratch, act_id=step.i[0], eps=step.f[0], bias=bias_up, gate=step.dst, glu=glu, lists=lists)


def _by_pairs(type_name: str, pairs: int) -> bool:
    return pairs <= PAIRS or type_name == "F32"


def form_of(step: DeviceStep) -> int:
    """How a product of experts reads its activations: HALF, INT8 or FLOAT."""
    w, ids = step.src[0], step.src[3]
    assert w is not None and ids is not None
    return factor(w.type).act if _by_pairs(w.type, math.prod(ids.shape)) else HALF


def can_hand_on(step: DeviceStep, normed: bool) -> bool:
    """Can this step leave what it makes prepared for the next? Gated units do group by group, as matmul's; a sum as a whole, with the norm."""
    m, columns = step.dst.shape[-1], math.prod(step.dst.shape[:-1])
    if step.op == "glu_mat_id":
        return not normed and form_of(step) != HALF and m % 32 == 0 and columns * -(-m // HANDED) <= COUNTERS
    return normed and columns * m <= NORMED and m % 8 == 0


def _needs(step: DeviceStep, cells: int) -> tuple[int, int]:
    w, x, ids = step.src[0], step.src[1], step.src[3]
    assert w is not None and x is not None and ids is not None
    return act_bytes(form_of(step), x.shape[-1], math.prod(x.shape[:-1])), 4 * (math.prod(ids.shape) + w.shape[0] + 1)


LAUNCHES: dict[str, Launch] = {"moe_route": moe_route, "moe_sum": moe_sum, "mul_mat_id": mul_mat_id, "glu_mat_id": mul_mat_id}
NEEDS: dict[str, Needs] = {"mul_mat_id": _needs, "glu_mat_id": _needs}
