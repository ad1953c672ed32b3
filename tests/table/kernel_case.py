"""Runs one kernel through a one-step Program and measures it against a numpy reference."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache

import numpy as np

from pyggml import native
from pyggml.backends.cpu import Pool, Program

ISAS = [name for name, usable in native.isa_names().items() if usable]
THREADS = (1, 2, 3, 7)

# as in native/engine.h
GLU_SILU, GLU_GELU, GLU_RELU, GLU_CLAMPED = range(4)
ROPE_NORM, ROPE_NEOX = range(2)
MOE_SOFTMAX, MOE_SIGMOID = range(2)


@contextmanager
def instruction_set(name: str):
    """Run the body with one instruction set, then return to the one that was chosen at import."""
    native.select_isa(name)
    try:
        yield
    finally:
        native.select_isa(native.isa)



@cache
def pool(threads: int = 1) -> Pool:
    """A pool of `threads`, shared by all tests."""
    return Pool(threads)


def run(op: str, isa: str, dst, src, i=(), f=(), threads: int = 1) -> int:
    """One step. `dst` and each of `src` is an array, an (array, keywords of Program.view) pair, or None. Returns barriers passed."""
    program = Program()

    def add(operand) -> int:
        if operand is None:
            return -1
        array, options = operand if isinstance(operand, tuple) else (operand, {})
        return program.view(array, **options)

    with instruction_set(isa):
        program.step(op, add(dst), [add(x) for x in src], i, f)
        program.finish()
        workers = pool(threads)
        before = workers.barriers
        assert program.run(workers)
        return workers.barriers - before


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    """Mean squared error relative to the reference's power; NaN in `got` gives NaN, which no bound accepts."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(((got - want) ** 2).sum() / max((want ** 2).sum(), 1e-300))
