"""The CPU backend (see base.py). Its program: views and steps in the arrays that native/pool.c walks, and the thread pool that walks them.

`Program` is the narrow waist between Python and C: the planner fills it, kernel tests fill it by hand. After `finish()`
nothing is allocated any more; `run()` is one native call.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyggml.backends.base import Input
from pyggml.backends.placement import Place, physical_cores
from pyggml.errors import PyggmlError
from pyggml.native import ffi, huge_zeros, lib
from pyggml.types import tensor_type

if TYPE_CHECKING:
    from pyggml.graph import Tensor

log = logging.getLogger("pyggml")

OPS: dict[str, int] = {ffi.string(lib.pyg_op_name(i)).decode(): i for i in range(lib.pyg_op_count())} if lib else {}
_NUMPY_TYPES = {np.dtype(d): name for d, name in ((np.float32, "F32"), (np.int32, "I32"), (np.float16, "F16"), (np.int8, "I8"), (np.uint8, "I8"))}


def _threads() -> set[int]:
    """Ids of this process's threads, where the system tells."""
    tasks = Path("/proc/self/task")
    return {int(task.name) for task in tasks.iterdir()} if tasks.exists() else set()


class Pool:
    """A persistent pool of `n_threads` workers; the calling thread is one of them.

    place: the processors of each of so many workers (see placement.py); None leaves all to the system.
    """

    def __init__(self, n_threads: int | None = None, place: Place | None = None) -> None:
        self.n_threads = n_threads or physical_cores()
        before = _threads() if place is not None else set()
        self._pool = ffi.gc(lib.pyg_pool_new(self.n_threads), lib.pyg_pool_free)
        if self._pool == ffi.NULL:
            raise PyggmlError(f"cannot start {self.n_threads} threads; use fewer (-t)")
        if place is not None:
            for thread, cpus in zip([0, *sorted(_threads() - before)], place(self.n_threads), strict=False):
                os.sched_setaffinity(thread, cpus)

    @property
    def barriers(self) -> int:
        """Barriers passed since the pool was made."""
        return lib.pyg_barriers(self._pool)


