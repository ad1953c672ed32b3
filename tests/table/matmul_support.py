"""Random weights of every type, activations as the kernels round them, and the matmul steps under test."""

from __future__ import annotations

import numpy as np

from pyggml.backends.cpu import Program
from pyggml.native import lib
from pyggml.quants import dequantize
from pyggml.types import tensor_type

ACT_F32, ACT_A32, ACT_A256, ACT_ROW_Q8_0, ACT_ROW_Q8_1, ACT_ROW_Q8_K, ACT_PAIRS32, ACT_PAIRS256, ACT_BF16, ACT_BF16X2 = range(10)
ACT_WIDE = lib.PYG_ACT_WIDE
SMALL_COLS, WIDE_COLS = 8, 32
EPS = 1e-5


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
        if field in row.layout.names and row.layout[field].base == np.float16:
            blocks[field] = rng.uniform(0.005, 0.02, blocks[field].shape) * rng.choice([-1, 1], blocks[field].shape)
    if name == "MXFP4":
        blocks["e"] = rng.integers(118, 124, blocks["e"].shape)
    if name == "NVFP4":
        blocks["d"] = rng.integers(16, 48, blocks["d"].shape)
    if name == "IQ1_M":                     # the scale is the upper nibbles of four 16-bit words: keep it at 2^-6
        words = blocks["scales"].view("<u2")
        words &= 0x0fff
        words |= np.array([0x0000, 0x0000, 0x4000, 0x2000], "<u2")
    return raw


def act_layout(fmt: int, columns: int) -> int:
    """The layout of this many columns."""
    return fmt // ACT_WIDE if fmt >= ACT_WIDE and columns > WIDE_COLS else fmt % ACT_WIDE


def bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to the nearest bf16, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return (bits + np.uint32(0x7fff) + (bits >> 16 & 1) & np.uint32(0xffff0000)).view(np.float32).astype(np.float64)


def rounded(x: np.ndarray, fmt: int) -> np.ndarray:
    """Activations (T, K) as a format keeps them, in float64."""
    x = x.astype(np.float32)
    fmt = act_layout(fmt, len(x))
    if fmt == ACT_F32:
        return x.astype(np.float64)
    if fmt in (ACT_BF16, ACT_BF16X2):
        high = bf16(x)
        return high if fmt == ACT_BF16 else high + bf16(x - high.astype(np.float32))
    if fmt in (ACT_A256, ACT_ROW_Q8_K, ACT_PAIRS256):
        blocks = x.reshape(len(x), -1, 256)
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
        inverse = np.divide(np.float32(-127), extreme, out=np.zeros_like(extreme), where=extreme != 0)
        d = np.divide(np.float32(1), inverse, out=np.zeros_like(inverse), where=inverse != 0)
        return (np.rint(blocks * inverse).astype(np.float64) * d).reshape(x.shape)
    blocks = x.reshape(len(x), -1, 32)
    d = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    kept = d.astype(np.float16) if fmt not in (ACT_A32, ACT_PAIRS32) and len(x) <= SMALL_COLS else d       # ggml's blocks carry a half float
    return (np.rint(blocks * inverse).astype(np.float64) * kept).reshape(x.shape)


def rms_norm(x: np.ndarray, weight: np.ndarray | None, eps: float) -> np.ndarray:
    """x (.., K) normalized in float64, as float32; unchanged without a weight."""
    if weight is None:
        return x
    x = x.astype(np.float64)
    return (x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight).astype(np.float32)


class Weight:
    """A random weight (rows, k) or (experts, rows, k) in a layout.

    packed: with its arena; raw: blocks; exact: floats made from blocks.
    """

    def __init__(self, name: str, shape: tuple[int, ...], layout: str, rng: np.random.Generator) -> None:
        *experts, rows, k = shape
        n = int(np.prod(experts, dtype=int))
        self.name, self.shape, self.id = name, shape, tensor_type(name).id
        self.raw = random_blocks(name, n * rows, k, rng)
        self.dense = dequantize(self.raw, name).reshape(shape).astype(np.float64)
        self.packed = self.ready = None
        if layout == "packed":
            self.packed = np.zeros(n * lib.pyg_pack_bytes(self.id, rows, k), np.uint8)
            self.ready = np.zeros(n * -(-rows // 16), np.uint8)
        self.exact = layout == "exact"

    @property
    def format(self) -> int:
        """How the instruction set in use takes the activations of this weight."""
        return lib.pyg_act_format(self.id, int(self.packed is not None), int(self.exact), 0)

    def seen(self, columns: int) -> np.ndarray:
        """The weight as that many columns meet it."""
        return bf16(self.dense) if act_layout(self.format, columns) == ACT_BF16 else self.dense

    def view(self, program: Program, release: bool = False) -> int:
        return program.view(self.raw, self.name, self.shape, packed=self.packed, ready=self.ready, release=release)


class Matmul:
    """A program of one mul_mat or glu_mat over x (T, K), with a `prepare` step before it where `prepare` is set."""

    def __init__(self, x: np.ndarray, gate: Weight, up: Weight | None = None, *, norm: np.ndarray | None = None,
                 bias: np.ndarray | None = None, bias_up: np.ndarray | None = None, residual: np.ndarray | None = None, glu: int = 0,
                 scale: float = 1.0, softcap: float = 0.0, prepare: bool = False, release: bool = False) -> None:
        self.program = Program()
        self.out = np.empty((len(x), gate.shape[0]), np.float32)

        def add(array):
            return -1 if array is None else self.program.view(array)

        source, weight = add(x), add(norm)
        if prepare:
            buffer = self.program.view(np.zeros(lib.pyg_act_bytes(gate.format, x.shape[1], len(x)), np.int8))
            self.program.step("prepare", buffer, [source, weight], [0, gate.format], [EPS])
            source, weight = buffer, -1
        if up is None:
            sources = [gate.view(self.program, release), source, weight, add(bias), add(residual)]
            self.program.step("mul_mat", add(self.out), sources, [1, gate.format, int(prepare)], [EPS, scale, softcap])
        else:
            sources = [gate.view(self.program), source, weight, up.view(self.program), add(bias), add(bias_up)]
            self.program.step("glu_mat", add(self.out), sources, [1, gate.format, int(prepare), glu], [EPS])
        self.program.finish()

    def __call__(self, pool) -> np.ndarray:
        self.out[:] = np.nan
        assert self.program.run(pool)
        return self.out


def activation(kind: int, x: np.ndarray) -> np.ndarray:
    """GLU_SILU, GLU_GELU (tanh form), GLU_RELU in float64."""
    silu = x / (1 + np.exp(np.minimum(-x, 700)))
    gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return (silu, gelu, np.maximum(x, 0))[kind]
