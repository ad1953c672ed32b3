"""Rotary positions in double, as the tests' oracle."""

import numpy as np
from kernel_case import ROPE_NORM


def rope_table(positions, inv_freq, mscale: float = 1.0) -> np.ndarray:
    """(T, R/2, 2): cos and sin of position * inv_freq, times mscale."""
    angle = np.asarray(positions, np.float64)[:, None] * np.asarray(inv_freq, np.float64)
    return np.stack([np.cos(angle), np.sin(angle)], -1) * mscale


def rope(x, table, kind) -> np.ndarray:
    """x (T, H, D) with its first 2 * table.shape[1] values of each head rotated; pairs as `kind` says."""
    y, half = np.array(x, np.float64), table.shape[1]
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if kind == ROPE_NORM else (slice(0, half), slice(half, 2 * half))
    a, b, cos, sin = y[..., first].copy(), y[..., second].copy(), table[:, None, :, 0], table[:, None, :, 1]
    y[..., first], y[..., second] = a * cos - b * sin, b * cos + a * sin
    return y
