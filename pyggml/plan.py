"""From a graph to a plan: which native steps compute it, in what order, and where every value lives.

    calls     one Call per node, in the vocabulary of native/engine.h
    FUSIONS   patterns that turn several calls into one step
    prepare   large batches: activations are quantized once, by all workers together, for all matmuls that read them
    levels    calls sorted by depth; a barrier stands only before a level
    memory    values that are never alive at the same level share bytes
    emit      views and steps of a Program

What differs between runs (tokens, rows of logits) stays a slot of the program; nothing is planned twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyggml.backends.cpu import Pool, Program, WeightStore
from pyggml.errors import PyggmlError
from pyggml.graph import SYMBOLS, Symbol, Tensor, walk
from pyggml.native import huge_zeros, lib
from pyggml.ops import OPS, basic, moe, rope
from pyggml.types import tensor_type

SMALL = lib.PYG_SMALL_COLS if lib else 0        # up to this many columns a matmul prepares its activations privately
ALIGN = 64


@dataclass(eq=False)
class Call:
    """One step to be: `op` writes `out` (and `also`) from `srcs`; attrs are those of the nodes it stands for."""

    op: str
    out: Tensor
    srcs: list[Tensor | None]
    attrs: dict[str, Any] = field(default_factory=dict)
    also: tuple[Tensor, ...] = ()


def root(t: Tensor) -> Tensor:
    """The node whose memory `t` names: reshapes see through to their source, a stored cache is the cache."""
    while t.op in ("reshape", "store"):
        t = t.srcs[0]  # type: ignore[assignment]
    return t


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


# ---- lowering: attributes -> the numbered sources and numbers of native/engine.h -------------------------------------------

@dataclass(eq=False)
class Step:
    """A Call with its sources and numbers in the places that native/engine.h gives them."""

    op: str
    out: Tensor
    src: list[Tensor | None]
    i: list[int] = field(default_factory=list)
    f: list[float] = field(default_factory=list)
    also: tuple[Tensor, ...] = ()
    level: int = 0

    @property
    def reads(self) -> list[Tensor]:
        return [s for s in self.src if s is not None and all(s is not t for t in self.also)]


class Lowering:
    """Turns calls into steps; `matmul` also decides how activations reach a weight."""

    def __init__(self, store: WeightStore, rows: Callable[[Tensor], int]) -> None:
        self.store, self.rows = store, rows
        self.prepared: dict[tuple[int, int, int], Tensor] = {}
        self.act_ids: dict[tuple[int, int, int], int] = {}
        self.multiplied: set[int] = set()        # weights that a matmul reads, by id
        self.steps: list[Step] = []

    def lower(self, c: Call) -> None:
        a = c.attrs
        simple: dict[str, tuple[list[int], list[float]]] = {
            "get_rows": ([], [a.get("scale", 1.0)]), "rms_norm": ([], [a.get("eps", 0)]), "add": ([], []), "mul": ([], []),
            "scale": ([], [a.get("factor", 1.0)]), "rope_table": ([], [a.get("mscale", 1.0)]),
            "attention": ([a.get("window", 0)], [a.get("scale", 1.0), a.get("softcap", 0.0)]),
        }
        if c.op in simple:
            i, f = simple[c.op]
            self.emit(c, c.srcs, i, f)
        elif c.op == "store":
            self.emit(c, c.srcs[1:])
        elif c.op == "glu":
            self.emit(c, c.srcs, [basic.GLU.index(a["kind"])])
        elif c.op == "rope":
            self.emit(c, c.srcs, [rope.MODES.index(a["mode"]), 2 * self.half(c.srcs[1])])
        elif c.op == "attention_step":
            self.emit(c, c.srcs, [a["window"], rope.MODES.index(a["mode"]), 2 * self.half(c.srcs[7])], [a["scale"], a["softcap"]])
        elif c.op == "moe_route":
            self.emit(c, [c.srcs[0], *c.also], [moe.GATING.index(a["gating"]), int(a["normalize"])], [a["scale"]])
        elif c.op == "moe_sum":
            self.emit(c, [*c.srcs, a.get("residual")])
        elif c.op in ("mul_mat", "glu_mat"):
            self.matmul(c)
        elif c.op in ("mul_mat_id", "glu_mat_id"):
            self.matmul_id(c)
        else:
            raise PyggmlError(f"the step {c.op} has no lowering")

    def emit(self, c: Call, src: Sequence[Tensor | None], i: Sequence[int] = (), f: Sequence[float] = ()) -> None:
        self.steps.append(Step(c.op, c.out, list(src), list(i), list(f), c.also))

    @staticmethod
    def half(table: Tensor | None) -> int:
        return table.shape[1]  # type: ignore[union-attr, return-value]

    def act_id(self, x: Tensor, norm: Tensor | None, format: int) -> int:
        """A number for these prepared activations, the same for every matmul that can share them."""
        return self.act_ids.setdefault((id(x), id(norm), format), len(self.act_ids))

    def matmul(self, c: Call) -> None:
        a, weight, x, norm = c.attrs, c.srcs[0], c.srcs[1], c.attrs.get("norm")
        assert weight is not None and x is not None
        self.multiplied.update(id(w) for w in (weight, a.get("up")) if w is not None)
        format = self.store.act_format(weight)
        if (up := a.get("up")) is not None and self.store.act_format(up) != format:      # two types: no common activations
            gate_out, up_out = (Tensor("matmul", (), c.out.shape) for _ in range(2))
            self.matmul(Call("mul_mat", gate_out, [weight, x], {k: a[k] for k in ("norm", "eps", "bias") if k in a}))
            self.matmul(Call("mul_mat", up_out, [up, x], {"bias": a.get("bias_up"), **{k: a[k] for k in ("norm", "eps") if k in a}}))
            self.emit(Call("glu", c.out, []), [gate_out, up_out], [basic.GLU.index(a["kind"])])
            return
        act = self.act_id(x, norm, format)
        i = [act, format, 0]
        eps = a.get("eps", 0.0)
        if self.rows(x) > SMALL:
            key = (id(x), id(norm), format)
            if key not in self.prepared:
                bytes_needed = lib.pyg_act_bytes(format, x.shape[-1], self.rows(x))
                self.prepared[key] = Tensor("prepare", (x, norm), (bytes_needed,), "I8")
                self.emit(Call("prepare", self.prepared[key], []), [x, norm], i, [eps])
            x, norm, i = self.prepared[key], None, [act, format, 1]
        if c.op == "glu_mat":
            self.emit(c, [weight, x, norm, up, a.get("bias"), a.get("bias_up")], [*i, basic.GLU.index(a["kind"])], [eps])
        else:
            self.emit(c, [weight, x, norm, a.get("bias"), a.get("residual")], i, [eps, a.get("scale", 1.0)])

    def matmul_id(self, c: Call) -> None:
        a = c.attrs
        weight, x, ids = c.srcs
        assert weight is not None and x is not None
        self.multiplied.update(id(w) for w in (weight, a.get("up")) if w is not None)
        format, norm = self.store.act_format(weight), a.get("norm")
        i, f = [self.act_id(x, norm, format), format, 0], [a.get("eps", 0.0)]
        if c.op == "glu_mat_id":
            if self.store.act_format(a["up"]) != format:
                raise PyggmlError(f"{weight.name} and {a['up'].name} have types whose activations differ; quantize them to one type")
            self.emit(c, [weight, x, norm, ids, a["up"]], [*i, basic.GLU.index(a["kind"])], f)
        else:
            self.emit(c, [weight, x, norm, ids], i, f)


def sort_levels(steps: list[Step]) -> list[Step]:
    """Give each step its depth and sort by it, so that one barrier before each level is enough."""
    depth: dict[int, int] = {}
    for s in steps:
        # a store makes its cache anew: whoever reads the cache tensor through it comes later
        sources = [Calls.through(t) for t in s.reads]
        s.level = max((depth.get(id(t), -1) for t in sources), default=-1) + 1
        for out in (s.out, *s.also):
            depth[id(out)] = s.level
    return sorted(steps, key=lambda s: s.level)


# ---- memory -------------------------------------------------------------------------------------------------------------------

def assign_memory(steps: list[Step], outputs: Sequence[Tensor], size: Callable[[Tensor], int]) -> tuple[dict[int, int], int]:
    """Offsets for every computed value and the bytes of the whole: first fit among the values alive at the same level."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    values: dict[int, Tensor] = {}
    for s in steps:
        for t in (s.out, *s.also):
            if not root(t).is_leaf:
                values[id(root(t))] = root(t)
                first.setdefault(id(root(t)), s.level)
                last[id(root(t))] = s.level
        for t in s.reads:
            last[id(root(t))] = s.level
    for t in outputs:
        last[id(root(t))] = steps[-1].level + 1
    offsets: dict[int, int] = {}
    alive: list[tuple[int, int, int]] = []          # (offset, end, last level), by offset
    total = 0
    for key in sorted(values, key=lambda k: first[k]):
        alive = [a for a in alive if a[2] >= first[key]]
        need = -(-size(values[key]) // ALIGN) * ALIGN
        offset = 0
        for start, end, _ in alive:
            if start - offset >= need:
                break
            offset = max(offset, end)
        offsets[key] = offset
        total = max(total, offset + need)
        alive = sorted([*alive, (offset, offset + need, last[key])])
    return offsets, total


# ---- the plan ---------------------------------------------------------------------------------------------------------------

class Plan:
    """A graph ready to run on the CPU backend.

    `limits` gives the largest value of each symbol. Fill `inputs[name][:n]`, then `run({TOKENS: n, ...})`; `output` is an
    array over memory that the next run overwrites. `capture` names further nodes whose values are wanted: they are kept apart
    from fusions, and `captured` holds an array for each, likewise.
    """

    def __init__(self, output: Tensor, store: WeightStore, limits: dict[Symbol, int], timing: bool = False,
                 capture: Sequence[Tensor] = ()) -> None:
        self.limits = limits
        wanted = [output, *capture]

        def sizes(t: Tensor) -> tuple[int, ...]:
            return tuple(limits[d] if isinstance(d, Symbol) else d for d in t.shape)

        calls = Calls(wanted, small=max(limits.values()) <= SMALL)
        fuse(calls)
        lowering = Lowering(store, lambda t: sizes(t)[0])
        for call in calls.list:
            lowering.lower(call)
        self.steps = sort_levels(lowering.steps)
        for step in self.steps:
            if step.op == "get_rows" and (table := step.src[0]) is not None and table.op == "weight":
                store.keep_rows(table.name)
        offsets, total = assign_memory(self.steps, wanted, lambda t: tensor_type(t.type).row_bytes(int(np.prod(sizes(t), dtype=np.int64))))
        self._memory = huge_zeros(total)
        self.inputs: dict[str, np.ndarray] = {}
        self.program = Program(len(SYMBOLS))
        views: dict[tuple[int, tuple], int] = {}

        def array(t: Tensor) -> np.ndarray:
            if t.op == "input":
                return self.inputs.setdefault(t.name, np.zeros(sizes(t), np.int32 if t.type == "I32" else np.float32))
            if t.op == "const":
                return t.data
            if t.op == "cache":
                return t.data.raw
            return self._memory[offsets[id(t)]:]

        def view(t: Tensor | None) -> int:
            if t is None:
                return -1
            source = root(t)
            shape = source.shape if t.op == "store" else t.shape
            key = (id(source), shape)
            if key not in views:
                if source.op == "weight":
                    views[key] = store.view(self.program, source, pack=id(source) in lowering.multiplied)
                else:
                    symbols = [d for d in shape if isinstance(d, Symbol)]
                    numbers = tuple(limits[d] if isinstance(d, Symbol) else d for d in shape)
                    views[key] = self.program.view(array(source), source.type, numbers, slot=symbols[0].slot if symbols else -1)
            return views[key]

        level = 0
        for s in self.steps:
            self.program.step(s.op, view(s.out), [view(t) for t in s.src], s.i, s.f, sync=s.level != level)
            level = s.level
        self.program.finish(timing)

        def value(t: Tensor) -> np.ndarray:
            count = int(np.prod(sizes(t)))
            return array(root(t))[: 4 * count].view(np.int32 if t.type == "I32" else np.float32).reshape(sizes(t))

        self.output, *self.captured = map(value, wanted)

    def run(self, pool: Pool, values: dict[Symbol, int], alone: bool = False) -> bool:
        """One native call for these sizes, by the pool or by the calling thread alone. False when it was aborted."""
        for symbol, value in values.items():
            self.program.slots[symbol.slot] = value
        return self.program.run(pool, alone)
