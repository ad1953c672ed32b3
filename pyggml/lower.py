"""Lowering: calls become steps, their attributes the numbered sources and numbers of native/engine.h.

It also decides how activations reach a matrix: prepared privately by each worker (few columns), or once, by all workers
together, in a step of its own that every matrix with the same input shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pyggml.backends.base import Weights
from pyggml.errors import PyggmlError
from pyggml.fuse import Call
from pyggml.graph import Tensor
from pyggml.native import lib
from pyggml.ops import basic, moe, rope

SMALL = lib.PYG_SMALL_COLS if lib else 0        # up to this many tokens a batch is a small one, which has kernels of its own


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

    def __init__(self, store: Weights, rows: Callable[[Tensor], int], fixed: bool) -> None:
        self.store, self.rows, self.fixed = store, rows, fixed
        self.prepared: dict[tuple[int, int, int], Tensor] = {}
        self.act_ids: dict[tuple[int, int, int], int] = {}
        self.multiplied: set[int] = set()        # weights that a matmul reads, by id
        self.rounds = False                      # a matmul so far rounds its activations to 8 bits
        self.steps: list[Step] = []

    def lower(self, c: Call) -> None:
        a = c.attrs
        simple: dict[str, tuple[list[int], list[float]]] = {
            "get_rows": ([], [a.get("scale", 1.0)]), "add": ([], []), "mul": ([], []),
            "scale": ([], [a.get("factor", 1.0)]), "softcap": ([], [a.get("cap", 1.0)]), "rope_table": ([], [a.get("mscale", 1.0)]),
            "attention": ([a.get("window", 0), self.coarse, int(self.fixed)], [a.get("scale", 1.0), a.get("softcap", 0.0)]),
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
            self.emit(c, c.srcs, [a["window"], rope.MODES.index(a["mode"]), 2 * self.half(c.srcs[7]), self.coarse], [a["scale"], a["softcap"]])
        elif c.op == "moe_route":
            self.emit(c, [c.srcs[0], *c.also], [moe.GATING.index(a["gating"]), int(a["normalize"])], [a["scale"]])
        elif c.op == "moe_sum":
            self.emit(c, [*c.srcs, a.get("residual")])
        elif c.op == "rms_norm":
            self.emit(c, [*c.srcs, a.get("residual")], f=[a["eps"]])
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

    @property
    def coarse(self) -> int:
        """Whether attention may round products to bf16."""
        return int(self.rounds)

    def format_of(self, weight: Tensor) -> int:
        """How this weight's matmul reads its activations (ACT_* of native/engine.h; 0: as floats)."""
        format = self.store.act_format(weight, self.fixed)
        self.rounds |= lib is not None and format % lib.PYG_ACT_WIDE != 0
        return format

    def matmul(self, c: Call) -> None:
        a, weight, x, norm = c.attrs, c.srcs[0], c.srcs[1], c.attrs.get("norm")
        assert weight is not None and x is not None
        self.multiplied.update(id(w) for w in (weight, a.get("up")) if w is not None)
        format = self.format_of(weight)
        if (up := a.get("up")) is not None and self.store.act_format(up, self.fixed) != format:      # two types: no common activations
            gate_out, up_out = (Tensor("matmul", (), c.out.shape) for _ in range(2))
            self.matmul(Call("mul_mat", gate_out, [weight, x], {k: a[k] for k in ("norm", "eps", "bias") if k in a}))
            self.matmul(Call("mul_mat", up_out, [up, x], {"bias": a.get("bias_up"), **{k: a[k] for k in ("norm", "eps") if k in a}}))
            self.emit(Call("glu", c.out, []), [gate_out, up_out], [basic.GLU.index(a["kind"])])
            return
        act = self.act_id(x, norm, format)
        i = [act, format, 0]
        eps = a.get("eps", 0.0)
        if self.rows(x) > self.store.small:
            key = (id(x), id(norm), format)
            if key not in self.prepared:
                bytes_needed = self.store.act_bytes(format, weight.sizes[-1], self.rows(x))
                self.prepared[key] = Tensor("prepare", (x, norm), (bytes_needed,), "I8")
                self.emit(Call("prepare", self.prepared[key], []), [x, norm], i, [eps])
            x, norm, i = self.prepared[key], None, [act, format, 1]
        if c.op == "glu_mat":
            self.emit(c, [weight, x, norm, up, a.get("bias"), a.get("bias_up")], [*i, basic.GLU.index(a["kind"])], [eps])
        else:
            self.emit(c, [weight, x, norm, a.get("bias"), a.get("residual")], i, [eps, a.get("scale", 1.0), a.get("softcap", 0.0)])

    def matmul_id(self, c: Call) -> None:
        a = c.attrs
        weight, x, ids = c.srcs
        assert weight is not None and x is not None
        self.multiplied.update(id(w) for w in (weight, a.get("up")) if w is not None)
        format, norm = self.format_of(weight), a.get("norm")
        i, f = [self.act_id(x, norm, format), format, 0], [a.get("eps", 0.0)]
        if c.op == "glu_mat_id":
            if self.store.act_format(a["up"], self.fixed) != format:
                raise PyggmlError(f"{weight.name} and {a['up'].name} have types whose activations differ; quantize them to one type")
            self.emit(c, [weight, x, norm, ids, a["up"], a.get("bias"), a.get("bias_up")], [*i, basic.GLU.index(a["kind"])], f)
        else:
            self.emit(c, [weight, x, norm, ids, a.get("bias")], i, f)
