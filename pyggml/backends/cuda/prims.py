"""What Numba's CUDA target does not offer: instructions, each beside its meaning in Python.

Those that involve a whole warp exchange their operands with `_warp`, which every lane must reach. Memory is addressed in bytes from the
start of an array of any dtype, because weights are bytes and are loaded 16 at a time.
"""

from __future__ import annotations

import struct
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.intrinsics import FULL, SIMULATED, device, f32, i32, i64, instruction, u32

# ---- the simulator's side of memory and warps ---------------------------------------------------------------------------------

def _bytes(array: Any) -> np.ndarray:
    """The memory of an array inside a simulated kernel."""
    array = getattr(array, "_item", array)
    return getattr(array, "_ary", array).reshape(-1).view(np.uint8)


def _read(dtype: Any, count: int) -> Callable:
    size = np.dtype(dtype).itemsize * count

    def read(array, at):
        memory = _bytes(array)
        assert at % size == 0 or size > 16, f"a load of {size} bytes at {at} is not aligned"
        assert at >= 0 and at + size <= memory.size, f"a load of {size} bytes at {at} of {memory.size}"
        words = memory[at:at + size].view(dtype)
        return words[0] if count == 1 else words
    return read


class _Warps:
    """Lets the 32 lanes of each simulated warp of one block show each other a value."""

    def __init__(self) -> None:
        self.barriers: dict[int, threading.Barrier] = {}
        self.values: dict[tuple[int, int], list] = {}
        self.turns: dict[int, int] = {}
        self.lock = threading.Lock()


_blocks: Any = weakref.WeakKeyDictionary()
_blocks_lock = threading.Lock()


def _thread() -> Any:
    """The simulated thread that runs."""
    return threading.current_thread()


def _warp(value: Any) -> tuple[int, list]:
    """(lane, the values of all lanes); a lane that does not come makes the others fail after a while."""
    thread = _thread()
    with _blocks_lock:
        warps = _blocks.setdefault(thread._manager, _Warps())
    warp, lane = divmod(thread.thread_id, 32)
    with warps.lock:
        barrier = warps.barriers.setdefault(warp, threading.Barrier(32))
        turn = warps.turns[thread.thread_id] = warps.turns.get(thread.thread_id, 0) + 1
        values = warps.values.setdefault((warp, turn % 2), [None] * 32)     # two in turn: a fast lane may be one exchange ahead
    values[lane] = value
    barrier.wait(timeout=120)
    return lane, list(values)


# ---- lanes of a warp ------------------------------------------------------------------------------------------------------------

if SIMULATED:
    def shfl_xor(x, mask):
        lane, all_ = _warp(x)
        return all_[lane ^ mask]

    def shfl(x, source):
        return _warp(x)[1][source]

    def block_barrier():
        _thread().syncthreads()

    def warp_any(x):
        return any(_warp(bool(x))[1])
else:
    @device
    def shfl_xor(x, mask):
        """x of the lane whose number differs in the bits of mask."""
        return cuda.shfl_xor_sync(FULL, x, mask)

    @device
    def shfl(x, source):
        """x of lane `source`."""
        return cuda.shfl_sync(FULL, x, source)

    @device
    def block_barrier():
        """All threads of the block meet here, for device functions of other modules (where the simulator has no cuda.syncthreads)."""
        cuda.syncthreads()

    @device
    def warp_any(x):
        """Is x true in some lane?"""
        return cuda.any_sync(FULL, x)


@device
def warp_sum(x):
    x += shfl_xor(x, 16)
    x += shfl_xor(x, 8)
    x += shfl_xor(x, 4)
    x += shfl_xor(x, 2)
    return x + shfl_xor(x, 1)


@device
def warp_max(x):
    x = max(x, shfl_xor(x, 16))
    x = max(x, shfl_xor(x, 8))
    x = max(x, shfl_xor(x, 4))
    x = max(x, shfl_xor(x, 2))
    return max(x, shfl_xor(x, 1))


# ---- memory -----------------------------------------------------------------------------------------------------------------------
# stream*: weights, read once: past L1, so that the activations stay there. load*: through L1. Both only for memory that the
# kernel does not write; *_now for memory that it does.

def _load(form: str, size: str, dtype: Any, count: int, now: bool = False) -> Any:
    if count > 1:
        out = "{" + ", ".join(f"${n}" for n in range(count)) + "}"
        return instruction(f"ld.global{form}.v{count}.{size} {out}, [${count}];", (u32,) * count, ("global", i64), _read(dtype, count),
                           pure=not now, memory=now)
    if size == "u8":                          # asm operands are at least 16 bits wide; a 32-bit register takes any smaller load
        return instruction(f"ld.global{form}.u8 $0, [$1];", u32, ("global", i64), _read(dtype, 1), pure=not now, memory=now)
    return instruction(f"ld.global{form}.{size} $0, [$1];", u32, ("global", i64), _read(dtype, 1), pure=not now, memory=now)


