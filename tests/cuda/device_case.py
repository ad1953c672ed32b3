"""Runs one step's launch in the simulator and compares it with the op table's numpy reference."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml import quants

pytest.importorskip("numba.cuda", reason="needs the extra: pip install 'pyggml[cuda]'")

from pyggml.backends.cuda import layout  # noqa: E402
from pyggml.backends.cuda.act import act_bytes  # noqa: E402
from pyggml.backends.cuda.base import DeviceStep, DeviceView, HandOn, Scratch, Settle  # noqa: E402
from pyggml.backends.cuda.cachestore import roped_bytes  # noqa: E402
from pyggml.backends.cuda.factors import factor  # noqa: E402
from pyggml.backends.cuda.plan import kernels  # noqa: E402

NAMES = {np.dtype(np.float32): "F32", np.dtype(np.int32): "I32", np.dtype(np.float16): "F16", np.dtype(np.uint8): "I8"}
GARBAGE = 0x7B                                  # fills memory that a step must not rely on


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


class Numbers:
    """A cache for the reference: what the device's cache decodes to."""

    def __init__(self, view_: DeviceView) -> None:
        self.numbers = cache_numbers(view_)

    def read(self) -> np.ndarray:
        return self.numbers


def scratch(act: int = 0, temp: int = 0, cells: int = 1 << 20, handed: int = 0, roped: int = 0) -> Scratch:
    act_, handed_, handing, roped_, temp_ = (np.full(max(16, n_bytes), GARBAGE, np.uint8) for n_bytes in (act, handed, handed, roped, temp))
    return Scratch(act_, handed_, handing, roped_.view(np.float32), temp_, cells)


def run(op: str, dst, src, i=(), f=(), *, tokens: int | None = None, cells: int = 1 << 20, shared: Scratch | None = None, beside=(),
        hands_on: HandOn | None = None, settles: Settle | None = None, settled: bool = False) -> Scratch:
    """One step. dst and src are DeviceViews or None; tokens is what slot 0 says."""
    launches, needs = kernels()
    f = (*f, 0.0) if op == "mul_mat" and len(f) == 2 else f             # no cap
    src = [*src, None] if op == "rms_norm" and len(src) == 2 else src   # no residual
    step = DeviceStep(op, dst, tuple(src), tuple(i), tuple(f), beside=tuple(beside), hands_on=hands_on,
                      settles=settles, settled=settled)
    room = needs[op](step, cells) if op in needs else (0, 0)
    left = act_bytes(hands_on.kind, dst.shape[-1], int(np.prod(dst.shape[:-1]))) if hands_on is not None else 0
    attend = settles.step if settles is not None else step if op == "attention_step" else None
    memory = shared or scratch(*room, cells, left, roped_bytes(attend) if attend is not None else 0)
    launches[op](0, np.array([-1 if tokens is None else tokens, 0], np.int32), step, memory)
    return memory


def hands_on_what_it_makes(op: str, dst, src, i, f, *, norm=None, reader: str = "Q8_0", **options) -> None:
    """A product that reads dst as it was handed on gives the bits of one that prepares dst itself (nearly: a norm's sum has another order)."""
    tokens, k = options.get("tokens", dst.shape[0]), dst.shape[-1]
    matrix, _ = weight(np.random.default_rng(1).standard_normal((4, k)).astype(np.float32), reader)
    form = factor(reader).act
    left = run(op, dst, src, i, f, hands_on=HandOn(7, form, norm, 1e-5), **options)
    outs = [np.zeros((dst.shape[0], 4), np.float32) for _ in range(2)]
    for out, memory in zip(outs, (left, None), strict=True):
        run("mul_mat", view(out, dst.slot), [matrix, dst, norm, None, None], i=[7, 0, 0], f=[1e-5, 1], tokens=options.get("tokens"), shared=memory)
    assert left.prepared != (7, form) and outs[0].any()
    assert (outs[0][:tokens] == outs[1][:tokens]).all() if norm is None else nmse(outs[0][:tokens], outs[1][:tokens]) < 1e-7


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
