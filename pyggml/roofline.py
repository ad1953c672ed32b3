"""How much work a step is, and what the machine can do at best: the two sides of a roofline (Williams et al. 2009)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pyggml.native import huge_zeros, lib
from pyggml.types import tensor_type

if TYPE_CHECKING:
    from pyggml.graph import Tensor
    from pyggml.lower import Step


class Batch(NamedTuple):
    """What one native call computed."""

    seen: int           # cells that tokens see, summed over tokens
    cached: int         # cells that any token sees


class Work(NamedTuple):
    """Bytes read and written, and multiplications of each kind (bf16: of a processor for which that is faster than floats)."""

    bytes: int
    int8: int = 0
    floats: int = 0
    bf16: int = 0

    @property
    def macs(self) -> int:
        return self.int8 + self.floats + self.bf16


def work(step: Step, size: Callable[[Tensor], tuple[int, ...]], batch: Batch, exact: bool) -> Work:
    """Of one step in one batch. `size` gives a tensor's shape in it. Weights count once, and no more experts than there are choices."""
    def nbytes(t: Tensor | None) -> int:
        return 0 if t is None else tensor_type(t.type).row_bytes(math.prod(size(t)))

    out = size(step.out)
    if step.op in ("mul_mat", "glu_mat", "mul_mat_id", "glu_mat_id"):
        of_experts = step.op.endswith("_id")
        weights = [t for t in step.src if t is not None and t.op == "weight" and len(t.shape) > 1 + of_experts]
        experts, columns = (weights[0].sizes[0], math.prod(out[:-1])) if of_experts else (1, out[0])
        used = min(experts, columns)
        read = sum(nbytes(w) for w in weights) * used // experts
        others = sum(nbytes(t) for t in (step.out, *step.src) if t is not None and all(t is not w for w in weights))
        kind = "int8" if tensor_type(weights[0].type).quantized and not exact else "floats"
        if lib and step.i[1] >= lib.PYG_ACT_WIDE * lib.PYG_ACT_BF16 and columns > experts * lib.PYG_WIDE_COLS:
            kind = "bf16"
        return Work(read + others, **{kind: len(weights) * out[-1] * weights[0].sizes[-1] * columns})
    if step.op in ("attention", "attention_step"):
        heads, keys = size(step.src[0])[1:], step.src[1]  # type: ignore[arg-type]
        window = step.i[0]
        n_tokens = size(step.out)[0]
        cached, seen = (min(batch.cached, window + n_tokens), min(batch.seen, window * n_tokens)) if window else (batch.cached, batch.seen)
        types = {t.type for t in step.src[1:3] if t is not None}
        coarse, fixed = (step.i[1], step.i[2]) if step.op == "attention" else (step.i[3], 1)
        kind = "bf16" if (types == {"BF16"} or coarse and "F32" not in types) and lib and lib.pyg_attends_in_bf16(n_tokens, fixed) else "floats"
        cell = sum(nbytes(t) // math.prod(size(t)[:-1]) for t in step.src[1:3] if t is not None) * size(keys)[0]  # type: ignore[arg-type]
        return Work(cached * cell + nbytes(step.src[0]) + nbytes(step.out), **{kind: 2 * math.prod(heads) * seen})
    if step.op == "get_rows":
        table = step.src[0]
        return Work(nbytes(step.out) + out[0] * tensor_type(table.type).row_bytes(out[-1]))  # type: ignore[union-attr]
    caches = ("cache", "store")
    if step.op == "store":              # it writes as many rows as it reads
        return Work(2 * sum(nbytes(t) for t in step.src if t is not None and t.op not in caches))
    return Work(sum(nbytes(t) for t in (step.out, *step.src) if t is not None and t.op not in caches))


class Peaks(NamedTuple):
    """The best this machine does with so many threads: bytes read from memory and multiplications, each a second."""

    read: float
    int8: float
    floats: float
    bf16: float

    def least(self, w: Work) -> tuple[float, str]:
        """The seconds that work takes at best, and what the limit is then: "memory" or "compute"."""
        compute = w.int8 / self.int8 + w.floats / self.floats + w.bf16 / self.bf16
        return max((w.bytes / self.read, "memory"), (compute, "compute"))


LEAST_READ, CHUNKS = 256 << 20, 256             # bytes beyond most caches; pieces of which a worker reads one at once


def beyond_caches() -> int:
    """Bytes that no cache holds: half as many again as the largest of which Linux tells (that of a server may have half a gigabyte)."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max([LEAST_READ, *(3 * int(size[:-1]) << 9 for size in sizes if size.endswith("K"))])


def measure_peaks(n_threads: int | None = None, runs: int = 5) -> Peaks:
    """The fastest of some runs of loops that do nothing else (native/kernels/peak.h); a second or two."""
    from pyggml.backends.cpu import Pool, Program

    pool = Pool(n_threads)
    chunks = huge_zeros(beyond_caches() >> 20 << 20).reshape(CHUNKS, -1)         # whole pages each
    chunks[:] = 60                      # as floats 0.01: products of much smaller ones would be denormal, which AMD's processors are slow at
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

    int8, floats, read, bf16 = (best(kind) for kind in range(4))
    return Peaks(read, int8, floats, bf16 or floats)
