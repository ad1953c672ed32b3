"""Products with weight matrices: y = x Wᵀ."""

import numpy as np

from pyggml.ops import op

# W (M, K), x (T, K) -> (T, M)
op("matmul", cpu="mul_mat", matmul=True, defaults={"scale": 1.0}, shape=lambda w, x, **_: (*x.shape[:-1], w.shape[0]),
   reference=lambda w, x, scale: (x @ w.T) * np.float32(scale))


def matmul_id(w: np.ndarray, x: np.ndarray, ids: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Expert `ids[t, u]` of w (E, M, K), with its row of bias (E, M), applied to x (T, K) or to x (T, U, K) -> (T, U, M)."""
    out = np.empty((*ids.shape, w.shape[1]), np.float32)
    for expert in np.unique(ids):
        t, u = np.nonzero(ids == expert)
        out[t, u] = (x[t] if x.ndim == 2 else x[t, u]) @ w[expert].T
    return out if bias is None else out + bias[ids]


op("matmul_id", cpu="mul_mat_id", matmul=True, shape=lambda w, x, ids, *_: (*ids.shape, w.shape[1]), reference=matmul_id)