stream128, load128, load128_now = (_load(form, "u32", "<u4", 4, now) for form, now in
                                   ((".nc.L1::no_allocate", False), (".nc", False), ("", True)))
stream64, load64 = (_load(form, "u32", "<u4", 2) for form in (".nc.L1::no_allocate", ".nc"))
stream32, load32 = (_load(form, "u32", "<u4", 1) for form in (".nc.L1::no_allocate", ".nc"))
stream16, load16 = (_load(form, "u16", "<u2", 1) for form in (".nc.L1::no_allocate", ".nc"))
stream8, load8 = (_load(form, "u8", "u1", 1) for form in (".nc.L1::no_allocate", ".nc"))


def _write_words(array, at, *words):
    _bytes(array)[at:at + 4 * len(words)].view("<u4")[:] = [int(w) & FULL for w in words]


def _write_small(dtype):
    def write(array, at, value):
        size = np.dtype(dtype).itemsize
        _bytes(array)[at:at + size].view(dtype)[0] = int(value) & ((1 << 8 * size) - 1)
    return write


store128 = instruction("st.global.v4.u32 [$0], {$1, $2, $3, $4};", None, ("global", i64, u32, u32, u32, u32), _write_words, memory=True)
store64 = instruction("st.global.v2.u32 [$0], {$1, $2};", None, ("global", i64, u32, u32), _write_words, memory=True)
store32 = instruction("st.global.u32 [$0], $1;", None, ("global", i64, u32), _write_words, memory=True)
store16 = instruction("st.global.u16 [$0], $1;", None, ("global", i64, u32), _write_small("<u2"), memory=True)
store8 = instruction("st.global.u8 [$0], $1;", None, ("global", i64, u32), _write_small("u1"), memory=True)
# what this thread wrote, and other threads before a barrier, is seen by all before what it writes next
fence = instruction("membar.gl;", None, (), lambda: None, memory=True)


def _count_up(array, at):
    memory = _bytes(array)[at:at + 4].view("<i4")
    memory[0] += 1
    return memory[0] - 1


# adds 1 to an int32; -> what was there
count_up = instruction("atom.global.add.u32 $0, [$1], 1;", i32, ("global", i64), _count_up, memory=True)
shared_store128 = instruction("st.shared.v4.u32 [$0], {$1, $2, $3, $4};", None, ("shared", i64, u32, u32, u32, u32), _write_words, memory=True)


def _copy16(shared, to, array, at, take):
    memory = _bytes(shared)
    memory[to:to + 16] = 0
    if take:
        assert at % 16 == 0
        memory[to:to + take] = _bytes(array)[at:at + take]


def _copy_ptx(cc: tuple[int, int]) -> str:
    if cc >= (8, 0):
        return "cp.async.cg.shared.global [$0], [$1], 16, $2;"
    return ("{ .reg .pred p; .reg .u32 a, b, c, d; setp.ne.u32 p, $2, 0; mov.u32 a, 0; mov.u32 b, 0; mov.u32 c, 0; mov.u32 d, 0; "
            "@p ld.global.v4.u32 {a, b, c, d}, [$1]; st.shared.v4.u32 [$0], {a, b, c, d}; }")


# 16 bytes from global to shared memory behind the kernel's back, or zeros where `take` is 0 instead of 16 (asynchronous from 8.0 on)
copy16 = instruction(_copy_ptx, None, ("shared", i64, "global", i64, i32), _copy16, memory=True)
copies_issued = instruction(lambda cc: "cp.async.commit_group;" if cc >= (8, 0) else "", None, (), lambda: None, memory=True)
copies_done = instruction(lambda cc: "cp.async.wait_group 0;" if cc >= (8, 0) else "", None, (), lambda: None, memory=True)
copies_done_but_1 = instruction(lambda cc: "cp.async.wait_group 1;" if cc >= (8, 0) else "", None, (), lambda: None, memory=True)


# ---- numbers ------------------------------------------------------------------------------------------------------------------------

def _signed_bytes(x: int) -> list[int]:
    return [(int(x) >> s & 255 ^ 128) - 128 for s in (0, 8, 16, 24)]


def _wrap(x: int) -> np.int32:
    return np.int32((int(x) + (1 << 31)) % (1 << 32) - (1 << 31))


def _half(bits: int) -> np.float32:
    return np.float32(np.uint16(int(bits) & 0xFFFF).view(np.float16))


def _half_bits(x) -> int:
    return int(np.float16(x).view(np.uint16))


def _prmt(a: int, b: int, selector: int) -> int:
    source = struct.pack("<II", int(a) & FULL, int(b) & FULL)
    picked = [source[int(selector) >> 4 * n & 7] if not int(selector) >> 4 * n & 8 else 255 * (source[int(selector) >> 4 * n & 7] >> 7)
              for n in range(4)]
    return int.from_bytes(bytes(picked), "little")


