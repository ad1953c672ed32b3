"""Mixture of experts: which experts a token goes to, and the sum of what they return."""

import numpy as np

from pyggml.ops import op

GATING = ("softmax", "sigmoid")      # the order of MOE_* in native/engine.h


def route(logits: np.ndarray, n_used: int) -> np.ndarray:
    """The `n_used` experts with the largest logits, largest first; equal logits go to the lower expert. (T, E) -> (T, U)"""
    return np.argsort(-logits, axis=-1, kind="stable")[:, :n_used].astype(np.int32)


def weights(logits: np.ndarray, ids: np.ndarray, gating: str, normalize: bool, scale: float) -> np.ndarray:
    """The gate's probabilities of the chosen experts. (T, E), (T, U) -> (T, U)"""
    z = logits.astype(np.float64)
    if gating == "softmax":
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
    else:
        p = 1 / (1 + np.exp(-z))
    chosen = np.take_along_axis(p, ids.astype(np.int64), -1)
    if normalize:
        chosen = chosen / chosen.sum(-1, keepdims=True)
    return (chosen * scale).astype(np.float32)


op("moe_ids", cpu="moe_route", type="I32", defaults={"n_used": 1}, shape=lambda logits, n_used: (logits.shape[0], n_used), reference=route)
op("moe_weights", cpu="moe_route", defaults={"gating": "softmax", "normalize": True, "scale": 1.0},
   shape=lambda logits, ids, **_: ids.shape, reference=weights)
# y (T, U, M), weights (T, U) -> (T, M)
op("moe_sum", cpu="moe_sum", shape=lambda y, w: (y.shape[0], y.shape[2]), reference=lambda y, w: np.einsum("tum,tu->tm", y, w))
