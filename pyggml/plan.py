"""From a graph to a plan: which native steps compute it, in what order, and where every value lives.

    fuse.py     one call per node, then patterns that make one step of several
    lower.py    steps with numbered sources; activations quantized once for all matmuls that read them
    levels      steps sorted by depth; a barrier stands only before a level
    memory      values that are never alive at the same level share bytes
    Plan        views and steps of a Program, inputs and outputs as arrays

What differs between runs (tokens, rows of logits) stays a slot of the program; nothing is planned twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyggml.backends.cpu import Pool, Program, WeightStore
from pyggml.fuse import Calls, fuse, through
from pyggml.graph import SYMBOLS, Symbol, Tensor
from pyggml.lower import SMALL, Lowering, Step
from pyggml.native import huge_zeros
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


# ---- the plan ---------------------------------------------------------------------------------------------------------------

class Plan:
    """A graph ready to run on the CPU backend.

    `limits` gives the largest value of each symbol. Fill `inputs[name][:n]`, then `run({TOKENS: n, ...})`; `output` is an
    array over memory that the next run overwrites. `capture` names further nodes whose values are wanted: they are kept apart
    from fusions, and `captured` holds an array for each, likewise. `fixed` plans give a token the same bits in every batch: one way to
    prepare activations and one way to attend, whatever the limits.
    """

    def __init__(self, output: Tensor, store: WeightStore, limits: dict[Symbol, int], timing: bool = False,
                 capture: Sequence[Tensor] = (), fixed: bool = False) -> None:
        self.limits = limits
        self.batches: list[Any] = []        # of a plan that is timed: what its runs computed (roofline.Batch)
        wanted, sizes = [output, *capture], self.sizes_at(limits)
        calls = Calls(wanted, small=max(limits.values()) <= SMALL and not fixed)
        fuse(calls)
        lowering = Lowering(store, lambda t: sizes(t)[0], fixed)
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

    @staticmethod
    def sizes_at(values: dict[Symbol, int]) -> Callable[[Tensor], tuple[int, ...]]:
        """A function that gives a tensor's shape when the symbols have these values."""
        return lambda t: tuple(values[d] if isinstance(d, Symbol) else d for d in t.shape)

    def run(self, pool: Pool, values: dict[Symbol, int], alone: bool = False) -> bool:
        """One native call for these sizes, by the pool or by the calling thread alone. False when it was aborted."""
        for symbol, value in values.items():
            self.program.slots[symbol.slot] = value
        return self.program.run(pool, alone)