# c + the four products of the signed bytes of a and b
dp4a = instruction("dp4a.s32.s32 $0, $1, $2, $3;", i32, (u32, u32, i32),
                   lambda a, b, c: _wrap(int(c) + sum(x * y for x, y in zip(_signed_bytes(a), _signed_bytes(b), strict=True))))
# bytes picked from the eight of b:a by the nibbles of the selector
prmt = instruction("prmt.b32 $0, $1, $2, $3;", u32, (u32, u32, u32), _prmt)
bits_of = instruction("mov.b32 $0, $1;", u32, (f32,), lambda x: int(np.float32(x).view(np.uint32)))
float_of = instruction("mov.b32 $0, $1;", f32, (u32,), lambda x: np.uint32(int(x) & FULL).view(np.float32))
# a half float from the low 16 bits; the two of a word
half = instruction("{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l; }", f32, (u32,), _half)
halves = instruction("{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }", (f32, f32), (u32,),
                     lambda x: (_half(x), _half(int(x) >> 16)))
# two floats as half floats in a word, the first in its low 16 bits
half2 = instruction("{ .reg .b16 l, h; cvt.rn.f16.f32 l, $1; cvt.rn.f16.f32 h, $2; mov.b32 $0, {l, h}; }", u32, (f32, f32),
                    lambda lo, hi: _half_bits(lo) | _half_bits(hi) << 16)
# nearest integer, halves to even
round_int = instruction("cvt.rni.s32.f32 $0, $1;", i32, (f32,), lambda x: np.int32(np.rint(x)))
mul_rn = instruction("mul.rn.f32 $0, $1, $2;", f32, (f32, f32), lambda a, b: np.float32(a) * np.float32(b))     # never fused
add_rn = instruction("add.rn.f32 $0, $1, $2;", f32, (f32, f32), lambda a, b: np.float32(a) + np.float32(b))


exp2 = instruction("ex2.approx.ftz.f32 $0, $1;", f32, (f32,), lambda x: np.exp2(np.float32(x)))
LOG2_E = 1.4426950408889634


# ---- tensor cores -------------------------------------------------------------------------------------------------------------------
# Fragments of m16n8k16, for lane 4g + t: a is (16, 16): rows g, g + 8, columns 2t, 2t + 1 then 8 on; b is (16, 8): the same with
# rows for columns and column g; c is (16, 8): row g columns 2t, 2t + 1, then row g + 8.

def _product_of_warp(words: list) -> np.ndarray:
    """A B of the fragments (a0 .. a3, b0, b1) of 32 lanes: float32 (16, 8)."""
    both = np.array([[int(w) & FULL for w in lane] for lane in words], np.uint32).view(np.float16).reshape(8, 4, 6, 2).astype(np.float32)
    a = both[:, :, :4].reshape(8, 4, 2, 2, 2).transpose(3, 0, 2, 1, 4).reshape(16, 16)      # (g, t, columns 8 on, rows 8 on, low/high)
    return a @ both[:, :, 4:].transpose(2, 1, 3, 0).reshape(16, 8)


_last: tuple[Any, Any] = None, None             # the operands of a warp, and their product: lanes.py gives all of its lanes the same list


def _mma(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1):
    global _last
    lane, all_ = _warp((a0, a1, a2, a3, b0, b1))
    if _last[0] is not all_:
        _last = all_, _product_of_warp(all_)
    g, t = divmod(lane, 4)
    d = _last[1][g::8, 2 * t:2 * t + 2]
    return c0 + d[0, 0], c1 + d[0, 1], c2 + d[1, 0], c3 + d[1, 1]


def _mma_ptx(cc: tuple[int, int]) -> str:
    if cc >= (8, 0):
        return ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};")
    half_ = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"
    return (f"{{ .reg .f32 w, x, y, z; {half_} {{w, x, y, z}}, {{$8, $9}}, {{$12}}, {{$4, $5, $6, $7}}; "
            f"{half_} {{$0, $1, $2, $3}}, {{$10, $11}}, {{$13}}, {{w, x, y, z}}; }}")


mma = instruction(_mma_ptx, (f32, f32, f32, f32), (f32, f32, f32, f32, u32, u32, u32, u32, u32, u32), _mma, warp=True)


def _ldmatrix(shared, at):
    lane, all_ = _warp(at)
    memory = _bytes(shared)
    g, t = divmod(lane, 4)
    return tuple(int(memory[all_[8 * m + g] + 4 * t:][:4].view("<u4")[0]) for m in range(4))


# four 8 x 8 matrices of half floats from shared memory: lane l points at row l % 8 of matrix l / 8, and gets a word of each
ldmatrix = instruction("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", (u32, u32, u32, u32), ("shared", i64), _ldmatrix,
                       memory=True, warp=True)
