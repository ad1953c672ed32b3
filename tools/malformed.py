#!/usr/bin/env python3
"""Malformed GGUF files, and odd ones that are legal: a table of cases, each with what a reader must say.

    python tools/malformed.py FOLDER      writes every case as a file: "bad_" invalid, "nan_" with a number that is not finite, which only a
                                          look at every block finds, "ok_" legal, "any_" may be either, but is not to do harm

Files are put together here byte by byte, independent of pyggml's writer. The families follow the ways in which GGUF readers
have failed: lengths and counts that wrap or allocate, dimensions, alignment, offsets, truncation, text, nesting, byte order.
"""

from __future__ import annotations

import argparse
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
T_F32, T_F16, T_Q4_0, T_Q4_K = 0, 1, 2, 12
# Weights and bytes of a block, by type; and the types that were removed
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36), 10: (256, 84), 11: (256, 110),
          12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50),
          20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8),
          29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18)}
REMOVED = (4, 5, 31, 32, 33, 36, 37, 38)
HUGE = (2 ** 31, 2 ** 32 - 1, 2 ** 32, 2 ** 61, 2 ** 63 - 1, 2 ** 63, 2 ** 64 - 8, 2 ** 64 - 1)


class Case(NamedTuple):
    name: str
    data: bytes
    says: str = ""          # for a malformed file: part of the message; "" for a legal one


class Maker:
    """Builds the parts of a file of one version and byte order."""

    def __init__(self, order: str = "<", version: int = 3) -> None:
        self.order, self.version = order, version
        self.length_code, self.prefix = ("I", 4) if version == 1 else ("Q", 8)

    def pack(self, codes: str, *values: float) -> bytes:
        return struct.pack(self.order + codes, *values)

    def length(self, n: int) -> bytes:
        return self.pack(self.length_code, n)

    def string(self, text: str | bytes, length: int | None = None) -> bytes:
        data = text.encode() if isinstance(text, str) else text
        return self.length(len(data) if length is None else length) + data

    def kv(self, key: str | bytes, kind: int, value: bytes) -> bytes:
        return self.string(key) + self.pack("I", kind) + value

    def array(self, element: int, n: int, data: bytes) -> bytes:
        return self.pack("I", element) + self.length(n) + data

    def info(self, name: str | bytes = "a", dims: tuple[int, ...] = (8,), kind: int = T_F32, offset: int = 0,
             n_dims: int | None = None) -> bytes:
        dims_bytes = b"".join(self.length(d) for d in dims)
        return self.string(name) + self.pack("I", len(dims) if n_dims is None else n_dims) + dims_bytes + self.pack("IQ", kind, offset)

    def file(self, kvs: tuple[bytes, ...] = (), infos: tuple[bytes, ...] = (), data: bytes = b"", *, align: int = 32,
             magic: bytes = b"GGUF", n_kv: int | None = None, n_tensors: int | None = None, tail: bool = True) -> bytes:
        head = magic + self.pack("I", self.version) + self.length(len(infos) if n_tensors is None else n_tensors)
        head += self.length(len(kvs) if n_kv is None else n_kv) + b"".join(kvs) + b"".join(infos)
        return head + (bytes(-len(head) % align) + data if tail else b"")


M = Maker()
ARCH = M.kv("general.architecture", STR, M.string("llama"))
DATA = bytes(range(32))


