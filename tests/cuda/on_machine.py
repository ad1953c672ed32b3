"""Lets Numba compile kernels for a GPU that is not there, and runs their PTX on the machine of tests/cuda/ptx, over numpy arrays.

Arguments are typed and kernels compiled as for a launch on a GPU; only what loads and launches them is replaced.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numba.cuda.codegen as codegen
import numba.cuda.dispatcher as dispatcher
import numpy as np
from numba import cuda, types
from ptx.machine import Program
from ptx.memory import Global

CAPABILITY = (8, 0)
LAST_ONLY = False                                   # of every grid's blocks only the last runs
_programs: dict[Any, Program] = {}


def install(capability: tuple[int, int] = CAPABILITY) -> None:
    gpu = SimpleNamespace(id=0, compute_capability=capability)
    dispatcher.get_current_device = lambda: gpu
    codegen.CUDACodeLibrary._ensure_cc = lambda self, cc: cc or capability
    dispatcher.driver = SimpleNamespace(_to_core_stream=lambda stream: stream)
    dispatcher._Kernel.bind = lambda self: None
    dispatcher._Kernel.launch = lambda self, args, grid, block, stream=0, shared=0: launch(self, args, grid, block, shared, capability)
    cuda.get_current_device = lambda: gpu
    cuda.to_device = lambda array: array
    cuda.synchronize = lambda: None


def launch(kernel: Any, args: Any, grid: Any, block: Any, shared: int, capability: tuple[int, int]) -> None:
    program = _programs.get(kernel)
    if program is None:
        program = _programs[kernel] = Program(kernel._codelibrary.get_asm_str(cc=capability))
    memory = Global()
    params = [p for n, (t, v) in enumerate(zip(kernel.argument_types, args, strict=True)) for p in arguments(memory, t, v, f"argument {n}")]
    program.only().launch(memory, grid, block, params, shared, LAST_ONLY)


def arguments(memory: Global, type_: Any, value: Any, what: str) -> list[bytes]:
    """The parameters that a value becomes: an array's are seven (_Kernel._prepare_args)."""
    if isinstance(type_, types.Array):
        words = [0, 0, value.size, value.itemsize, memory.address(value, what), *value.shape, *value.strides]
        return [np.uint64(word).tobytes() for word in words]
    if isinstance(type_, (types.Integer, types.Boolean, types.Float)):
        return [np.dtype("bool" if type_ == types.boolean else str(type_)).type(value).tobytes()]
    raise TypeError(f"{what} is a {type_}")
