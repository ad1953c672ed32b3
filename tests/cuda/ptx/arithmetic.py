"""What opcodes compute: functions over arrays, and tables from an opcode to a Python expression of its operands."""

from __future__ import annotations

from typing import Any

import numpy as np

u8, i8, u16, u32, i32, u64, i64, f16, f32, f64 = (np.uint8, np.int8, np.uint16, np.uint32, np.int32, np.uint64, np.int64, np.float16, np.float32,
                                                  np.float64)
SIGNED = {1: i8, 2: np.int16, 4: i32, 8: i64}
UNSIGNED = {1: u8, 2: u16, 4: u32, 8: u64}
WIDER = {u16: u32, np.int16: i32, u32: u64, i32: i64}
FLOATS = (f16, f32, f64)


def flush(x: np.ndarray) -> np.ndarray:
    """.ftz: subnormal numbers become zeros of their sign."""
    bits = np.asarray(x, f32).view(u32)
    tiny = (bits & u32(0x7FFFFFFF)) - u32(1) < u32(0x007FFFFF)
    return np.where(tiny, bits & u32(0x80000000), bits).view(f32) if tiny.any() else x


def fma32(a, b, c):
    return (a.astype(f64) * b.astype(f64) + np.asarray(c).astype(f64)).astype(f32)


def fma64(a, b, c):
    return (np.longdouble(a) * np.longdouble(b) + np.longdouble(c)).astype(f64)


def high(a, b):
    """The upper half of a product of two integers."""
    if a.dtype.itemsize == 4:
        wide = WIDER[a.dtype.type]
        return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)
    products = [(int(x) * int(y)) >> 64 for x, y in zip(*np.broadcast_arrays(a, b), strict=True)]
    return np.array([p & (1 << 64) - 1 for p in products], u64).view(a.dtype)


def quotient(a, b):
    """Integer division as in C: towards zero. What a division by zero gives is not defined."""
    a, b = np.broadcast_arrays(a, np.where(b == 0, np.ones_like(b), b))
    q = a // b
    return q + ((q < 0) & (q * b != a)).astype(q.dtype) if a.dtype.kind == "i" else q


def remainder(a, b):
    b = np.where(b == 0, np.ones_like(b), b)
    return a - quotient(a, b) * b


def clamped(shift, bits):
    return np.minimum(shift, bits).astype(i64)


def shl(a, n):
    bits = 8 * a.dtype.itemsize
    n = clamped(n, bits)
    return np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), np.zeros_like(a))


def shr(a, n):
    bits = 8 * a.dtype.itemsize
    n = clamped(n, bits)
    shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n < bits, shifted, np.zeros_like(a))


def bfi(a, b, position, length):
    """Bits 0 .. length - 1 of a put into b from `position` on."""
    bits = 8 * a.dtype.itemsize
    position, length = int(position) & 255, int(length) & 255
    mask = ((1 << length) - 1 << position) & ((1 << bits) - 1)
    kind = a.dtype.type
    return (shl(a, np.asarray(position, u32)) & kind(mask)) | (b & kind(~mask & (1 << bits) - 1))


def prmt(a, b, selector):
    """Four bytes picked from b:a; a selector's fourth bit spreads the sign of the byte picked."""
    both = np.broadcast_arrays(a, b, selector)
    pool = np.stack([both[i] >> u32(8 * n) & u32(255) for i in range(2) for n in range(4)])
    out = np.zeros(pool.shape[1:], u32)
    for n in range(4):
        nibble = both[2] >> u32(4 * n) & u32(15)
        byte = np.take_along_axis(pool, (nibble & u32(7)).astype(i64)[None], 0)[0]
        byte = np.where(nibble & u32(8), np.where(byte & u32(128), u32(255), u32(0)), byte)
        out |= byte << u32(8 * n)
    return out


def dp4a(a, b, c, kind_a, kind_b):
    total = np.asarray(c).astype(i64)
    for n in range(4):
        x, y = ((v >> u32(8 * n) & u32(255)).astype(u8).view(k).astype(i64) for v, k in ((a, kind_a), (b, kind_b)))
        total = total + x * y
    return total.astype(i32)


def leading_zeros(a):
    return np.array([8 * a.dtype.itemsize - int(x).bit_length() for x in a], u32)


def to_integer(x, kind, rounding):
    """A float to an integer: out of range to the nearest one, NaN to zero."""
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](np.asarray(x, f64))
    low, high_ = np.iinfo(kind).min, np.iinfo(kind).max
    out = np.where(np.isnan(x), 0, np.clip(rounded, float(low), float(high_)))
    return np.where(out >= float(high_), high_, out.astype(kind)).astype(kind)


COMPARE: dict[str, str] = {
    "eq": "{0} == {1}", "ne": "({0} < {1}) | ({0} > {1})", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}",
    "lo": "{0} < {1}", "ls": "{0} <= {1}", "hi": "{0} > {1}", "hs": "{0} >= {1}",
    "equ": "~(({0} < {1}) | ({0} > {1}))", "neu": "{0} != {1}", "ltu": "~({0} >= {1})", "leu": "~({0} > {1})", "gtu": "~({0} <= {1})",
    "geu": "~({0} < {1})", "num": "~(isnan({0}) | isnan({1}))", "nan": "isnan({0}) | isnan({1})",
}
INTEGER = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul.lo": "{0} * {1}", "mad.lo": "{0} * {1} + {2}", "mul.hi": "high({0}, {1})",
    "mad.hi": "high({0}, {1}) + {2}", "div": "quotient({0}, {1})", "rem": "remainder({0}, {1})", "neg": "-{0}", "abs": "absolute({0})",
    "min": "minimum({0}, {1})", "max": "maximum({0}, {1})", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}",
    "clz": "leading_zeros({0})",
}
FLOAT = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "neg": "-{0}", "abs": "absolute({0})", "min": "fmin({0}, {1})",
    "max": "fmax({0}, {1})", "sqrt": "sqrt({0})", "rcp": "1 / {0}", "rsqrt": "1 / sqrt({0})", "ex2": "exp2({0})", "lg2": "log2({0})",
}
# (a, b, c, carry in) as 64-bit numbers -> a number whose 33rd bit is the carry out
CARRY = {
    "add": "{0} + {1}", "addc": "{0} + {1} + S.carry", "sub": "{0} - {1}", "subc": "{0} - {1} - S.carry",
    "mad.lo": "({0} * {1} & u64(0xFFFFFFFF)) + {2}", "madc.lo": "({0} * {1} & u64(0xFFFFFFFF)) + {2} + S.carry",
    "mad.hi": "({0} * {1} >> u64(32)) + {2}", "madc.hi": "({0} * {1} >> u64(32)) + {2} + S.carry",
}
# what such expressions may use
NAMES: dict[str, Any] = {
    function.__name__: function for function in (flush, fma32, fma64, high, quotient, remainder, shl, shr, bfi, prmt, dp4a, leading_zeros, to_integer)
} | {name: getattr(np, name) for name in ("where", "minimum", "maximum", "fmin", "fmax", "absolute", "sqrt", "exp2", "log2", "isnan", "flatnonzero",
                                          "stack", "rint", "trunc", "floor", "ceil")} \
  | {"u8": u8, "i8": i8, "u32": u32, "i32": i32, "u64": u64, "i64": i64}
