"""From a graph to a plan: which steps compute it, in what order, and where every value lives.

    fuse.py     one call per node, then patterns that make one step of several
    lower.py    steps with numbered sources; activations quantized once for all matmuls that read them
    levels      steps sorted by depth; a barrier stands only before a level
    memory      values that are never alive at the same level share bytes
    Schedule    all of that, with no memory taken yet
    Plan        views and steps of a backend's Program (backends/base.py), inputs and outputs as arrays

What differs between runs (tokens, rows of logits) stays a slot of the program; nothing is planned twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyggml.backends.base import Input, Weights
from pyggml.fuse import Calls, fuse, through
from pyggml.graph import Tensor
from pyggml.lower import SMALL, Lowering, Step
from pyggml.roofline import Batch, Work, work
from pyggml.shapes import SYMBOLS, TOKENS, Shape, Symbol
from pyggml.types import tensor_type

ALIGN = 64


def root(t: Tensor) -> Tensor:
    """The node whose memory `t` names: reshapes see through to their source, a stored cache is the cache."""
    while t.op in ("reshape", "store"):
        t = t.srcs[0]  # type: ignore[assignment]
    return t


def sort_levels(steps: list[Step]) -> list[Step]:
    """Give each step its depth and sort by it, so that one barrier before each level is enough."""
    depth: dict[int, int] = {}
    for s in steps:
        # a store makes its cache anew: whoever reads the cache tensor through it comes later
        sources = [through(t) for t in s.reads]
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


class Schedule:
    """A graph as steps with places in memory, before any memory is taken."""

    def __init__(self, wanted: Sequence[Tensor], store: Weights, limits: dict[Symbol, int], fixed: bool = False) -> None:
        self.limits = limits
        calls = Calls(wanted, small=max(limits.values()) <= SMALL and not fixed)
        fuse(calls)
        lowering = Lowering(store, lambda t: self.sizes(t)[0], fixed)
        for call in calls.list:
            lowering.lower(call)
        self.multiplied = lowering.multiplied
        self.steps = sort_levels(lowering.steps)
        self.offsets, self.nbytes = assign_memory(self.steps, wanted, lambda t: tensor_type(t.type).row_bytes(math.prod(self.sizes(t))))

    def sizes(self, t: Tensor) -> tuple[int, ...]:
        """The largest shape of a value."""
        return tuple(self.limits[d] if isinstance(d, Symbol) else d for d in t.shape)


def slot_of(shape: Shape) -> int:
    """The slot of the symbol in a shape, -1 where there is none."""
    return next((d.slot for d in shape if isinstance(d, Symbol)), -1)


# ---- the plan ---------------------------------------------------------------------------------------------------------------

class Plan:
    """A graph ready to run on the backend that holds its weights.

    `limits` gives the largest value of each symbol. Fill `inputs[name][:n]`, then `run({TOKENS: n, ...})`; `output` is an
    array over memory that the next run overwrites. `capture` names further nodes whose values are wanted: they are kept apart
    from fusions, and `captured` holds an array for each, likewise. `fixed` plans give a token the same bits in every batch: one way to
    prepare activations and one way to attend, whatever the limits.
    """

    def __init__(self, output: Tensor, store: Weights, limits: dict[Symbol, int], timing: bool = False,
                 capture: Sequence[Tensor] = (), fixed: bool = False) -> None:
        self.limits = limits
        wanted = [output, *capture]
        schedule = Schedule(wanted, store, limits, fixed)
        self.steps = schedule.steps
        for step in self.steps:
            if step.op == "get_rows" and (table := step.src[0]) is not None and table.op == "weight":
                store.keep_rows(table.name)
        self.program = program = store.program(len(SYMBOLS))
        memory = program.memory(schedule.nbytes)
        leaves = (root(t) for s in self.steps for t in s.reads if root(t).op == "input")
        placed = program.inputs({t.name: Input(schedule.sizes(t), np.int32 if t.type == "I32" else np.float32, slot_of(t.shape)) for t in leaves})
        self.inputs = {name: host for name, (host, _) in placed.items()}
        views: dict[tuple[int, tuple], int] = {}

        def array(t: Tensor) -> Any:
            if t.op == "input":
                return placed[t.name][1]
            if t.op == "const":
                return program.constant(t.data)
            if t.op == "cache":
                return t.data.raw
            return memory[schedule.offsets[id(t)]:]

        def view(t: Tensor | None) -> int:
            if t is None:
                return -1
            source = root(t)
            shape = source.shape if t.op == "store" else t.shape
            key = (id(source), shape)
            if key not in views:
                if source.op == "weight":
                    views[key] = store.view(program, source, pack=id(source) in schedule.multiplied)
                else:
                    numbers = tuple(limits[d] if isinstance(d, Symbol) else d for d in shape)
                    views[key] = program.view(array(source), source.type, numbers, slot=slot_of(shape))
            return views[key]

        level = 0
        for s in self.steps:
            program.step(s.op, view(s.out), [view(t) for t in s.src], s.i, s.f, sync=s.level != level)
            level = s.level
        self.output, *self.captured = (program.result(array(root(t)), t.type, schedule.sizes(t), slot_of(t.shape)) for t in wanted)
        program.finish(timing)
        self._done = np.zeros((len(self.steps), len(Work._fields)), np.int64)       # the work of each step so far
        self._exact = bool(getattr(store, "exact", False))

    def run(self, pool: Any, values: dict[Symbol, int], alone: bool = False) -> bool:
        """Compute for these sizes, by the pool or by the calling thread alone. False when it was aborted."""
        for symbol, value in values.items():
            self.program.slots[symbol.slot] = value
        done = self.program.run(pool, alone)
        if self.program.step_ns is not None:
            self._count(values)
        return done

    def fill(self, given: dict[str, Any], counts: dict[str, int]) -> None:
        """Write the first counts[name] values of each input that this graph has."""
        for name, values in given.items():
            if name in self.inputs:
                self.inputs[name][:counts[name]] = values

    def abort(self, value: bool) -> None:
        """Stop a run soon (True), or let runs go on again (False); callable from any thread."""
        self.program.aborted[0] = value

    def row(self, token: int, position: int) -> np.ndarray | None:
        """Logits after one token, float32 (n_vocab), by a program that goes on by itself; None where it does not."""
        return self.program.ahead.row(token, position) if self.program.ahead is not None else None

    def stop(self) -> None:
        """Forget what was computed ahead."""
        if self.program.ahead is not None:
            self.program.ahead.stop()

    # ---- measuring ----

    def op_times(self) -> list[StepTime]:
        """What every step took so far, for a plan made with timing."""
        if self.program.step_ns is None:
            return []
        rows = zip(self.steps, self.program.step_ns, self._done.tolist(), strict=True)
        return [StepTime(s.op, label(s), int(ns), Work(*done)) for s, ns, done in rows]

    def _count(self, values: dict[Symbol, int]) -> None:
        """Add the work of each step of this run."""
        n = values[TOKENS]
        cell, first = (self.inputs[name][:n] if name in self.inputs else np.zeros(n, np.int32) for name in ("cell", "first"))
        sequences = {f: int(cell[first == f].max()) - f + 1 for f in set(first.tolist())}
        batch = Batch(int((cell - first + 1).sum()), sum(sequences.values()))
        for i, step in enumerate(self.steps):
            self._done[i] += work(step, lambda t: tuple(values[d] if isinstance(d, Symbol) else d for d in t.shape), batch, self._exact)


class StepTime(NamedTuple):
    """A step of a plan with its share of the runs so far."""

    op: str
    what: str           # the weight it reads, or what it writes
    ns: int
    work: Work


def label(step: Step) -> str:
    return next((t.name for t in step.src if t is not None and t.op == "weight"), step.out.name or step.out.op)
