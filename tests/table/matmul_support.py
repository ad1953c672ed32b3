"""Random weights of every type, activations rounded as the kernels round them, and programs of one matmul step."""

from __future__ import annotations

import numpy as np

from pyggml.backends.cpu import Program
from pyggml.native import ffi, lib
from pyggml.types import tensor_type

ACT_F32, ACT_A32, ACT_A256, ACT_ROW_Q8_0, ACT_ROW_Q8_1, ACT_ROW_Q8_K = range(6)
SMALL_COLS = 8


def random_blocks(name: str, rows: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, bytes) of a random weight: random bits everywhere, scales near 1/100 so that sums stay sane."""
    row = tensor_type(name)
    if row.block == 1:
        values = rng.standard_normal((rows, k), np.float32)
        if name == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype({"F32": np.float32, "F16": np.float16}[name]).view(np.uint8)
    raw = rng.integers(0, 256, (rows, row.row_bytes(k)), np.uint8)
    blocks = raw.reshape(rows, -1, row.bytes).view(row.layout)
    for field in ("d", "m", "dmin"):
        if field in row.layout.names:
            blocks[field] = rng.uniform(0.005, 0.02, blocks[field].shape) * rng.choice([-1, 1], blocks[field].shape)
    if name == "MXFP4":
        blocks["e"] = rng.integers(118, 124, blocks["e"].shape)
    return raw


def rounded(x: np.ndarray, fmt: int) -> np.ndarray:
    """Activations (T, K) as a format keeps them, in float64. The tests' bounds are for the sums, not for this rounding."""
    x = x.astype(np.float32)
    if fmt == ACT_F32:
        return x.astype(np.float64)
    if fmt in (ACT_A256, ACT_ROW_Q8_K):
        blocks = x.reshape(len(x), -1, 256)
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
        inverse = np.divide(np.float32(-127), extreme, out=np.zeros_like(extreme), where=extreme != 0)
        d = np.divide(np.float32(1), inverse, out=np.zeros_like(inverse), where=inverse != 0)
        return (np.minimum(np.rint(blocks * inverse), 127).astype(np.float64) * d).reshape(x.shape)
    blocks = x.reshape(len(x), -1, 32)
    d = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    return (np.rint(blocks * inverse).astype(np.float64) * d).reshape(x.shape)


def rms_norm(x: np.ndarray, weight: np.ndarray | None, eps: float) -> np.ndarray:
    """x (.., K) normalized in float64, as float32; unchanged without a weight."""
    if weight is None:
        return x
    x = x.astype(np.float64)
    return (x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight).astype(np.float32)


def nmse(expected: np.ndarray, got: np.ndarray) -> float:
    """Squared error over squared magnitude."""
    return float(((expected - got) ** 2).sum() / (expected**2).sum())


class Weight:
    """A random weight (rows, k), or (experts, rows, k), with its packed arena where the layout asks for one."""

    def __init__(self, name: str, shape: tuple[int, ...], layout: str, rng: np.random.Generator) -> None:
        *experts, rows, k = shape
        self.name, self.shape, self.layout = name, shape, layout
        self.raw = random_blocks(name, int(np.prod(experts, dtype=int)) * rows, k, rng)
        self.id = tensor_type(name).id
        self.packed = self.ready = None
        if layout == "packed":
            n = int(np.prod(experts, dtype=int))
            self.packed = np.zeros(n * lib.pyg_pack_bytes(self.id, rows, k) + 64, np.uint8)
            self.ready = np.zeros(n * -(-rows // 16), np.uint8)
        self.format = lib.pyg_act_format(self.id, int(layout == "packed"), int(layout == "exact"))

    def view(self, program: Program) -> int:
        packed = ffi.cast("char *", self.packed.ctypes.data) if self.packed is not None else None
        return program.view(self.raw, self.name, self.shape, packed=packed, ready=self.ready)


def activations(program: Program, weight: Weight, x: np.ndarray, norm: np.ndarray | None, eps: float, prepare: bool) -> tuple[int, int, int]:
    """Sources (x, norm) of a matmul step and its `prepared` attribute, with a prepare step before it when asked for."""
    xv = program.view(x)
    nv = program.view(norm) if norm is not None else -1
    if not prepare:
        return xv, nv, 0
    buffer = np.zeros(lib.pyg_act_bytes(weight.format, x.shape[-1], len(x)), np.int8)
    bv = program.view(buffer)
    program.step("prepare", bv, [xv, nv], [0, weight.format], [eps])
    return bv, -1, 1
