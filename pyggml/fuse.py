"""Calls and fusions: a graph's nodes in the vocabulary of native/engine.h, and the patterns that turn several into one step.

A new fusion is a function that looks at one call, and a place in FUSIONS.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyggml.errors import PyggmlError
from pyggml.graph import Tensor, walk
from pyggml.ops import OPS


@dataclass(eq=False)
class Call:
    """One step to be: `op` writes `out` (and `also`) from `srcs`; attrs are those of the nodes it stands for.

    Values that a fusion brings in (a bias, a residual, a norm's weight) are tensors among the attrs. `at` orders the calls.
    """

    op: str
    out: Tensor
    srcs: list[Tensor | None]
    attrs: dict[str, Any] = field(default_factory=dict)
    also: tuple[Tensor, ...] = ()
    at: int = -1

    @property
    def reads(self) -> list[Tensor]:
        """Every value it needs, reshapes seen through."""
        values = [*self.srcs, *(v for v in self.attrs.values() if isinstance(v, Tensor))]
        return [through(t) for t in values if t is not None]


def through(t: Tensor) -> Tensor:
    """The node behind reshapes."""
    while t.op == "reshape":
        t = t.srcs[0]  # type: ignore[assignment]
    return t


class Calls:
    """The calls of a graph, with who produces and who reads each value; fusions rewrite it."""

    def __init__(self, outputs: Sequence[Tensor], small: bool) -> None:
        self.small = small
        self.outputs = {id(through(t)) for t in outputs}
        self.producer: dict[int, Call] = {}
        self.readers: dict[int, list[Call]] = defaultdict(list)
        for at, node in enumerate(walk(outputs)):
            if node.is_leaf or node.op == "reshape":
                continue
            if not OPS[node.op].cpu:
                raise PyggmlError(f"the op {node.op} has no CPU kernel")
            self._add(Call(OPS[node.op].cpu, node, list(node.srcs), dict(node.attrs), at=at))

    @property
    def list(self) -> list[Call]:
        """The calls in order."""
        return sorted({id(c): c for c in self.producer.values()}.values(), key=lambda c: c.at)

    def __contains__(self, call: Call) -> bool:
        return self.producer.get(id(call.out)) is call

    def _add(self, call: Call) -> None:
        for t in (call.out, *call.also):
            self.producer[id(t)] = call
        for t in call.reads:
            self.readers[id(t)].append(call)

    def _drop(self, call: Call) -> None:
        for t in (call.out, *call.also):
            if self.producer.get(id(t)) is call:
                del self.producer[id(t)]
        for t in call.reads:
            self.readers[id(t)].remove(call)

    def made_by(self, t: Tensor | None, op: str) -> Call | None:
        """The call of kind `op` that makes `t` for one reader alone, or None."""
        if t is None:
            return None
        t = through(t)
        call = self.producer.get(id(t))
        alone = len(self.readers[id(t)]) == 1 and id(t) not in self.outputs
        return call if call is not None and call.op == op and alone else None

    def replace(self, fused: Call | None, *gone: Call | None) -> None:
        """Drop `gone` and put `fused` where the last of them stood, unless it has its place already."""
        calls = [g for g in gone if g is not None]
        for call in calls:
            self._drop(call)
        if fused is not None:
            if fused.at < 0:
                fused.at = max(call.at for call in calls)
            self._add(fused)


# ---- fusions: each looks at one call and either rewrites the list (True) or does nothing ------------------------------------

def fuse_bias(calls: Calls, c: Call) -> bool:
    """add(W x, b) with b a row -> the matmul's bias; that of experts, a source, goes to the same place."""
    if c.op == "mul_mat_id" and len(c.srcs) > 3:
        calls.replace(Call(c.op, c.out, c.srcs[:3], {**c.attrs, "bias": c.srcs[3]}), c)
        return True
    if c.op != "add" or c.srcs[1] is None or len(c.srcs[1].shape) != 1:
        return False
    m = calls.made_by(c.srcs[0], "mul_mat")
    if m is None or "bias" in m.attrs or "residual" in m.attrs:
        return False
    calls.replace(Call("mul_mat", c.out, m.srcs, {**m.attrs, "bias": c.srcs[1]}), m, c)
    return True


def fuse_scale(calls: Calls, c: Call) -> bool:
    """scale(W x) -> the matmul scales its products."""
    m = calls.made_by(c.srcs[0], "mul_mat") if c.op == "scale" else None
    if m is None or "bias" in m.attrs or "residual" in m.attrs:
        return False
    calls.replace(Call("mul_mat", c.out, m.srcs, {**m.attrs, "scale": m.attrs["scale"] * c.attrs["factor"]}), m, c)
    return True


ADD_A_RESIDUAL = ("mul_mat", "moe_sum", "rms_norm")


def fuse_residual(calls: Calls, c: Call) -> bool:
    """add(W x, r) or add(r, W x) -> the matmul (or the sum over experts, or a norm) adds r itself."""
    if c.op != "add":
        return False
    for mine, other in ((c.srcs[0], c.srcs[1]), (c.srcs[1], c.srcs[0])):
        m = next((call for op in ADD_A_RESIDUAL if (call := calls.made_by(mine, op))), None)
        if m is None or "residual" in m.attrs or other is None or other.shape != c.out.shape or other.is_leaf:
            continue
        calls.replace(Call(m.op, c.out, m.srcs, {**m.attrs, "residual": other}), m, c)
        return True
    return False


def fuse_norm(calls: Calls, c: Call) -> bool:
    """rms_norm(x) that only matmuls read -> each normalises while it quantizes x."""
    if c.op != "rms_norm" or c.srcs[1] is None or id(c.out) in calls.outputs:
        return False
    readers = list(calls.readers[id(c.out)])
    if not readers or any(r.op not in ("mul_mat", "mul_mat_id") or r.srcs[1] is not c.out or "norm" in r.attrs for r in readers):
        return False
    if any(t is c.out for r in readers for t in r.reads if t is not r.srcs[1]):
        return False
    for r in readers:
        srcs = [r.srcs[0], c.srcs[0], *r.srcs[2:]]
        calls.replace(Call(r.op, r.out, srcs, {**r.attrs, "norm": c.srcs[1], "eps": c.attrs["eps"]}, at=r.at), r)
    calls.replace(None, c)
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


def fuse_softcap(calls: Calls, c: Call) -> bool:
    """softcap(W x) -> the matmul caps its results."""
    m = calls.made_by(c.srcs[0], "mul_mat") if c.op == "softcap" else None
    if m is None:
        return False
    calls.replace(Call("mul_mat", c.out, m.srcs, {**m.attrs, "softcap": c.attrs["cap"]}), m, c)
    return True


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
    srcs = [q.srcs[0], store_k.srcs[0], store_v.srcs[0], c.srcs[3], c.srcs[4], k.srcs[0], store_v.srcs[1], q.srcs[1], *c.srcs[5:]]
    calls.replace(Call("attention_step", c.out, srcs, {**c.attrs, **q.attrs}), q, k, store_k, store_v, c)
    return True


def fuse_route(calls: Calls, c: Call) -> bool:
    """The experts of a token and their weights come from one step, which stands where the experts were chosen."""
    if c.op != "moe_route" or c.out.op != "moe_weights":
        return False
    ids = calls.producer[id(c.srcs[1])]
    calls.replace(Call("moe_route", ids.out, [ids.srcs[0]], {**ids.attrs, **c.attrs}, also=(c.out,), at=ids.at), ids, c)
    return True


FUSIONS: tuple[Callable[[Calls, Call], bool], ...] = (
    fuse_route, fuse_bias, fuse_scale, fuse_norm, fuse_glu, fuse_residual, fuse_softcap, fuse_attention_step)


def fuse(calls: Calls) -> None:
    for pattern in FUSIONS:
        for call in calls.list:
            if call in calls:
                pattern(calls, call)
