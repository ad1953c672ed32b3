"""Functions and kernels for the device, and instructions by their PTX text: what Numba's CUDA target has no name for.

In Numba's simulator (NUMBA_ENABLE_CUDASIM=1) an instruction's meaning in Python runs instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.core import config

SIMULATED = bool(config.ENABLE_CUDASIM)
FULL = 0xFFFFFFFF

if SIMULATED:
    i32, u32, i64, f32 = np.int32, np.uint32, np.int64, np.float32
else:
    from numba import types
    from numba.cuda.core import config as cuda_config

    cuda_config.CUDA_LOW_OCCUPANCY_WARNINGS = 0         # small grids are meant: a warning for each would reach the user

    i32, u32, i64, f32 = types.int32, types.uint32, types.int64, types.float32


def device(function: Callable) -> Any:
    """A function for the device, inlined where it is called. Plain Python in the simulator, which runs it as it is."""
    return function if SIMULATED else cuda.jit(function, device=True, forceinline=True)


def kernel(function: Callable) -> Any:
    """A kernel: fast arithmetic (approximate division and exponentials, fused multiply-add), no debug information."""
    return exact_kernel(function, fastmath=True)


def exact_kernel(function: Callable, fastmath: bool = False) -> Any:
    """A kernel whose arithmetic rounds as it should."""
    made = cuda.jit(function, fastmath=fastmath)
    if not SIMULATED:
        from pyggml.backends.cuda.kernelcache import KernelCache

        made._cache = KernelCache(function)
    return made


def instruction(ptx: str | Callable[[tuple[int, int]], str], result: Any, args: tuple, meaning: Callable, *,
                pure: bool = True, memory: bool = False, warp: bool = False) -> Any:
    """A device function that emits `ptx`: operands $0.. are the results, then the arguments.

    ptx      the text, or a function from the compute capability to the text
    result   a Numba type, a tuple of equal types, or None
    args     Numba types; "global" and "shared" take an array, and the next argument is a byte offset into it
    pure     the same operands give the same result at any time, so that the compiler may move or merge it
    memory   it reads or writes memory that this kernel changes
    warp     all lanes execute it together: the compiler must not move it into a branch that only some of them take
    """
    return _simulated(meaning, result) if SIMULATED else _intrinsic(ptx, result, args, pure, memory, warp)


def _simulated(meaning: Callable, result: Any) -> Callable:
    """`meaning` with results of the instruction's types."""
    def as_type(kind, value):
        return kind(int(value) & FULL) if kind is u32 else kind(value)

    def call(*operands):
        with np.errstate(all="ignore"):
            got = meaning(*operands)
        if isinstance(result, tuple):
            return tuple(as_type(kind, value) for kind, value in zip(result, got, strict=True))
        return None if result is None else as_type(result, got)
    return call


def _intrinsic(ptx, result, args, pure, memory, warp):
    from llvmlite import ir
    from numba.core import targetconfig
    from numba.cuda.extending import intrinsic

    results = result if isinstance(result, tuple) else () if result is None else (result,)
    returned = types.none if result is None else types.UniTuple(result[0], len(result)) if isinstance(result, tuple) else result
    llvm = {i32: ir.IntType(32), u32: ir.IntType(32), i64: ir.IntType(64), f32: ir.FloatType()}
    letter = {i32: "r", u32: "r", i64: "l", f32: "f"}
    attributes = (*(["convergent"] if warp else []), *([] if memory or not pure else ["readnone", "nounwind"]))

    def codegen(context, builder, signature, values):
        operands, letters, address = [], [], None
        for kind, type_, value in zip(args, signature.args, values, strict=True):
            if kind in ("global", "shared"):
                address = builder.ptrtoint(context.make_array(type_)(context, builder, value).data, ir.IntType(64))
                if kind == "shared":                    # a 32-bit address, and one conversion for all uses of the array
                    convert = ir.FunctionType(ir.IntType(64), [ir.IntType(64)])
                    address = builder.call(ir.InlineAsm(convert, "cvta.to.shared.u64 $0, $1;", "=l,l"), [address])
                continue
            if address is not None:
                value, address = builder.add(address, value), None
            operands.append(value)
            letters.append(letter[kind])
        cc = targetconfig.ConfigStack().top().compute_capability
        text = ptx(cc) if callable(ptx) else ptx
        out = ir.VoidType() if not results else llvm[results[0]] if len(results) == 1 else ir.LiteralStructType([llvm[r] for r in results])
        constraint = ",".join([*("=" + letter[r] for r in results), *letters, *(["~{memory}"] if memory else [])])
        function = ir.FunctionType(out, [value.type for value in operands])
        made = builder.call(ir.InlineAsm(function, text, constraint, side_effect=memory or not pure), operands, attrs=attributes)
        if not results:
            return context.get_dummy_value()
        if not isinstance(result, tuple):
            return made
        array = ir.Constant(ir.ArrayType(llvm[results[0]], len(results)), ir.Undefined)
        for n in range(len(results)):
            array = builder.insert_value(array, builder.extract_value(made, n) if len(results) > 1 else made, n)
        return array

    def typed(given):
        return returned(*(given[n] if kind in ("global", "shared") else kind for n, kind in enumerate(args))), codegen

    # an intrinsic's arity is read off its Python signature
    names = "".join(f"a{n}, " for n in range(len(args)))
    scope: dict[str, Any] = {"typed": typed}
    exec(f"def op(typingctx, {names}): return typed(({names}))", scope)
    scope["op"].instruction = ptx, result, args, pure, memory, warp     # what kernelcache.py knows it by
    return intrinsic(scope["op"])
