"""A CUDA driver without a GPU: libcuda.so.1, whose functions are the ones below, and whose kernels run as PTX on the machine of tests/cuda/ptx.

Everything above the driver is real: numba-cuda, cuda.core, cuda.bindings, and pyggml's device, graphs and stores. Work that is enqueued
waits until the host waits for it, so that whoever reads too early, or changes a buffer too early, gets it wrong here too; memory that nobody
wrote holds garbage; freed memory is gone. Asked for what a capture forbids, or without a context in the thread that asks, the driver says so as
a real one does.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from ptx.machine import Program
from ptx.memory import POISON, Fault, Global

SOURCE = """
#include <stddef.h>
typedef int (*resolver)(const char *, void **);
static resolver resolve;
void fake_driver(resolver r) { resolve = r; }
int cuGetProcAddress_v2(const char *name, void **out, int version, unsigned long flags, int *status)
{ if (status) *status = 0; return resolve(name, out); }
static void *named(const char *name) { void *p = NULL; resolve(name, &p); return p; }
int cuInit(unsigned f) { return ((int (*)(unsigned))named("cuInit"))(f); }
int cuDriverGetVersion(int *n) { return ((int (*)(int *))named("cuDriverGetVersion"))(n); }
int cuDeviceGetCount(int *n) { return ((int (*)(int *))named("cuDeviceGetCount"))(n); }
int cuDeviceGet(int *d, int i) { return ((int (*)(int *, int))named("cuDeviceGet"))(d, i); }
int cuDeviceGetName(char *s, int n, int d) { return ((int (*)(char *, int, int))named("cuDeviceGetName"))(s, n, d); }
int cuDeviceTotalMem_v2(size_t *n, int d) { return ((int (*)(size_t *, int))named("cuDeviceTotalMem"))(n, d); }
int cuDeviceGetAttribute(int *v, int a, int d) { return ((int (*)(int *, int, int))named("cuDeviceGetAttribute"))(v, a, d); }
"""
INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, INVALID_HANDLE, NOT_FOUND, LAUNCH_FAILED = 1, 2, 201, 400, 500, 719
NOT_SUPPORTED, CAPTURE_UNSUPPORTED, NOT_CAPTURING = 801, 900, 901
ERRORS = {INVALID_VALUE: "CUDA_ERROR_INVALID_VALUE", OUT_OF_MEMORY: "CUDA_ERROR_OUT_OF_MEMORY", NOT_FOUND: "CUDA_ERROR_NOT_FOUND",
          INVALID_CONTEXT: "CUDA_ERROR_INVALID_CONTEXT", INVALID_HANDLE: "CUDA_ERROR_INVALID_HANDLE", LAUNCH_FAILED: "CUDA_ERROR_LAUNCH_FAILED",
          CAPTURE_UNSUPPORTED: "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", NOT_SUPPORTED: "CUDA_ERROR_NOT_SUPPORTED"}
ATTRIBUTES = {75: 9, 76: 0, 16: 132, 1: 1024, 8: 49152, 97: 232448, 10: 32, 41: 1, 2: 1024, 3: 1024, 4: 64, 5: 2**31 - 1, 6: 65535, 7: 65535}
FUNCTION = {0: 1024, 1: 0, 2: 0, 3: 0, 4: 32, 5: 90, 6: 90, 8: 49152}
CONTEXT = 0xC0              # of the first GPU; the next one's is the next number
IN_A_CONTEXT = ("cuMem", "cuStream", "cuEvent", "cuGraph", "cuLaunch", "cuCtxSynchronize", "cuCtxGetDevice", "cuCtxPop")     # names begin so
APIS: dict[str, tuple[Any, Callable]] = {}


def api(*types: Any) -> Callable:
    """A function of the driver: its name is the method's, and it answers None or an error."""
    def mark(method: Callable) -> Callable:
        APIS[method.__name__] = ctypes.CFUNCTYPE(c_int, *types), method
        return method
    return mark


class Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [("grid", c_uint * 3), ("block", c_uint * 3), ("shared", c_uint), ("stream", c_void_p), ("attrs", c_void_p), ("count", c_uint)]


