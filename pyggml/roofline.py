"""How much work a step is, and what the machine can do at best: the two sides of a roofline (Williams et al. 2009)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pyggml.backends.cpu import Pool, Program
from pyggml.graph import OUTPUTS, TOKENS, Symbol, Tensor
from pyggml.lower import Step
from pyggml.native import huge_zeros, lib
from pyggml.types import tensor_type


class Batch(NamedTuple):
    """What one native call computed."""

    tokens: int
    outputs: int
    seen: int           # cells that tokens see, summed over tokens
    cached: int         # cells that any token sees


def batch_of(n: int, m: int, cell: np.ndarray, first: np.ndarray) -> Batch:
    """What a batch of n tokens with m rows of logits does, when token i sees the cells first[i]..cell[i]."""
    ends: dict[int, int] = {}
    for f, c in zip(first.tolist(), cell.tolist(), strict=True):
        ends[f] = max(ends.get(f, f), c + 1)
    return Batch(n, m, int((cell - first + 1).sum()), sum(end - f for f, end in ends.items()))


class Work(NamedTuple):
    """Bytes read and written, multiplications, and what multiplies: "int8", "float" or "" where that is not the point."""

    bytes: int
    macs: int
    kind: str


def work(step: Step, size: Callable[[Tensor], tuple[int, ...]], batch: Batch, exact: bool) -> Work:
    """Of one step in one batch. `size` gives a tensor's shape in it. Weights count once, and no more experts than there are choices."""
    def nbytes(t: Tensor | None) -> int:
        return 0 if t is None else tensor_type(t.type).row_bytes(math.prod(size(t)))

    out = size(step.out)
    if step.op in ("mul_mat", "glu_mat", "mul_mat_id", "glu_mat_id"):
        weights = [t for t in step.src if t is not None and t.op == "weight" and len(t.shape) > 1]
        experts, columns = (weights[0].sizes[0], math.prod(out[:-1])) if step.op.endswith("_id") else (1, out[0])
        used = min(experts, columns)
        read = sum(nbytes(w) for w in weights) * used // experts
        others = sum(nbytes(t) for t in (step.out, *step.src) if t is not None and all(t is not w for w in weights))
        kind = "int8" if not exact and lib.pyg_act_format(tensor_type(weights[0].type).id, 1, 0) else "float"
        return Work(read + others, len(weights) * out[-1] * weights[0].sizes[-1] * columns, kind)
    if step.op in ("attention", "attention_step"):
        heads, keys = size(step.src[0])[1:], step.src[1]  # type: ignore[arg-type]
        window = step.i[0]
        cached, seen = (min(batch.cached, window + batch.tokens), min(batch.seen, window * batch.tokens)) if window else (batch.cached, batch.seen)
        cell = sum(nbytes(t) // math.prod(size(t)[:-1]) for t in step.src[1:3] if t is not None) * size(keys)[0]  # type: ignore[arg-type]
        return Work(cached * cell + nbytes(step.src[0]) + nbytes(step.out), 2 * math.prod(heads) * seen, "float")
    if step.op == "get_rows":
        table = step.src[0]
        return Work(nbytes(step.out) + out[0] * tensor_type(table.type).row_bytes(out[-1]), 0, "")  # type: ignore[union-attr]
    caches = ("cache", "store")         # stored rows are as many as the source's, not as the cache's
    return Work(sum(nbytes(t) for t in (step.out, *step.src) if t is not None and t.op not in caches), 0, "")


class OpTime(NamedTuple):
    """A step's share of the batches so far."""

    op: str
    what: str           # the weight it reads, or what it writes
    ns: int
    bytes: int          # read and written
    macs: int           # multiplications ...
    kind: str           # ... of "int8" or "float", "" where there are none


def op_times(plan: Any, batches: list[Batch], exact: bool) -> list[OpTime]:
    """Every step of a timed plan with its time, and its work in these batches."""
    rows = []
    for step, ns in zip(plan.steps, plan.program.step_ns, strict=True):
        done = [work(step, sizes_at({TOKENS: b.tokens, OUTPUTS: b.outputs}), b, exact) for b in batches]
        what = next((t.name for t in step.src if t is not None and t.op == "weight"), step.out.name or step.out.op)
        rows.append(OpTime(step.op, what, int(ns), sum(w.bytes for w in done), sum(w.macs for w in done), done[0].kind if done else ""))
    return rows


def sizes_at(values: dict[Symbol, int]) -> Callable[[Tensor], tuple[int, ...]]:
    """A function that gives a tensor's shape when the symbols have these values."""
    return lambda t: tuple(values[d] if isinstance(d, Symbol) else d for d in t.shape)


class Peaks(NamedTuple):
    """The best this machine does with so many threads: bytes read from memory and multiplications, each a second."""

    read: float
    int8: float
    floats: float

    def least(self, w: Work) -> tuple[float, str]:
        """The seconds that work takes at best, and what the limit is then: "memory" or "compute"."""
        compute = w.macs / (self.int8 if w.kind == "int8" else self.floats) if w.kind else 0.0
        return max((w.bytes / self.read, "memory"), (compute, "compute"))


READ_BYTES, CHUNK = 256 << 20, 1 << 20          # beyond any cache; a chunk that a worker reads at once


def measure_peaks(n_threads: int | None = None, runs: int = 5) -> Peaks:
    """The fastest of some runs of loops that do nothing else (native/kernels/peak.h); about a third of a second."""
    pool = Pool(n_threads)
    memory = huge_zeros(READ_BYTES)
    memory[:] = 3
    chunks = memory.reshape(-1, CHUNK)
    done = np.zeros(len(chunks), np.float32)

    def best(kind: int) -> float:
        program = Program()
        program.step("peak", program.view(done), [program.view(chunks)], [kind])
        program.finish()
        rates = []
        for _ in range(runs):
            start = time.perf_counter()
            program.run(pool)
            rates.append(float(done.sum(dtype=np.float64)) / (time.perf_counter() - start))
        return max(rates)

    int8, floats, read = (best(kind) for kind in range(3))
    return Peaks(read, int8, floats)
