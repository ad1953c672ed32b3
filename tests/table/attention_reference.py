"""Attention in double, caches of every type, and the batches that the tests run it on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pyggml.types import tensor_type


def random_cache(rng, cache_type: str, shape: tuple[int, int, int], visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A cache (Hk, C, D): its bytes, and its values as double. Cells outside the mask `visible` (C) hold NaN."""
    row = tensor_type(cache_type)
    if row.quantized:
        blocks = np.zeros((*shape[:2], shape[2] // row.block), row.layout)
        blocks["d"] = rng.standard_normal(blocks.shape) / {"Q8_0": 70, "Q4_0": 4}[cache_type]
        blocks["d"][:, ~visible] = np.nan
        limits = {"Q8_0": (-127, 128), "Q4_0": (0, 256)}[cache_type]
        blocks["qs"] = rng.integers(*limits, blocks["qs"].shape)
        q = blocks["qs"].astype(np.float64)
        if cache_type == "Q4_0":
            q = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], -1).astype(np.float64) - 8
        return blocks, (blocks["d"].astype(np.float64)[..., None] * q).reshape(shape)
    values = rng.standard_normal(shape).astype(np.float32)
    values[:, ~visible] = np.nan
    if cache_type == "BF16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    stored = values.astype({"F32": np.float32, "F16": np.float16}[cache_type])
    return stored, stored.astype(np.float64)


@dataclass
class Batch:
    """Tokens of one or more sequences: the first cell each sees and its own."""

    name: str
    first: list[int]
    cell: list[int]
    cells: int = field(default=0)

    def __post_init__(self) -> None:
        self.first_cells, self.own_cells = np.array(self.first, np.int32), np.array(self.cell, np.int32)
        self.cells = max(self.cell) + 9

    def mask(self, window: int = 0) -> np.ndarray:
        """(T, C): which cells a token sees."""
        c = np.arange(self.cells)
        lo = np.maximum(self.first_cells, self.own_cells - window + 1 if window else 0)
        return (c >= lo[:, None]) & (c <= self.own_cells[:, None])

    def __str__(self) -> str:
        return self.name


def sequences(name: str, *parts: tuple[int, int, int]) -> Batch:
    """Each part (first cell, cell of its first token, tokens)."""
    return Batch(name, [first for first, _, n in parts for _ in range(n)], [start + i for _, start, n in parts for i in range(n)])


def attention(q, k, v, mask, scale, softcap=0.0, sinks=None) -> np.ndarray:
    """q (T, H, D), k and v (Hk, C, D), mask (T, C), sinks (H) -> (T, H * D); a token that sees nothing gives zeros."""
    T, H, D = q.shape
    share = H // k.shape[0]
    out = np.zeros((T, H, D))
    for t in range(T):
        cells = np.flatnonzero(mask[t])
        for h in range(H if len(cells) else 0):
            s = k[h // share, cells] @ q[t, h].astype(np.float64) * scale
            s = softcap * np.tanh(s / softcap) if softcap else s
            p = np.exp(s - s.max())
            sink = np.exp(sinks[h] - s.max()) if sinks is not None else 0
            out[t, h] = (p / (p.sum() + sink)) @ v[h // share, cells]
    return out.reshape(T, H * D)