class Driver:
    """The state of it all; `problems` are faults that enqueued work ran into, `calls` counts."""

    def __init__(self, total: int = 1 << 30) -> None:
        self.total, self.used, self.peak, self.largest = total, 0, 0, total     # largest: piece that an allocation can have
        self.memory = Global()
        self.allocations: dict[int, int] = {}
        self.pinned: dict[int, Any] = {}
        self.queue: list[tuple[str, Callable]] = []
        self.captured: list[tuple[str, Callable]] | None = None
        self.legacy: list[tuple[str, Callable]] = []        # of the default stream, which other streams do not wait for
        self.objects: dict[int, Any] = {}
        self.origins: dict[int, list[int]] = {}             # the context that an object was made in
        self._contexts = threading.local()
        self.used_contexts: set[int] = set()
        self.programs: dict[str, Program] = {}          # by the name of the entry
        self.calls: dict[str, int] = {}
        self.problems: list[str] = []
        self._next = 0x1000
        self._kept: dict[str, Any] = {}

    # ---- plumbing ----

    def resolve(self, name: bytes, out: Any) -> int:
        text = name.decode()
        if text not in self._kept:
            kind, method = APIS.get(text, (ctypes.CFUNCTYPE(c_int), None))
            self._kept[text] = kind(self._guarded(text, method))
        out[0] = ctypes.cast(self._kept[text], c_void_p).value
        return 0

    def _guarded(self, name: str, method: Callable | None) -> Callable:
        def call(*args: Any) -> int:
            self.calls[name] = self.calls.get(name, 0) + 1
            if method is None:
                self.problems.append(f"{name} is not there")
                return NOT_SUPPORTED
            if name.startswith(IN_A_CONTEXT) and not self.context:
                self.problems.append(f"{name}: the thread has no context")
                return INVALID_CONTEXT
            try:
                return method(self, *args) or 0
            except Exception as error:      # noqa: BLE001  an exception cannot pass through C
                self.problems.append(f"{name}: {type(error).__name__}: {error}")
                return LAUNCH_FAILED
        return call

    @property
    def context(self) -> list[int]:
        """The contexts of the calling thread, the current one last."""
        if not hasattr(self._contexts, "stack"):
            self._contexts.stack = []
        return self._contexts.stack

    def new(self, thing: Any) -> int:
        self._next += 16
        self.objects[self._next], self.origins[self._next] = thing, self.context[-1:]
        return self._next

    def enqueue(self, what: str, work: Callable) -> None:
        (self.queue if self.captured is None else self.captured).append((what, work))

    def finish(self, everything: bool = False) -> int:
        """Do what waits; a capture does not allow to ask for it."""
        if self.captured is not None:
            return CAPTURE_UNSUPPORTED
        waiting, self.queue = [*(self.legacy if everything else []), *self.queue], []
        if everything:
            self.legacy = []
        for what, work in waiting:
            try:
                work()
            except Fault as error:
                self.problems.append(f"{what}: {error}")
                return LAUNCH_FAILED
        return 0

    def device(self, at: int, n_bytes: int) -> np.ndarray:
        segment = self.memory.segments.get(at >> 40)
        offset = at & ((1 << 40) - 1)
        if segment is None or offset + n_bytes > len(segment.bytes):
            raise Fault(f"{n_bytes} bytes at {at:#x} are no memory of this GPU")
        return segment.bytes[offset:offset + n_bytes]

    def host(self, at: int, n_bytes: int) -> np.ndarray:
        return np.frombuffer((ctypes.c_uint8 * n_bytes).from_address(at), np.uint8)

    def is_pinned(self, at: int) -> bool:
        return any(start <= at < start + len(block) for start, block in self.pinned.items())

    # ---- devices and contexts ----

    @api(c_uint)
    def cuInit(self, flags): pass

    @api(POINTER(c_int))
    def cuDriverGetVersion(self, out): out[0] = 12090

    @api(POINTER(c_int))
    def cuDeviceGetCount(self, out): out[0] = 2

    @api(POINTER(c_int), c_int)
    def cuDeviceGet(self, out, index): out[0] = index

    @api(c_void_p, c_int, c_int)
    def cuDeviceGetName(self, out, n, device): ctypes.memmove(out, b"Fake\0", 5)

    @api(c_void_p, c_int)
    def cuDeviceGetUuid(self, out, device): ctypes.memset(out, 7 + device, 16)

    @api(POINTER(c_size_t), c_int)
    def cuDeviceTotalMem(self, out, device): out[0] = self.total

    @api(POINTER(c_int), c_int, c_int)
    def cuDeviceGetAttribute(self, out, attribute, device): out[0] = ATTRIBUTES.get(attribute, 0)

    @api(POINTER(c_void_p), c_int)
    def cuDevicePrimaryCtxRetain(self, out, device): out[0] = CONTEXT + device

    @api(c_int)
    def cuDevicePrimaryCtxRelease(self, device): pass

    @api(POINTER(c_void_p))
    def cuCtxGetCurrent(self, out): out[0] = self.context[-1] if self.context else None

    @api(c_void_p)
    def cuCtxSetCurrent(self, context): self.context[-1:] = [context] if context else []

    @api(c_void_p)
    def cuCtxPushCurrent(self, context):
        self.context.append(context)
        self.used_contexts.add(context)

    @api(POINTER(c_void_p))
    def cuCtxPopCurrent(self, out): out[0] = self.context.pop()

    @api(POINTER(c_int))
    def cuCtxGetDevice(self, out): out[0] = self.context[-1] - CONTEXT

    @api()
    def cuCtxSynchronize(self): return self.finish(everything=True)

    # ---- memory ----

    @api(POINTER(c_size_t), POINTER(c_size_t))
    def cuMemGetInfo(self, free, total): free[0], total[0] = self.total - self.used, self.total

    @api(POINTER(c_void_p), c_size_t)
    def cuMemAlloc(self, out, size):
        if self.captured is not None:
            return CAPTURE_UNSUPPORTED
        if self.used + size > self.total or size > self.largest:
            return OUT_OF_MEMORY
        address = self.memory.add(np.full(size, POISON, np.uint8), f"{size} bytes")
        self.allocations[address] = size
        self.used += size
        self.peak = max(self.peak, self.used)
        out[0] = address
        return 0

    @api(c_void_p)
    def cuMemFree(self, address):
        if status := self.finish():                         # as a real one, which waits for the GPU
            return status
        self.used -= self.allocations.pop(address)
        del self.memory.segments[address >> 40]
        return 0

    @api(POINTER(c_void_p), c_size_t, c_uint)
    def cuMemHostAlloc(self, out, size, flags):
        if self.captured is not None:
            return CAPTURE_UNSUPPORTED
        block = (ctypes.c_uint8 * max(size, 1))()
        out[0] = ctypes.addressof(block)
        self.pinned[ctypes.addressof(block)] = block
        return 0

    @api(c_void_p)
    def cuMemFreeHost(self, address):
        status = self.finish()
        del self.pinned[address]
        return status

    def _copy(self, to: Callable, source: Callable) -> Callable:
        def copy() -> None:
            to()[:] = source()
        return copy

    @api(c_void_p, c_void_p, c_size_t)
    def cuMemcpyHtoD(self, to, source, n):
        """Returns when the source is read: the bytes arrive some time later, in the default stream's order."""
        if self.captured is not None:
            return CAPTURE_UNSUPPORTED
        taken = self.host(source, n).copy()
        self.legacy.append(("upload", self._copy(lambda: self.device(to, n), lambda: taken)))
        return 0

    @api(c_void_p, c_void_p, c_size_t, c_void_p)
    def cuMemcpyHtoDAsync(self, to, source, n, stream):
        taken = None if self.is_pinned(source) else self.host(source, n).copy()     # memory that is not pinned is read at once
        self.enqueue("upload", self._copy(lambda: self.device(to, n), lambda: self.host(source, n) if taken is None else taken))

    @api(c_void_p, c_void_p, c_size_t, c_void_p)
    def cuMemcpyDtoHAsync(self, to, source, n, stream):
        self.enqueue("download", self._copy(lambda: self.host(to, n), lambda: self.device(source, n)))
        return 0 if self.is_pinned(to) else self.finish()

    @api(c_void_p, c_void_p, c_size_t, c_void_p)
    def cuMemcpyDtoDAsync(self, to, source, n, stream):
        self.enqueue("copy", self._copy(lambda: self.device(to, n), lambda: self.device(source, n)))

    @api(c_void_p, ctypes.c_ubyte, c_size_t, c_void_p)
    def cuMemsetD8Async(self, at, value, n, stream):
        self.enqueue("memset", lambda: self.device(at, n).fill(value))

    # ---- streams, events, graphs ----

    @api(POINTER(c_void_p), c_uint)
    def cuStreamCreate(self, out, flags): out[0] = self.new("stream")

    @api(c_void_p)
    def cuStreamSynchronize(self, stream): return self.finish(everything=not stream)

    @api(c_void_p, POINTER(c_int))
    def cuStreamIsCapturing(self, stream, out): out[0] = self.captured is not None

    @api(c_void_p, c_int)
    def cuStreamBeginCapture(self, stream, mode): self.captured = []

    @api(c_void_p, POINTER(c_void_p))
    def cuStreamEndCapture(self, stream, out):
        if self.captured is None:
            return NOT_CAPTURING
        out[0], self.captured = self.new(self.captured), None
        return 0

    @api(POINTER(c_void_p), c_void_p, ctypes.c_ulonglong)
    def cuGraphInstantiateWithFlags(self, out, graph, flags): out[0] = self.new(list(self.objects[graph]))

    @api(c_void_p)
    def cuGraphDestroy(self, graph): del self.objects[graph]

    @api(c_void_p, c_void_p)
    def cuGraphUpload(self, graph, stream): pass

    @api(c_void_p, c_void_p)
    def cuGraphLaunch(self, graph, stream):
        self.calls["nodes"] = self.calls.get("nodes", 0) + len(self.objects[graph])
        for what, work in self.objects[graph]:
            self.enqueue(what, work)

    @api(c_void_p)
    def cuGraphExecDestroy(self, graph): del self.objects[graph]

    @api(POINTER(c_void_p), c_uint)
    def cuEventCreate(self, out, flags): out[0] = self.new([0.0])

    @api(c_void_p, c_void_p)
    def cuEventRecord(self, event, stream):
        if stream and self.origins[event] != self.origins[stream]:
            return INVALID_HANDLE
        return self.enqueue("event", lambda: self.objects[event].__setitem__(0, time.perf_counter()))

    @api(c_void_p)
    def cuEventSynchronize(self, event): return self.finish()

    @api(POINTER(c_float), c_void_p, c_void_p)
    def cuEventElapsedTime(self, out, a, b): out[0] = 1e3 * (self.objects[b][0] - self.objects[a][0])

    @api(c_void_p)
    def cuEventDestroy(self, event):
        status = 0 if self.captured is not None else self.finish()
        del self.objects[event]
        return status

    # ---- code ----

    @api(POINTER(c_void_p), c_void_p, c_void_p, c_void_p, c_uint, c_void_p, c_void_p, c_uint)
    def cuLibraryLoadData(self, out, code, *rest):
        if self.captured is not None:
            return CAPTURE_UNSUPPORTED
        out[0] = self.new("library")
        return 0

    @api(c_void_p)
    def cuLibraryUnload(self, library): del self.objects[library]

    @api(POINTER(c_void_p), c_void_p, c_char_p)
    def cuLibraryGetKernel(self, out, library, name): out[0] = self.new(name.decode())

    @api(POINTER(c_void_p), c_void_p)
    def cuKernelGetFunction(self, out, kernel): out[0] = kernel

    @api(POINTER(c_int), c_int, c_void_p, c_int)
    def cuKernelGetAttribute(self, out, attribute, kernel, device): out[0] = FUNCTION.get(attribute, 0)

    @api(POINTER(c_int), c_int, c_void_p)
    def cuFuncGetAttribute(self, out, attribute, function): out[0] = FUNCTION.get(attribute, 0)

    @api(POINTER(Launch), c_void_p, POINTER(c_void_p), c_void_p)
    def cuLaunchKernelEx(self, config, function, params, extra):
        c = config[0]
        return self._launch(function, tuple(c.grid), tuple(c.block), c.shared, params)

    @api(c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p)
    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, params, extra):
        return self._launch(function, (gx, gy, gz), (bx, by, bz), shared, params)

    def _launch(self, function: int, grid: tuple, block: tuple, shared: int, params: Any) -> int:
        name = self.objects[function]
        entry = self.programs[name].entries[name]
        if not all(0 < g <= most for g, most in zip(grid, (2**31 - 1, 65535, 65535), strict=True)):
            self.problems.append(f"{name}: a grid of {grid}")
            return INVALID_VALUE
        given = [ctypes.string_at(params[n], nbytes) for n, (_, nbytes, _) in enumerate(entry.f.params)]
        self.enqueue(name, lambda: entry.launch(self.memory, grid, block, given, shared))
        return 0

    @api(c_int, POINTER(c_char_p))
    def cuGetErrorName(self, error, out): out[0] = ERRORS.get(error, "CUDA_ERROR").encode()

    @api(c_int, POINTER(c_char_p))
    def cuGetErrorString(self, error, out): out[0] = ERRORS.get(error, "an error").encode()

    @api(c_void_p, c_int, c_void_p)
    def cuPointerGetAttribute(self, out, attribute, pointer): return INVALID_VALUE


def install(total: int = 1 << 30) -> Driver:
    """Put the driver where everybody looks for it. Before numba.cuda is imported."""
    driver = Driver(total)
    folder = Path(tempfile.mkdtemp())
    (folder / "cuda.c").write_text(SOURCE)
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(folder / "cuda.c")], check=True)
    loaded = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    kind = ctypes.CFUNCTYPE(c_int, c_char_p, POINTER(c_void_p))
    driver._kept["resolver"] = kind(driver.resolve)
    loaded.fake_driver(driver._kept["resolver"])

    from numba.cuda.codegen import CUDACodeLibrary

    get_cufunc = CUDACodeLibrary.get_cufunc

    def loaded_function(library: Any) -> Any:
        if library._entry_name not in driver.programs:
            program = Program(library.get_asm_str())
            driver.programs |= dict.fromkeys(program.entries, program)
        return get_cufunc(library)
    CUDACodeLibrary.get_cufunc = loaded_function
    return driver
