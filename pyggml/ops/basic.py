"""Rows of a table, and arithmetic element by element."""

import math

import numpy as np

from pyggml.ops import op

GLU = ("silu", "gelu", "relu", "clamped")       # the order of GLU_* in native/engine.h


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form, which GGML calls GELU."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {"silu": silu, "gelu": gelu, "relu": lambda x: np.maximum(x, 0)}


def glu(gate: np.ndarray, up: np.ndarray, kind: str) -> np.ndarray:
    """act(gate) * up (Shazeer 2020); `clamped` is gpt-oss's: a steeper silu, nothing beyond 7, and 1 more on up."""
    if kind == "clamped":
        gate = np.minimum(gate, 7)
        return gate / (1 + np.exp(-1.702 * gate)) * (np.clip(up, -7, 7) + 1)
    return ACTIVATIONS[kind](gate) * up


# table (V, D), ids (T) -> (T, D)
op("get_rows", shape=lambda table, ids, **_: (*ids.shape, table.shape[-1]), cpu="get_rows", defaults={"scale": 1.0},
   reference=lambda table, ids, scale: table[ids] * np.float32(scale))
# a, b the same shape, or b one row (D) that repeats
op("add", cpu="add", reference=lambda a, b: a + b)
op("mul", cpu="mul", reference=lambda a, b: a * b)
op("scale", cpu="scale", defaults={"factor": 1.0}, reference=lambda a, factor: a * np.float32(factor))
# what is far beyond `cap` comes near it (Bello et al. 2016, on logits)
op("softcap", cpu="softcap", defaults={"cap": 1.0}, reference=lambda a, cap: np.float32(cap) * np.tanh(a / np.float32(cap)))
op("glu", cpu="glu", defaults={"kind": "silu"}, reference=glu)
