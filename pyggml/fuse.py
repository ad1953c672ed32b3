"""Calls and fusions: a graph's nodes in the vocabulary of native/engine.h, and the patterns that turn several into one step.

A new fusion is a function that looks at one call, and a place in FUSIONS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyggml.errors import PyggmlError
from pyggml.graph import Tensor, walk
from pyggml.ops import OPS


@dataclass(eq=False)
class Call:
    """One step to be: `op` writes `out` (and `also`) from `srcs`; attrs are those of the nodes it stands for."""

    op: str
    out: Tensor
    srcs: list[Tensor | None]
    attrs: dict[str, Any] = field(default_factory=dict)
    also: tuple[Tensor, ...] = ()


class Calls:
    """The calls of a graph in order, with who produces and who uses what; fusions rewrite it."""

    def __init__(self, outputs: Sequence[Tensor], small: bool) -> None:
        self.small = small
        self.outputs = list(outputs)
        self.list: list[Call] = []
        for node in walk(outputs):
            if node.is_leaf or node.op == "reshape":
                continue
            if not OPS[node.op].cpu:
                raise PyggmlError(f"the op {node.op} has no CPU kernel")
            self.list.append(Call(OPS[node.op].cpu, node, list(node.srcs), dict(node.attrs)))
        self.index()

    def index(self) -> None:
        """Look up again who makes and who uses each node (by the node itself, reshapes seen through)."""
        self.producer = {id(t): call for call in self.list for t in (call.out, *call.also)}
        self.users = Counter(id(self.through(s)) for call in self.list for s in call.srcs if s is not None)
        self.users.update(id(self.through(t)) for t in self.outputs)

    @staticmethod
    def through(t: Tensor) -> Tensor:
        while t.op == "reshape":
            t = t.srcs[0]  # type: ignore[assignment]
        return t

    def made_by(self, t: Tensor | None, op: str) -> Call | None:
        """The call of kind `op` that makes `t` for one user alone, or None."""
        if t is None:
            return None
        t = self.through(t)
        call = self.producer.get(id(t))
        return call if call is not None and call.op == op and self.users[id(t)] == 1 else None

    def replace(self, fused: Call, *gone: Call | None) -> None:
        """Put `fused` where the last of `gone` stood and drop the others."""
        at = max(self.list.index(g) for g in gone if g is not None)
        self.list[at] = fused
        self.list = [c for c in self.list if c is fused or c not in gone]
        self.index()


# ---- fusions: each looks at one call and either rewrites the list (True) or does nothing ------------------------------------

def fuse_bias(calls: Calls, c: Call) -> bool:
    """add(W x, b) with b a row -> the matmul's bias."""
    if c.op != "add" or c.srcs[1] is None or len(c.srcs[1].shape) != 1:
        return False
    m = calls.made_by(c.srcs[0], "mul_mat")
    if m is None or "bias" in m.attrs or "residual" in m.attrs:
        return False
    calls.replace(Call("mul_mat", c.out, m.srcs, {**m.attrs, "bias": c.srcs[1]}), m, c)
    return True


def fuse_residual(calls: Calls, c: Call) -> bool:
    """add(W x, r) or add(r, W x) -> the matmul (or the sum over experts) adds r itself."""
    if c.op != "add":
        return False
    for mine, other in ((c.srcs[0], c.srcs[1]), (c.srcs[1], c.srcs[0])):
        m = calls.made_by(mine, "mul_mat") or calls.made_by(mine, "moe_sum")
        if m is None or "residual" in m.attrs or other is None or other.shape != c.out.shape or other.is_leaf:
            continue
        calls.replace(Call(m.op, c.out, m.srcs, {**m.attrs, "residual": other}), m, c)
        return True
    return False


def fuse_norm(calls: Calls, c: Call) -> bool:
    """rms_norm(x) that only matmuls read -> each normalises while it quantizes x."""
    if c.op != "rms_norm" or c.srcs[1] is None:
        return False
    users = [u for u in calls.list if any(s is not None and calls.through(s) is c.out for s in u.srcs)]
    if not users or any(u.op not in ("mul_mat", "mul_mat_id") or u.srcs[1] is not c.out or "norm" in u.attrs for u in users):
        return False
    if any(calls.through(t) is c.out for t in calls.outputs):
        return False
    for u in users:
        u.srcs[1] = c.srcs[0]
        u.attrs.update(norm=c.srcs[1], eps=c.attrs["eps"])
    calls.list.remove(c)
    calls.index()
    return True


def fuse_glu(calls: Calls, c: Call) -> bool:
    """glu(Wg x, Wu x) -> one step that computes both tiles side by side and stores the product."""
    if c.op != "glu":
        return False
    for op, fused in (("mul_mat", "glu_mat"), ("mul_mat_id", "glu_mat_id")):
        g, u = calls.made_by(c.srcs[0], op), calls.made_by(c.srcs[1], op)
        if g is None or u is None or g.srcs[1:] != u.srcs[1:] or g.attrs.get("norm") is not u.attrs.get("norm"):
            continue
        if any("residual" in m.attrs or m.attrs.get("scale", 1.0) != 1.0 for m in (g, u)):
            continue
        attrs = {**g.attrs, **c.attrs, "up": u.srcs[0], "bias_up": u.attrs.get("bias")}
        calls.replace(Call(fused, c.out, g.srcs, attrs), g, u, c)
        return True
    return False


def fuse_attention_step(calls: Calls, c: Call) -> bool:
    """Few tokens: rope of q and k, the store of k and v and attention in one step, which needs no barrier between them."""
    if c.op != "attention" or not calls.small:
        return False
    q, store_k, store_v = calls.made_by(c.srcs[0], "rope"), calls.made_by(c.srcs[1], "store"), calls.made_by(c.srcs[2], "store")
    if q is None or store_k is None or store_v is None:
        return False
    k = calls.made_by(store_k.srcs[1], "rope")
    if k is None or k.srcs[1] is not q.srcs[1] or k.attrs != q.attrs:
        return False
    srcs = [q.srcs[0], store_k.srcs[0], store_v.srcs[0], c.srcs[3], c.srcs[4], k.srcs[0], store_v.srcs[1], q.srcs[1]]
    calls.replace(Call("attention_step", c.out, srcs, {**c.attrs, **q.attrs}), q, k, store_k, store_v, c)
    return True


def fuse_route(calls: Calls, c: Call) -> bool:
    """The experts of a token and their weights come from one step."""
    if c.op != "moe_route" or c.out.op != "moe_weights":
        return False
    ids = calls.producer[id(c.srcs[1])]
    at = calls.list.index(ids)                            # where the ids were: their readers may stand before the weights
    calls.list[at] = Call("moe_route", ids.out, [ids.srcs[0]], {**ids.attrs, **c.attrs}, also=(c.out,))
    calls.list.remove(c)
    calls.index()
    return True


FUSIONS: tuple[Callable[[Calls, Call], bool], ...] = (fuse_route, fuse_bias, fuse_norm, fuse_glu, fuse_residual, fuse_attention_step)


def fuse(calls: Calls) -> None:
    for pattern in FUSIONS:
        for call in list(calls.list):
            if call in calls.list:
                pattern(calls, call)
