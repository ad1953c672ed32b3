"""Runs one step's launch in the simulator and compares it with the op table's numpy reference."""

from __future__ import annotations

import importlib
from functools import cache

import numpy as np
import pytest

from pyggml import quants

pytest.importorskip("numba.cuda", reason="needs the extra: pip install 'pyggml[cuda]'")

from pyggml.backends.cuda import layout  # noqa: E402
from pyggml.backends.cuda.base import DeviceStep, DeviceView, Scratch  # noqa: E402

FAMILIES = ("basic", "norm", "rope", "matmul", "attention", "moe", "sample")
NAMES = {np.dtype(np.float32): "F32", np.dtype(np.int32): "I32", np.dtype(np.float16): "F16", np.dtype(np.uint8): "I8"}
GARBAGE = 0x7B                                  # fills memory that a step must not rely on


@cache
def tables():
    launches, needs = {}, {}
    for family in FAMILIES:
        module = importlib.import_module(f"pyggml.backends.cuda.{family}")
        launches |= module.LAUNCHES
        needs |= module.NEEDS
    return launches, needs


def view(array: np.ndarray, slot: int = -1) -> DeviceView:
    return DeviceView(array.reshape(-1), NAMES[array.dtype], array.shape, slot)


def weight(w: np.ndarray, type_name: str) -> tuple[DeviceView, np.ndarray]:
    """A re-laid weight of this type, and the numbers that it stands for."""
    blocks = quants.quantize(w, type_name)
    memory = layout.relay_numpy(type_name, w.shape, blocks)
    if type_name in layout.FLOATS:
        memory = memory.view(layout.FLOATS[type_name])
    relaid = layout.RelaidWeight(type_name, w.shape, memory)
    return DeviceView(memory, type_name, w.shape, weight=relaid), quants.dequantize(blocks, type_name).reshape(w.shape)


def cache_view(type_name: str, x: np.ndarray) -> DeviceView:
    """A cache tensor that holds x (Hk, C, D), as it lies on the GPU."""
    rows = quants.quantize(x, type_name).reshape(*x.shape[:2], -1)
    memory = np.zeros(rows.size, np.uint8)
    layout.put_cache_rows(type_name, x.shape, memory, rows)
    return DeviceView(memory.view(layout.FLOATS.get(type_name, np.uint8)) if type_name != "F16" else memory.view(np.float16), type_name, x.shape)


def cache_numbers(view_: DeviceView) -> np.ndarray:
    rows = layout.cache_rows(view_.type, view_.shape, view_.array.view(np.uint8), view_.shape[1])
    return quants.dequantize(rows, view_.type).reshape(view_.shape)


def scratch(act: int = 0, temp: int = 0, cells: int = 1 << 20) -> Scratch:
    return Scratch(np.full(max(16, act), GARBAGE, np.uint8), np.full(max(16, temp), GARBAGE, np.uint8), cells)


def run(op: str, dst, src, i=(), f=(), *, tokens: int | None = None, cells: int = 1 << 20, shared: Scratch | None = None) -> Scratch:
    """One step. dst and src are DeviceViews or None; tokens is what slot 0 says."""
    launches, needs = tables()
    step = DeviceStep(op, dst, tuple(src), tuple(i), tuple(f))
    room = needs[op](step, cells) if op in needs else (0, 0)
    memory = shared or scratch(*room, cells)
    launches[op](0, np.array([-1 if tokens is None else tokens, 0], np.int32), step, memory)
    return memory


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(((got - want) ** 2).sum() / max((want ** 2).sum(), 1e-300))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = np.ascontiguousarray(a, np.float32).reshape(-1), np.ascontiguousarray(b, np.float32).reshape(-1)
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b)) | ((a == 0) & (b == 0))).all())


def eight_bits(x: np.ndarray) -> np.ndarray:
    """What activations are rounded to: 8 bits, a scale for every 32."""
    groups = x.reshape(-1, 32)
    top = np.abs(groups).max(axis=1, keepdims=True)
    return (np.rint(groups * (np.float32(127) / top)) * (top / np.float32(127))).reshape(x.shape)
