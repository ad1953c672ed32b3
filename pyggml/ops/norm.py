"""Normalisations over the last dimension."""

import numpy as np

from pyggml.ops import op


def rms_norm(x: np.ndarray, weight: np.ndarray | None, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019)."""
    mean = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    y = x * (1 / np.sqrt(mean + eps)).astype(np.float32)
    return y if weight is None else y * weight


op("rms_norm", cpu="rms_norm", defaults={"eps": 1e-5}, reference=rms_norm)
