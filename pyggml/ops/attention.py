"""The cache of keys and values, and attention over it."""

import numpy as np

from pyggml.ops import op


def store(cache, x: np.ndarray, cell: np.ndarray):
    """Write x (T, H, D) into the cells `cell` (T) of a cache tensor; returns the cache tensor."""
    cache.write(cell, x)
    return cache


def attention(q: np.ndarray, k, v, cell: np.ndarray, first: np.ndarray, sinks: np.ndarray | None = None, *, scale: float, softcap: float,
              window: int) -> np.ndarray:
    """Softmax(q Kᵀ) V where token t sees the cells first[t]..cell[t], or the last `window` of them.

    q (T, H, D); k, v cache tensors (Hkv, C, D); head h reads the keys and values of head h // (H / Hkv). sinks (H): a score of each head
    that takes its share of the weights and has no value (Xiao et al. 2023). -> (T, H * D)
    """
    T, H, D = q.shape
    keys, values = k.read(), v.read()
    group = H // keys.shape[0]
    out = np.empty((T, H, values.shape[-1]), np.float32)
    for t in range(T):
        start = max(first[t], cell[t] - window + 1) if window else first[t]
        seen = slice(start, cell[t] + 1)
        ks, vs = np.repeat(keys[:, seen], group, 0), np.repeat(values[:, seen], group, 0)
        z = np.einsum("hd,hcd->hc", q[t].astype(np.float64), ks) * scale
        if softcap:
            z = softcap * np.tanh(z / softcap)
        if sinks is not None:
            z = np.column_stack([z, sinks])
        p = np.exp(z - z.max(-1, keepdims=True))
        out[t] = np.einsum("hc,hcd->hd", (p / p.sum(-1, keepdims=True))[:, :vs.shape[1]], vs)
    return out.reshape(T, -1)


# cache (Hkv, C, D), x (T, Hkv, D), cell (T) -> the cache with those cells written
op("store", cpu="store", type="", reference=store)
op("attention", cpu="attention", defaults={"scale": 1.0, "softcap": 0.0, "window": 0},
   shape=lambda q, k, v, *_, **__: (q.shape[0], q.shape[1] * v.shape[-1]), reference=attention)
