"""How far logits are from golden ones, and how far they may be."""

from __future__ import annotations

import numpy as np


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def distances(golden: np.ndarray, mine: np.ndarray) -> dict[str, float]:
    """Distances of two (tokens, vocabulary) arrays of logits. top1 is an agreement: larger is better."""
    g, m = golden.astype(np.float64), mine.astype(np.float64)
    p, q = log_softmax(g), log_softmax(m)
    kl = (np.exp(p) * (p - q)).sum(-1)
    rows = np.linalg.norm(g - m, axis=-1) / np.linalg.norm(g, axis=-1)
    return {"rel_l2": float(np.linalg.norm(g - m) / np.linalg.norm(g)), "row_p90": float(np.quantile(rows, 0.9)),
            "kl_mean": float(kl.mean()), "kl_max": float(kl.max()), "top1": float((g.argmax(-1) == m.argmax(-1)).mean())}


# What llama.cpp's own paths disagree by (repacked or not, flash attention or not) on such files, with room to spare.
BOUNDS = {
    "strict": {"rel_l2": 1e-4, "kl_mean": 1e-7},
    "native f16": {"rel_l2": 6e-3, "kl_mean": 1e-4, "kl_max": 1e-3, "top1": 0.95},
    "native bf16": {"rel_l2": 0.02, "kl_mean": 2e-3, "kl_max": 0.01, "top1": 0.9},
    "native q8_0": {"rel_l2": 0.06, "kl_mean": 0.01, "kl_max": 0.08, "top1": 0.85},
    "native q8_K": {"rel_l2": 0.08, "kl_mean": 0.02, "kl_max": 0.15, "top1": 0.80},
    "native moe f16": {"row_p90": 0.01, "top1": 0.95},         # a near-tie of the router flips single positions
    "native moe": {"row_p90": 0.12, "top1": 0.75},
    "native stories": {"rel_l2": 0.12, "kl_mean": 0.04, "top1": 0.80},
}


def native_bound(name: str) -> str:
    """The bound for a golden file `model.type` whose activations are rounded as llama.cpp rounds them."""
    model, kind = name.split(".")
    experts = model in ("mixtral", "gpt-oss") or model.endswith("moe")
    if kind in ("f32", "f16", "bf16"):
        return "native moe f16" if experts else f"native {kind.replace('f32', 'f16')}"
    if experts or model == "stories260K":
        return "native moe" if experts else "native stories"
    return "native q8_0" if kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4") else "native q8_K"


def misses(found: dict[str, float], bound: dict[str, float]) -> list[str]:
    """The distances that are out of bounds, in words."""
    return [f"{k} is {found[k]:.3g}, bound {v:g}" for k, v in bound.items() if (found[k] < v if k == "top1" else found[k] > v)]


def first_difference(ids: np.ndarray, margins: np.ndarray, golden: np.ndarray, error: float) -> str:
    """Compare greedy continuations up to the first step whose golden margin is below the error. "" when they agree."""
    for step, (mine, theirs, margin) in enumerate(zip(ids, golden, margins, strict=True)):
        if margin <= error:
            return ""
        if mine != theirs:
            return f"step {step}: token {mine}, golden {theirs} with margin {margin:.3g} and error {error:.3g}"
    return ""
