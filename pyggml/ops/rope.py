"""Rotary position embedding (Su et al. 2021)."""

import numpy as np

from pyggml.ops import op

MODES = ("norm", "neox")             # the order of ROPE_* in native/engine.h: pairs (2i, 2i+1), or (i, i + R/2)


def table(pos: np.ndarray, inv_freq: np.ndarray, mscale: float) -> np.ndarray:
    """(cos, sin) of every angle: pos (T), inv_freq (R/2) -> (T, R/2, 2). The frequencies carry all rope scaling."""
    angle = pos.astype(np.float64)[:, None] * inv_freq.astype(np.float64)
    return (np.stack([np.cos(angle), np.sin(angle)], -1) * mscale).astype(np.float32)


def rope(x: np.ndarray, table: np.ndarray, mode: str) -> np.ndarray:
    """Rotate the first R values of every head. x (T, H, D), table (T, R/2, 2) -> (T, H, D)"""
    half = table.shape[1]
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    y = x.copy()
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if mode == "norm" else (slice(0, half), slice(half, 2 * half))
    a, b = x[..., first], x[..., second]
    y[..., first] = a * cos - b * sin
    y[..., second] = a * sin + b * cos
    return y


op("rope_table", cpu="rope_table", defaults={"mscale": 1.0}, shape=lambda pos, inv_freq, **_: (*pos.shape, *inv_freq.shape, 2), reference=table)
op("rope", cpu="rope", defaults={"mode": "norm"}, reference=rope)