class WeightStore:
    """The weights of one model as the CPU backend holds them: raw in the file's mapping, and packed where a packed form exists.

    Packing is lazy: a tile is packed by the worker that first computes with it, into one arena of huge pages, and the file's
    pages behind it are released; of a file that is not mapped, what was read. `exact` keeps every weight raw and multiplies decoded
    weights with float activations. `lock` keeps in memory what matmuls read, and warns once where the system refuses.
    """

    small = lib.PYG_SMALL_COLS if lib else 0
    SLAB = 1 << 30          # packed weights lie one after another: apart, each would leave part of its last huge page unused

    def __init__(self, *, repack: bool = True, exact: bool = False, capacity: int = SLAB, lock: bool = False) -> None:
        self.repack, self.exact, self.capacity, self._lock = repack and not exact, exact, capacity, lock
        self._read: dict[str, np.ndarray] = {}          # what is not mapped, until it is packed
        self._slab, self._used = np.empty(0, np.uint8), 0
        self._packed: dict[str, tuple[Any, np.ndarray] | None] = {}
        self._gathered: set[str] = set()

    def keep_rows(self, name: str) -> None:
        """This weight's rows are also read one by one (a token table): its raw form stays."""
        self._gathered.add(name)

    def packed_bytes(self, weight: Tensor) -> int:
        """Bytes of the packed form, 0 when the weight is computed from its raw rows."""
        shape = weight.sizes
        whole_tiles = len(shape) == 2 or shape[-2] % 16 == 0        # an expert's tiles must not straddle
        return lib.pyg_pack_bytes(tensor_type(weight.type).id, math.prod(shape[:-1]), shape[-1]) if self.repack and whole_tiles else 0

    def act_format(self, weight: Tensor, fixed: bool) -> int:
        """How activations are prepared for this weight (ACT_* of native/engine.h); `fixed`: as for a packed one, whatever the batch."""
        return lib.pyg_act_format(tensor_type(weight.type).id, self.packed_bytes(weight) > 0, self.exact, fixed)

    def act_bytes(self, format: int, k: int, columns: int) -> int:
        """Bytes of activations prepared in a step of their own: columns of k values."""
        return lib.pyg_act_bytes(format, k, columns)

    def program(self, n_slots: int) -> Program:
        return Program(n_slots)

    def view(self, program: Program, weight: Tensor, pack: bool) -> int:
        """Add the weight to a program; every program of this store shares the packed form (`pack`: it may have one)."""
        packed, ready = self._pack(weight) if pack else (None, None)
        release = packed is not None and weight.name not in self._gathered
        if release and not weight.data.mapped:
            if weight.name not in self._read:
                self._read[weight.name] = np.array(weight.data.raw)         # private: its pages go when it is packed
            raw = self._read[weight.name].reshape(-1)
        else:
            raw = weight.data.raw.reshape(-1)
            if not release:
                self._keep_in_memory(raw)
        return program.view(raw, weight.type, weight.sizes, packed=packed, ready=ready, release=release)

    def _pack(self, weight: Tensor) -> tuple[Any, np.ndarray | None]:
        if weight.name not in self._packed:
            size = self.packed_bytes(weight)
            rows = math.prod(weight.sizes[:-1])
            self._packed[weight.name] = (self._room(size), np.zeros(-(-rows // 16), np.uint8)) if size else None
        entry = self._packed[weight.name]
        return (None, None) if entry is None else entry

    def _room(self, size: int) -> np.ndarray:
        """`size` zeroed bytes, aligned to a cache line."""
        if self._used + size > self._slab.nbytes:
            self._slab, self._used = huge_zeros(max(size, min(self.capacity, self.SLAB))), 0
            self._keep_in_memory(self._slab)
        start = self._used
        self._used += -(-size // 64) * 64
        return self._slab[start:start + size]

    def _keep_in_memory(self, array: np.ndarray) -> None:
        """Lock the pages of `array`, each when it is first touched. Where that is refused, say so and stop asking."""
        if self._lock and array.nbytes and (error := lib.pyg_lock(ffi.cast("char *", array.ctypes.data), array.nbytes)):
            self._lock = False
            log.warning("cannot lock %.1f MB in memory (%s; the limit is %s, see ulimit -l): going on without", array.nbytes / 1e6,
                        os.strerror(error), lock_limit())

    @property
    def nbytes(self) -> int:
        """Bytes reserved for packed weights."""
        return sum(e[0].nbytes for e in self._packed.values() if e)


def lock_limit() -> str:
    """How much memory this process may lock, in words."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "none" if limit == resource.RLIM_INFINITY else f"{limit / 1e6:.1f} MB"


class Program:
    """Views and steps for one native call. `slots` is an int32 array of run-time values that dynamic views take a size from."""

    def __init__(self, n_slots: int = 8) -> None:
        self.slots = np.zeros(n_slots, np.int32)
        self.aborted = np.zeros(1, np.int32)
        self._views: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []
        self._keep: list[Any] = []          # whatever the views point into
        self.native_calls = 0
        self.ahead = None

    def memory(self, n_bytes: int) -> np.ndarray:
        """Memory for computed values."""
        return huge_zeros(n_bytes)

    def inputs(self, wanted: dict[str, Input]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each input (the array to fill before a run, what is viewed of it): one and the same here."""
        arrays = {name: np.zeros(i.shape, i.dtype) for name, i in wanted.items()}
        return {name: (array, array) for name, array in arrays.items()}

    def constant(self, array: np.ndarray) -> np.ndarray:
        return array

    def result(self, array: np.ndarray, type: str, shape: tuple[int, ...], slot: int) -> np.ndarray:
        """The values themselves, which the next run overwrites."""
        dtype = np.dtype(np.int32 if type == "I32" else np.float32)
        return array[:math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def view(self, array: np.ndarray, type: str | None = None, shape: Sequence[int] | None = None, *, strides: Sequence[int] | None = None,
             slot: int = -1, slot_axis: int = 0, packed: Any = None, ready: np.ndarray | None = None, release: bool = False) -> int:
        """Add a view of `array`; returns its index.

        type, shape: for block types the tensor type and its numpy shape in weights (`array` is then the raw bytes).
        strides: bytes from one index to the next for every axis but the last; contiguous by default.
        slot, slot_axis: that axis takes its length from `slots[slot]` at each run (shape gives the largest).
        """
        row = tensor_type(type or _NUMPY_TYPES[array.dtype])
        shape = tuple(array.shape if shape is None else shape)
        if strides is None:
            steps, size = [], row.row_bytes(shape[-1])
            for n in reversed(shape[:-1]):
                steps.append(size)
                size *= n
            strides = steps[::-1]
        ne = [*reversed(shape), 1, 1, 1, 1][:4]
        nb = [row.bytes, *reversed(strides)]
        while len(nb) < 4:
            nb.append(nb[-1] * ne[len(nb) - 1] if len(nb) > 1 else row.row_bytes(ne[0]))
        self._keep.append((array, packed, ready))
        pointer = ffi.cast("char *", array.ctypes.data)
        self._views.append(dict(
            data=pointer, ne=ne, nb=nb, type=row.id, slot=slot, slot_dim=len(shape) - 1 - slot_axis, release=int(release),
            packed=ffi.cast("char *", packed.ctypes.data) if packed is not None else ffi.NULL,
            ready=ffi.cast("uint8_t *", ready.ctypes.data) if ready is not None else ffi.NULL))
        return len(self._views) - 1

    def step(self, op: str, dst: int, src: Sequence[int] = (), i: Sequence[int] = (), f: Sequence[float] = (), sync: bool = True) -> int:
        """Add a step; returns its index. Absent sources are -1; `sync` puts a barrier before it."""
        self._steps.append(dict(op=OPS[op], sync=int(sync), dst=dst, src=[*src, *[-1] * (9 - len(src))], i=[*i, *[0] * (8 - len(i))],
                                f=[*f, *[0.0] * (8 - len(f))]))
        return len(self._steps) - 1

    def finish(self, timing: bool = False) -> Program:
        """Freeze into the arrays C reads."""
        self._c_views = ffi.new("pyg_view[]", self._views)
        self._c_steps = ffi.new("pyg_step[]", self._steps)
        self.step_ns: np.ndarray | None = np.zeros(len(self._steps), np.int64) if timing else None
        self._plan = ffi.new("pyg_plan *", dict(
            views=self._c_views, n_views=len(self._views), steps=self._c_steps, n_steps=len(self._steps),
            slots=ffi.cast("int32_t *", self.slots.ctypes.data),
            step_ns=ffi.cast("int64_t *", self.step_ns.ctypes.data) if self.step_ns is not None else ffi.NULL,
            abort=ffi.cast("int32_t *", self.aborted.ctypes.data)))
        lib.pyg_plan_sizes(self._plan)
        return self

    def token_by_token(self, inputs: dict[str, np.ndarray], sizes: Sequence[int]) -> TokenByToken:
        """The way of single tokens through this program; inputs: what each run is given, sizes: the slots that count tokens and rows."""
        return TokenByToken(self, inputs, sizes)

    def run(self, pool: Pool, alone: bool = False) -> bool:
        """One native call, by the pool or by the calling thread alone. False when it was aborted."""
        self.native_calls += 1
        self._plan.alone = alone
        status = lib.pyg_run(pool._pool, self._plan)
        if status == 2:
            raise PyggmlError(f"no memory for {self._plan.act_bytes + self._plan.scratch} bytes of scratch per thread; use a smaller -ub")
        return status == 0


class TokenByToken:
    """Runs a program for one token, again and again.

    After a native call the processor's caches are full of weights, and every object that Python touches then comes from memory: on a
    small model an array's assignments and a few dictionaries cost more than a layer. So this writes numbers through pointers, and
    little else happens.
    """

    INPUTS = ("tokens", "pos", "cell", "first", "wanted")

    def __init__(self, program: Program, inputs: dict[str, np.ndarray], sizes: Sequence[int]) -> None:
        self._program, self._sizes = program, tuple(sizes)
        self._token, self._pos, self._cell, self._first, self._wanted = (
            _int32(inputs[name]) if name in inputs else ffi.new("int32_t[1]") for name in self.INPUTS)
        self._slots, self._aborted = _int32(program.slots), _int32(program.aborted)

    def run(self, pool: Pool, token: int, cell: int, alone: bool) -> bool:
        """The token at position `cell`, stored there and seeing all cells before it. False when it was aborted."""
        self._token[0] = token
        self._pos[0] = self._cell[0] = cell
        self._first[0] = self._wanted[0] = 0
        for slot in self._sizes:
            self._slots[slot] = 1
        self._aborted[0] = 0
        return self._program.run(pool, alone)


def _int32(array: np.ndarray) -> Any:
    """A pointer to an int32 array, which must outlive it."""
    return ffi.cast("int32_t *", array.ctypes.data)