def header_cases() -> Iterator[Case]:
    good = M.file((ARCH,), (M.info(),), DATA)
    for n in (0, 1, 3, 4, 5, 7, 8, 12, 16, 20, 23):
        yield Case(f"header_cut_{n}", good[:n], "")._replace(says="bytes" if n else "empty")
    yield Case("magic_lower", b"gguf" + good[4:], "not a GGUF file")
    yield Case("magic_reversed", b"FUGG" + good[4:], "magic is backwards")
    yield Case("magic_zip_inside", b"\0GGUF" + good[5:], "not a GGUF file, it starts with b'\\x00GGU'")
    yield Case("body_of_version_3_as_1", good[:4] + struct.pack("<I", 1) + good[8:], "NUL")
    yield Case("order_of_version_only", good[:4] + struct.pack(">I", 3) + good[8:], "count is")
    yield Case("order_of_body_only", Maker(">").file((ARCH,), (M.info(),), DATA)[:4] + struct.pack("<I", 3)
               + Maker(">").file((ARCH,), (M.info(),), DATA)[8:], "count is")
    for version in (0, 4, 5, 99, 0xFFFF, 0x30000, 0x3000300, 0x7FFFFFFF, 0x80000003, 0xFFFFFFFF):
        yield Case(f"version_{version:x}", M.file(magic=b"GGUF" + struct.pack("<I", version))[:8] + good[8:], "version is")
    for n in HUGE:
        yield Case(f"tensor_count_{n:x}", M.file((ARCH,), (M.info(),), DATA, n_tensors=n), "tensor count is")
        yield Case(f"key_count_{n:x}", M.file((ARCH,), (M.info(),), DATA, n_kv=n), "key count is")
    for n in (2, 10, 1000):
        yield Case(f"tensor_count_more_{n}", M.file((ARCH,), (M.info(),), DATA, n_tensors=n), "offset")
        yield Case(f"key_count_more_{n}", M.file((ARCH,), (M.info(),), DATA, n_kv=n), "offset")
    yield Case("key_count_wrap_48", M.file((ARCH,), n_kv=2 ** 64 // 48 + 1), "key count is")
    yield Case("tensor_count_wrap_280", M.file((ARCH,), n_tensors=2 ** 64 // 280 + 1), "tensor count is")


def text_cases() -> Iterator[Case]:
    for n in HUGE:
        yield Case(f"key_length_{n:x}", M.file((M.string("k", n) + M.pack("IB", U8, 1),)), "length of the key is")
        yield Case(f"string_length_{n:x}", M.file((M.kv("k", STR, M.string("v", n)),)), "length of the string is")
        yield Case(f"name_length_{n:x}", M.file((), (M.string("n", n) + M.pack("IQIQ", 1, 8, 0, 0),), DATA), "length of the tensor name is")
        strings = M.array(STR, 2, M.string("a") + M.string("b", n))
        yield Case(f"array_string_length_{n:x}", M.file((M.kv("k", ARR, strings),)), "length of a string of the array is")
    yield Case("string_length_one_more", M.file((M.kv("k", STR, M.string("v", 2)),), tail=False), "length of the string is 2")
    yield Case("key_empty", M.file((M.kv("", U8, b"\1"),)), "the key is empty")
    yield Case("key_nul", M.file((M.kv("a\0b", U8, b"\1"),)), "NUL")
    yield Case("key_not_utf8", M.file((M.kv(b"a\xff", U8, b"\1"),)), "not UTF-8")
    yield Case("key_surrogate", M.file((M.kv(b"a\xed\xa0\x80", U8, b"\1"),)), "not UTF-8")
    yield Case("key_too_long", M.file((M.kv("k" * 65536, U8, b"\1"),)), "length of the key is 65536 (limit 65535)")
    yield Case("keys_too_many", M.file((M.kv("k", U8, b"\1"),), n_kv=1 << 18, data=bytes(4 << 20)), f"key count is {1 << 18} (limit {1 << 17})")
    yield Case("string_too_long", M.file((M.kv("k", STR, M.string("v" * ((32 << 20) + 1))),)), "length of the string is 33554433 (limit 33554432)")
    yield Case("key_twice", M.file((M.kv("k", U8, b"\1"), M.kv("k", U8, b"\1"))), "twice")
    yield Case("alignment_twice", M.file(tuple(M.kv("general.alignment", U32, M.pack("I", a)) for a in (32, 64))), "twice")
    yield Case("name_empty", M.file((), (M.info(""),), DATA), "the tensor name is empty")
    yield Case("name_nul", M.file((), (M.info("a\0b"),), DATA), "NUL")
    yield Case("name_not_utf8", M.file((), (M.info(b"\x80"),), DATA), "not UTF-8")
    yield Case("key_overlong", M.file((M.kv(b"\xc0\x80", U8, b"\1"),)), "not UTF-8 (byte 0xc0)")
    yield Case("name_too_long_in_bytes", M.file((), (M.info("\u00e9" * 33),), DATA), "length of the tensor name is 66 (limit 64)")
    yield Case("name_too_long", M.file((), (M.info("n" * 65),), DATA), "length of the tensor name is 65 (limit 64)")
    yield Case("name_twice", M.file((), (M.info(), M.info(offset=32)), DATA * 2), "twice")


def value_cases() -> Iterator[Case]:
    for kind in (13, 14, 255, 2 ** 31, 2 ** 32 - 1):
        yield Case(f"value_type_{kind:x}", M.file((M.kv("k", kind, bytes(16)),)), f"value type is {kind} (limit 12)")
        yield Case(f"element_type_{kind:x}", M.file((M.kv("k", ARR, M.array(kind, 1, bytes(16))),)), f"element type of the array is {kind}")
    for value in (2, 128, 255):
        yield Case(f"bool_{value}", M.file((M.kv("k", BOOL, bytes([value])),)), f"bool is {value}")
        yield Case(f"bool_in_array_{value}", M.file((M.kv("k", ARR, M.array(BOOL, 3, bytes([0, 1, value]))),)), "bool 2 of the array")
    for kind, size in ((U8, 1), (U16, 2), (U32, 4), (F32, 4), (U64, 8), (F64, 8), (STR, 8), (ARR, 12)):
        for n in (*HUGE, 2 ** 64 // size + 1 if size > 1 else 2 ** 62):
            yield Case(f"array_length_{kind}_{n:x}", M.file((M.kv("k", ARR, M.array(kind, n, bytes(24))),)), "length of the array is")
        yield Case(f"array_cut_{kind}", M.file((M.kv("k", ARR, M.array(kind, 3, bytes(3 * size - 1))),), tail=False), "array")
    for depth in (65, 66, 1000, 100_000):
        nested = M.array(ARR, 1, b"") * (depth - 1) + M.array(U8, 1, b"\1")
        yield Case(f"nested_{depth}", M.file((M.kv("k", ARR, nested),)), "nested 65 deep (limit 64)")
    for outer, inner in ((65537, 0), (300, 300)):
        arrays = M.array(ARR, inner, M.array(U8, 0, b"") * inner) if inner else M.array(U8, 0, b"")
        yield Case(f"nested_wide_{outer}_{inner}", M.file((M.kv("k", ARR, M.array(ARR, outer, arrays * outer)),)), "(limit 65536)")
    for name, inner, says in (("bool", M.array(BOOL, 1, b"\2"), "bool 0 of the array is 2"), ("type", M.array(77, 1, b"\0"), "is 77 (limit 12)"),
                              ("string", M.array(STR, 1, M.string("a", 2 ** 63)), "length of a string of the array"),
                              ("empty", M.array(13, 0, b""), "is 13 (limit 12)")):
        for depth in (1, 2, 63):
            nested = M.array(ARR, 1, b"") * depth + inner
            yield Case(f"nested_{name}_inside_{depth}", M.file((M.kv("k", ARR, nested),)), says)
    yield Case("nested_huge_inside", M.file((M.kv("k", ARR, M.array(ARR, 1, M.array(U64, 2 ** 61, bytes(8)))),)), "length of the array is")


def tensor_cases() -> Iterator[Case]:
    many = M.file((), (M.info(),), DATA + bytes(8 << 20), n_tensors=1 << 18)
    yield Case("tensors_too_many", many, f"tensor count is {1 << 18} (limit {1 << 17})")
    for n in (5, 8, 9, 1000, 2 ** 31, 2 ** 32 - 1):
        yield Case(f"n_dims_{n:x}", M.file((), (M.info(n_dims=n),), DATA * 3), f"n_dims is {n} (limit 4)")
    for dims in ((2 ** 63,), (2 ** 64 - 1,), (2 ** 32, 2 ** 32), (2 ** 31, 2 ** 31, 2 ** 31), (2 ** 62, 3), (2 ** 16,) * 4,
                 (0, 2 ** 62, 4), (2 ** 32, 2 ** 32, 0)):
        yield Case(f"dims_wrap_{'x'.join(f'{d:x}' for d in dims)}", M.file((), (M.info(dims=dims),), DATA), "multiply to")
    for dims, kind in (((2 ** 61 + 8,), T_F32), ((2 ** 61,), T_F32), ((2 ** 62, 1), T_F16), ((2 ** 40, 2 ** 20), T_F32), ((9,), T_F32),
                       ((8, 2), T_F32), (((2 ** 64 // 18 + 1) // 32 * 32,), T_Q4_0), ((1 << 62,), T_Q4_0), ((2 ** 63 - 32,), T_Q4_0)):
        name = "x".join(f"{d:x}" for d in dims)
        says = "multiply to" if math.prod(dims) >= 2 ** 60 else "past the end"
        yield Case(f"data_past_end_{kind}_{name}", M.file((), (M.info(dims=dims, kind=kind),), DATA), says)
    for row, kind, block in ((1, T_Q4_0, 32), (33, T_Q4_0, 32), (16, T_Q4_0, 32), (32, T_Q4_K, 256), (255, T_Q4_K, 256)):
        yield Case(f"row_{row}_of_{block}", M.file((), (M.info(dims=(row, block), kind=kind),), bytes(1 << 16)), "do not divide into")
    for kind, (block, size) in BLOCKS.items():
        yield Case(f"one_byte_short_{kind}", M.file((), (M.info(dims=(block, 3), kind=kind),), bytes(3 * size - 1)), "ends 1 bytes past the end")
        if block > 1:
            for row in (block // 2, block + 1, 3 * block - 1):
                yield Case(f"row_{row}_of_type_{kind}", M.file((), (M.info(dims=(row, block), kind=kind),), bytes(1 << 18)), f"blocks of {block}")
    for kind in (65536, 2 ** 24, 2 ** 31, 2 ** 32 - 1):
        yield Case(f"type_{kind:x}", M.file((), (M.info(kind=kind),), DATA), f"type is {kind} (limit 65535)")
    for offset in (1, 4, 16, 31, 2 ** 63 + 1, 2 ** 64 - 1):
        yield Case(f"offset_unaligned_{offset:x}", M.file((), (M.info(offset=offset),), DATA * 4), "not a multiple of the alignment 32")
    for offset in (32, 1 << 20, 2 ** 32, 2 ** 63 - 32, 2 ** 63, 2 ** 64 - 32):
        yield Case(f"offset_past_end_{offset:x}", M.file((), (M.info(offset=offset),), DATA), "past the end")
    yield Case("offset_zero_size_past_end", M.file((), (M.info(dims=(0,), offset=2 ** 40),), DATA), "past the end")
    yield Case("offset_opaque_past_end", M.file((), (M.info(kind=99, offset=64),), DATA), "past the end")
    yield Case("overlap_same", M.file((), (M.info("a"), M.info("b")), DATA * 2), "overlaps")
    yield Case("overlap_part", M.file((), (M.info("a", (16,)), M.info("b", offset=32)), DATA * 2), "overlaps")
    yield Case("overlap_inside", M.file((), (M.info("a", (64,)), M.info("b", offset=32)), DATA * 8), "overlaps")
    yield Case("overlap_far", M.file((), (M.info("a", (64,)), M.info("b", (0,), offset=32), M.info("c", offset=64)), DATA * 8), "overlaps")
    infos = tuple(M.info(str(i), (2 ** 59,), offset=0) for i in range(8))
    yield Case("sizes_sum_wrap", M.file((), infos, DATA), "past the end")
    yield Case("no_data", M.file((), (M.info(),), b""), "past the end")
    yield Case("no_data_no_padding", M.file((), (M.info(),), tail=False), "past the end")


def alignment_cases() -> Iterator[Case]:
    for a in (0, 3, 5, 7, 12, 31, 33, 1 << 17, 2 ** 31, 2 ** 32 - 1):
        yield Case(f"alignment_{a:x}", M.file((M.kv("general.alignment", U32, M.pack("I", a)),), (M.info(),), DATA), f"alignment is {a}")
    wide = M.kv("general.alignment", U32, M.pack("I", 4096))
    yield Case("alignment_wider_than_padding", M.file((wide,), (M.info(),), DATA), "past the end")
    closer = M.file((wide,), (M.info(), M.info("b", offset=32)), DATA * 2, align=4096)
    yield Case("alignment_wider_than_offset", closer, "multiple of the alignment 4096")
    for kind, value in ((U64, M.pack("Q", 32)), (I32, M.pack("i", 32)), (U8, b"\x20"), (F32, M.pack("f", 32)), (STR, M.string("32")),
                        (BOOL, b"\1"), (ARR, M.array(U32, 1, M.pack("I", 32)))):
        yield Case(f"alignment_type_{kind}", M.file((M.kv("general.alignment", kind, value),), (M.info(),), DATA), "must be u32")


def truncation_cases() -> Iterator[Case]:
    kvs = (ARCH, M.kv("t", ARR, M.array(STR, 3, M.string("aa") + M.string("b") + M.string(""))), M.kv("f", ARR, M.array(F32, 4, bytes(16))),
           M.kv("d", F64, bytes(8)))
    good = M.file(kvs, (M.info("a", (8,)), M.info("b", (4, 2), offset=32)), DATA * 2)
    for n in range(24, len(good)):
        yield Case(f"cut_{n}", good[:n], "bytes")


# ---- every field at every boundary ----------------------------------------------------------------------------------------------

EVERY_FORM = [Maker(order, version) for order, version in (("<", 1), ("<", 2), ("<", 3), (">", 2), (">", 3))]
BOUNDARIES = (*range(10), 12, 13, 31, 33, 63, 64, 65, 127, 128, 255, 256, 65535, 65536, 2 ** 24, 2 ** 29, 2 ** 30, 2 ** 31 - 1, 2 ** 31,
              2 ** 32 - 1, 2 ** 32, 2 ** 32 + 1, 2 ** 48, 2 ** 59, 2 ** 60, 2 ** 61, 2 ** 62, 2 ** 63 - 1, 2 ** 63, 2 ** 63 + 1,
              2 ** 64 - 32, 2 ** 64 - 8, 2 ** 64 - 1, 2 ** 64 // 24 + 1, 2 ** 64 // 18 + 1)


def sample(m: Maker) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """A sound file with every kind of value, and its fields: name -> (offset, bytes)."""
    nested = m.array(ARR, 2, m.array(U8, 2, b"\1\2") + m.array(STR, 1, m.string("q")))
    values = {"s": (STR, m.string("text")), "n": (U32, m.pack("I", 7)), "b": (BOOL, b"\1"), "d": (F64, bytes(8)),
              "u": (ARR, m.array(U16, 3, bytes(6))), "f": (ARR, m.array(BOOL, 2, b"\0\1")),
              "t": (ARR, m.array(STR, 2, m.string("x") + m.string("yz"))), "v": (ARR, nested),
              "general.alignment": (U32, m.pack("I", 32))}
    infos = {"a": m.info("a", (8, 2)), "q": m.info("q", (32, 1, 1, 2), T_Q4_0, 64)}
    data = m.file(tuple(m.kv(key, kind, value) for key, (kind, value) in values.items()), tuple(infos.values()), DATA * 2 + bytes(64))
    w = m.prefix
    fields = {"magic": (0, 4), "version": (4, 4), "tensor count": (8, w), "key count": (8 + w, w)}
    at = 8 + 2 * w
    for key, (kind, value) in values.items():
        fields[f"{key}: key length"], fields[f"{key}: type"] = (at, w), (at + w + len(key), 4)
        at += w + len(key) + 4
        if kind == ARR:
            fields[f"{key}: element type"], fields[f"{key}: length"], fields[f"{key}: first"] = (at, 4), (at + 4, w), (at + 4 + w, 4)
        fields[f"{key}: value"] = (at, min(len(value), w))
        at += len(value)
    for name, info in infos.items():
        n = 2 if name == "a" else 4
        at += w
        fields[f"{name}: name length"], fields[f"{name}: n_dims"] = (at - w, w), (at + 1, 4)
        fields |= {f"{name}: dimension {i}": (at + 5 + w * i, w) for i in range(n)}
        fields[f"{name}: type"], fields[f"{name}: offset"] = (at + 5 + w * n, 4), (at + 9 + w * n, 8)
        at += len(info) - w
    return data, fields


def boundary_cases() -> Iterator[Case]:
    """One field of a sound file at each of its boundaries: refused, or, where the value is as good as another, read."""
    for m in EVERY_FORM:
        data, fields = sample(m)
        for name, (at, width) in fields.items():
            for value in BOUNDARIES:
                field = value.to_bytes(8, "little")[:width] if m.order == "<" else value.to_bytes(8, "big")[8 - width:]
                if value < 256 ** width and field != data[at:at + width]:
                    yield Case(f"field_v{m.version}{'le' if m.order == '<' else 'be'}_{name.replace(': ', '_').replace(' ', '_')}_{value:x}",
                               data[:at] + field + data[at + width:])


def every_cut() -> Iterator[Case]:
    for m in EVERY_FORM:
        data, _ = sample(m)
        for n in range(9, len(data) - 32 + 4):              # the last tensor has 36 bytes
            yield Case(f"cut_v{m.version}{'le' if m.order == '<' else 'be'}_{n}", data[:n], "bytes")


# ---- numbers that no sound model holds: read, and refused by `check` --------------------------------------------------------------

# Where a block has its floating point numbers, by type, and their struct codes (f16 as H, bf16 as h, e8m0 as B); IQ1_M spreads one over words
SCALES = {**dict.fromkeys((1, 2, 6, 8, 16, 17, 18, 19, 20, 21, 22, 23, 41, 42), "0H"), **dict.fromkeys((3, 7, 9, 12, 13), "0H 2H"),
          **dict.fromkeys((0, 15), "0I"), 10: "80H 82H", 11: "108H", 14: "208H", 28: "0Q", 30: "0h", 34: "52H", 35: "64H", 39: "0B"}
PATTERNS = {"H": {"nan": 0x7E00, "nan_signalling": 0x7C01, "nan_negative": 0xFFFF, "infinity": 0x7C00, "infinity_negative": 0xFC00},
            "h": {"nan": 0x7FC0, "nan_negative": -1, "infinity": 0x7F80, "infinity_negative": -0x80}, "B": {"nan": 255},
            "I": {"nan": 0x7FC00000, "nan_signalling": 0x7F800001, "infinity": 0x7F800000, "infinity_negative": 0xFF800000},
            "Q": {"nan": 0x7FF8 << 48, "infinity": 0x7FF << 52}}
IQ1_M = 29               # its scales are bytes, so that their order is the same in either byte order


def numeric_cases() -> Iterator[Case]:
    """One number of one block, the last of a tensor's six, is not finite; `says` is what `check` says."""
    for order in "<>":
        m = Maker(order)
        for kind, places in {**SCALES, IQ1_M: "48H"}.items():
            block, size = BLOCKS[kind]
            for place in places.split():
                at, code = 5 * size + int(place[:-1]), place[-1]
                for name, bits in PATTERNS[code].items():
                    data = bytearray(6 * size)
                    if kind == IQ1_M:
                        struct.pack_into("<4H", data, at, *((bits >> 4 * i & 15) << 12 for i in range(4)))
                    else:
                        struct.pack_into(order + code, data, at, bits)
                    yield Case(f"number_{'le' if order == '<' else 'be'}_{kind}_{place}_{name}",
                               m.file((), (m.info("w", (3 * block, 2), kind),), bytes(data)), "is NaN" if name.startswith("nan") else "is infinity")


def foreign_cases() -> Iterator[Case]:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for name, data, says in (
            ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git-LFS pointer"),
            ("html", b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
            ("html_plain", b"\n<html>\n", "HTML page"),
            ("xml", b'<?xml version="1.0"?><Error/>', "XML document"),
            ("json", b'{"error": "not found"}', "JSON document"),
            ("zip", b"PK\x03\x04" + bytes(60), "ZIP archive"),
            ("pickle", b"\x80\x02}q\x00." + bytes(20), "pickle"),
            ("gzip", b"\x1f\x8b\x08" + bytes(30), "gzip"),
            ("safetensors", struct.pack("<Q", len(header)) + header + bytes(4), "safetensors"),
            ("lora", b"algg" + bytes(50), "LoRA adapter"),
            ("ggjt_big_endian", b"ggjt" + bytes(50), "big-endian machine"),
            ("bzip2", b"BZh91AY" + bytes(30), "bunzip2"),
            ("bom", b"\xef\xbb\xbf{}", "JSON document"),
            ("utf16", "hello".encode("utf-16"), "not a GGUF file"),
            ("numpy", b"\x93NUMPY" + bytes(50), "numpy"),
            ("empty", b"", "empty"),
            ("zeros", bytes(4096), "not a GGUF file"),
            ("text", b"hello world, this is text", "not a GGUF file")):
        yield Case(f"foreign_{name}", data, says)


def legal_cases() -> Iterator[Case]:
    for order, version in (("<", 1), ("<", 2), ("<", 3), (">", 2), (">", 3)):
        m = Maker(order, version)
        nested = m.array(U8, 1, b"\5") + m.array(STR, 1, m.string("q"))
        kvs = (m.kv("s", STR, m.string("text")), m.kv("a", ARR, m.array(STR, 2, m.string("x") + m.string("yz"))),
               m.kv("u", ARR, m.array(U16, 2, m.pack("HH", 1, 2))), m.kv("n", ARR, m.array(ARR, 2, nested)))
        name = f"version_{version}_{'le' if order == '<' else 'be'}"
        yield Case(name, m.file(kvs, (m.info(dims=(4, 2)),), m.pack("8f", *range(8))))
    yield Case("nothing", M.file(tail=False))
    yield Case("no_tensors_no_padding", M.file((ARCH,), tail=False))
    yield Case("nested_64", M.file((M.kv("k", ARR, M.array(ARR, 1, b"") * 63 + M.array(U8, 1, b"\1")),)))
    yield Case("empty_arrays", M.file(tuple(M.kv(f"k{t}", ARR, M.array(t, 0, b"")) for t in range(13))))
    yield Case("every_type", M.file(tuple(M.kv(f"k{t}", t, bytes(n)) for t, n in enumerate((1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8)))))
    yield Case("nan_values", M.file((M.kv("n", F32, M.pack("f", float("nan"))), M.kv("i", F64, M.pack("d", float("inf"))))))
    yield Case("value_not_utf8", M.file((M.kv("k", STR, M.string(b"a\xff\0b")), M.kv("a", ARR, M.array(STR, 1, M.string(b"\xc3"))))))
    yield Case("unicode_key", M.file((M.kv("schl\u00fcssel", U8, b"\1"),)))
    yield Case("long_key", M.file((M.kv("k" * 65535, U8, b"\1"),)))
    yield Case("name_64", M.file((), (M.info("n" * 64),), DATA))
    yield Case("scalar_tensor", M.file((), (M.info(dims=()),), DATA[:4]))
    yield Case("four_dims", M.file((), (M.info(dims=(2, 1, 2, 2)),), DATA))
    yield Case("zero_dim_inner", M.file((), (M.info(dims=(0, 4)), M.info("b")), DATA))
    yield Case("zero_dim_outer", M.file((), (M.info(dims=(32, 0), kind=T_Q4_0), M.info("b")), DATA))
    yield Case("zero_dim_at_end", M.file((), (M.info(), M.info("b", (0,), offset=32)), DATA))
    yield Case("zero_dim_unpadded_end", M.file((), (M.info(dims=(5,)), M.info("b", (0,), offset=32)), DATA[:20]))
    yield Case("no_tail_padding", M.file((), (M.info(dims=(5,)),), DATA[:20]))
    yield Case("unsorted", M.file((), (M.info("b", offset=32), M.info("a")), DATA * 2))
    yield Case("gap", M.file((), (M.info("a"), M.info("b", offset=128)), DATA * 5))
    yield Case("trailing", M.file((), (M.info(),), DATA * 9))
    for kind in (*REMOVED, 43, 99, 397, 1000, 65535):
        yield Case(f"unknown_type_{kind}", M.file((), (M.info("a", kind=kind), M.info("b", offset=32)), DATA * 2))
    for a in (8, 16, 64, 4096, 65536, 1, 2, 4, 24, 40):
        key = M.kv("general.alignment", U32, M.pack("I", a))
        infos = M.info("a"), M.info("b", offset=-(-32 // a) * a)
        yield Case(f"alignment_{a}", M.file((key,), infos, DATA + bytes(-32 % a) + DATA, align=a))
    strings = b"".join(M.string(str(i)) for i in range(100_000))
    yield Case("many_strings", M.file((M.kv("k", ARR, M.array(STR, 100_000, strings)),)))
    yield Case("many_keys", M.file(tuple(M.kv(f"k{i}", U8, b"\1") for i in range(5000))))
    wide = M.kv("k" * 65000, U8, b"\1"), *(M.kv(f"k{i}", U8, b"\1") for i in range(2000))
    yield Case("long_key_among_many", M.file(wide))
    yield Case("long_text", M.file((M.kv("k", STR, M.string("\U0001f600" + "a" * (4 << 20))), M.kv("b", STR, M.string(b"\xff" * (4 << 20))))))
    yield Case("many_short_strings", M.file((M.kv("k", ARR, M.array(STR, 500_000, M.string("ab") * 500_000)),)))
    gaps = tuple(M.info(f"t{i}", offset=96 * i) for i in range(2000))
    yield Case("many_gaps", M.file((), gaps, DATA * 6000))
    shown = M.kv("general.architecture", STR, M.string("a\0b\x1b[31m\u202e")), M.kv("n\x1b]0;x\x07", STR, M.string("x\r\ny"))
    yield Case("control_characters", M.file(shown, (M.info("\x1b[31m\u202e\x07"),), DATA))
    odd = (M.kv("general.architecture", U32, M.pack("I", 5)), M.kv("tokenizer.chat_template", ARR, M.array(STR, 1, M.string("x"))),
           M.kv("tokenizer.ggml.model", U8, b"\1"), M.kv("tokenizer.ggml.tokens", STR, M.string("x")), M.kv("split.no", STR, M.string("x")))
    yield Case("known_keys_of_other_types", M.file(odd, (M.info("token_embd.weight"),), DATA))
    odd = tuple(M.kv(key, ARR, M.array(U32, 2, bytes(8))) for key in (
        "general.architecture", "general.name", "general.type", "general.quantization_version", "split.no", "split.count", "split.tensors.count",
        "tokenizer.chat_template", *(f"tokenizer.ggml.{name}" for name in (
            "model", "pre", "tokens", "merges", "scores", "token_type", "bos_token_id", "add_bos_token"))))
    yield Case("known_keys_as_arrays", M.file(odd, (M.info("token_embd.weight", (4, 2)),), DATA))
    odd = (ARCH, M.kv("llama.block_count", U64, M.pack("Q", 2 ** 63)), M.kv("llama.attention.head_count", ARR, M.array(STR, 1, M.string("x"))),
           M.kv("llama.embedding_length", F64, M.pack("d", math.nan)), M.kv("llama.expert_count", I64, M.pack("q", -1)),
           M.kv("llama.expert_used_count", ARR, M.array(ARR, 1, M.array(U8, 1, b"\1"))))
    yield Case("known_keys_of_no_sense", M.file(odd, (M.info("blk.999999999.attn_q.weight"), M.info("blk.0.attn_q.weight", offset=32)), DATA * 2))
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    yield Case("many_endless_templates", M.file(tuple(M.kv(f"tokenizer.chat_template.{i}", STR, M.string(endless)) for i in range(8))))
    yield Case("many_tensors", M.file((), tuple(M.info(f"t{i}", offset=32 * i) for i in range(2000)), DATA * 2000))
    for kind, (block, size) in BLOCKS.items():
        yield Case(f"type_{kind}", M.file((), (M.info(dims=(2 * block, 3), kind=kind), M.info("z", (0, block), kind, -(-6 * size // 32) * 32)),
                                          bytes(6 * size)))
        big = Maker(">")
        yield Case(f"big_endian_type_{kind}", big.file((), (big.info(dims=(2 * block, 3), kind=kind),), bytes(6 * size)))
    extremes = struct.pack("<4H", 0x7BFF, 0xFBFF, 1, 0x8000) + bytes(24) + struct.pack("<4I", 0x7F7FFFFF, 0xFF7FFFFF, 1, 0x80000000)
    yield Case("finite_extremes", M.file((), (M.info(dims=(4,), kind=T_F16), M.info("b", (4,), offset=32)), extremes))
    yield Case("huge_empty_dims", M.file((), (M.info(dims=(0, 2 ** 40)), M.info("b")), DATA))
    yield Case("empty_tensors_in_one_place", M.file((), (*(M.info(f"e{i}", (0,)) for i in range(20)), M.info("b")), DATA))
    yield Case("first_behind_a_gap", M.file((), (M.info(offset=4096),), bytes(4096) + DATA))
    yield Case("table_backwards", M.file((), tuple(M.info(f"t{i}", offset=32 * i) for i in reversed(range(9))), DATA * 9))
    keys = ARCH, M.kv("general.alignment", U32, M.pack("I", 64))
    yield Case("alignment_behind_other_keys", M.file(keys, (M.info(), M.info("b", offset=64)), DATA * 3, align=64))
    yield Case("odd_characters_in_keys", M.file(tuple(M.kv(key, U8, b"\1") for key in (" ", "\n", "a=b:c", '"', "\U0001f511", "../x"))))
    yield Case("whole_file_twice", M.file((ARCH,), (M.info(),), DATA) * 2)
    yield Case("long_template", M.file((M.kv("tokenizer.chat_template", STR, M.string("x" * 900_000)),)))
    yield Case("name_of_64_bytes", M.file((), (M.info("\u00e9" * 32),), DATA))
    mixed = M.array(ARR, 0, b"") + M.array(STR, 1, M.string("x")) + M.array(BOOL, 1, b"\1")
    yield Case("mixed_nesting", M.file((M.kv("k", ARR, M.array(ARR, 3, mixed)),)))
    vocabulary = (M.kv("tokenizer.ggml.model", STR, M.string("llama")), M.kv("tokenizer.ggml.tokens", ARR, M.array(STR, 1, M.string("x"))))
    for n in (0, 2):
        sizes = tuple(M.kv(f"llama.{name}", ARR, M.array(U32, n, b"\xff" * 4 * n)) for name in (
            "vocab_size", "embedding_length", "block_count", "attention.head_count", "expert_used_count"))
        yield Case(f"sizes_of_{n}_numbers", M.file((ARCH, *vocabulary, *sizes), (M.info("token_embd.weight", (4, 2)),), DATA))
    yield Case("quantized", M.file((), (M.info("q", (32, 2), T_Q4_0),), bytes(36)))


INVALID = (header_cases, text_cases, value_cases, tensor_cases, alignment_cases, truncation_cases, foreign_cases)


def invalid() -> list[Case]:
    return [case for family in INVALID for case in family()]


def numeric() -> list[Case]:
    return list(numeric_cases())


def legal() -> list[Case]:
    return list(legal_cases())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write the files")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, cases in (("bad", invalid() + list(every_cut())), ("nan", numeric()), ("ok", legal()), ("any", list(boundary_cases()))):
        for case in cases:
            (folder / f"{prefix}_{case.name}.gguf").write_bytes(case.data)
        print(f"{len(cases)} files {prefix}_*.gguf")


if __name__ == "__main__":
    main()
