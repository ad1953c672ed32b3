"""GPUs: which there are, found without Numba and in microseconds where there is none, and one of them with its memory.

`PYGGML_CUDA_GRAPHS=0` launches every kernel on its own (graphs.py); `PYGGML_KERNEL_CACHE` says where compiled kernels are kept, 0 for nowhere
(kernelcache.py). With `NUMBA_ENABLE_CUDASIM=1` Numba's simulator is the one GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import os
import re
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pyggml.errors import ParameterError, PyggmlError

log = logging.getLogger("pyggml")
MINIMUM = (7, 5)                # compute capability: the kernels need its integer dot products and matrix instructions
ALIGN = 256
CPU_NAMES = ("none", "cpu")     # values of --device that ask for no GPU
_DRIVER = {"linux": "libcuda.so.1", "win32": "nvcuda.dll"}.get(sys.platform, "")
_NO_DEVICE = 100                # CUDA_ERROR_NO_DEVICE
_MAJOR, _MINOR = 75, 76         # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it; `memory` in bytes, `driver` the version of CUDA that the driver speaks."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int
    driver: tuple[int, int] = (99, 0)

    def __str__(self) -> str:
        major, minor = self.capability
        return f"cuda{self.index} {self.name}, compute capability {major}.{minor}, {gib(self.memory)}"


def gib(n_bytes: float) -> str:
    """A size for people: 1.25 GiB, 12.5 MiB."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def simulated() -> bool:
    """Whether Numba's simulator stands in for a GPU."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


@cache
def _probe() -> tuple[tuple[Gpu, ...], str]:
    """(the GPUs, why there is none). The driver's library is asked directly: without one this costs one failed lookup."""
    if simulated():
        return (Gpu(0, "simulator", MINIMUM, 0),), ""
    try:
        driver = ctypes.CDLL(_DRIVER) if _DRIVER else None
    except OSError:
        driver = None
    if driver is None:
        return (), f"there is no NVIDIA driver ({_DRIVER or 'for this system'} is not found)"
    if status := driver.cuInit(0):
        return (), "the NVIDIA driver finds no GPU" if status == _NO_DEVICE else f"the NVIDIA driver does not start (CUDA error {status})"
    count = ctypes.c_int(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    version = ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    speaks = version.value // 1000, version.value % 1000 // 10
    return tuple(_describe(driver, i, speaks) for i in range(count.value)), "" if count.value else "the NVIDIA driver finds no GPU"


def _describe(driver: Any, index: int, speaks: tuple[int, int]) -> Gpu:
    device, name, memory, numbers = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t(), []
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(value.value)
    return Gpu(index, name.value.decode(errors="replace"), (numbers[0], numbers[1]), memory.value, speaks)


def gpus() -> tuple[Gpu, ...]:
    """Every GPU that the driver finds, usable or not."""
    return _probe()[0]


def why_not(index: int = 0) -> str:
    """Why this GPU cannot be computed with, in half a sentence; empty where it can."""
    found, reason = _probe()
    if reason:
        return reason
    if not 0 <= index < len(found):
        return f"there is no cuda{index}; the driver finds {', '.join(f'cuda{g.index}' for g in found)}"
    if found[index].capability < MINIMUM:
        major, minor = found[index].capability
        return f"cuda{index} ({found[index].name}) has compute capability {major}.{minor} and {MINIMUM[0]}.{MINIMUM[1]} is needed"
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed (pip install 'pyggml[cuda]')"
    if (spoken := found[index].driver) < (needed := _compiled_for(), 0):
        return f"the NVIDIA driver speaks CUDA {spoken[0]}.{spoken[1]} and the compiler that is installed CUDA {needed}; update the driver"
    return _no_compiler()


@cache
def _no_compiler() -> str:
    """Why kernels cannot be compiled, if they cannot: numba-cuda comes without the compiler's own libraries."""
    if simulated():
        return ""
    try:
        from numba.cuda.cudadrv.libs import get_libdevice
        from numba.cuda.cudadrv.nvvm import NVVM

        NVVM()
        found = get_libdevice()
    except Exception as error:      # noqa: BLE001  of several kinds, by what is missing
        found = None
        log.debug("NVVM: %s", error)
    lacks = "the CUDA compiler's libraries (NVVM and libdevice) are not found (pip install 'pyggml[cuda]', or name a toolkit with CUDA_HOME)"
    return "" if found else lacks


def _compiled_for() -> int:
    """The major version of CUDA that kernels are compiled for: drivers load what was made for any minor version of theirs."""
    from importlib import metadata

    try:
        return int(metadata.version("cuda-bindings").split(".")[0])
    except metadata.PackageNotFoundError:
        return 0


def named(device: str | None, main_gpu: int = 0) -> int | None:
    """The GPU that `--device` and `--main-gpu` name; None for the CPU. ParameterError for a name that is neither."""
    name = (device or f"cuda{main_gpu}").lower()
    if name in CPU_NAMES:
        return None
    if not (found := re.fullmatch(r"cuda:?(\d+)", name)):
        one = "one of " if "," in name else ""              # a list, as llama.cpp takes it
        raise ParameterError(f"the device {name!r} is unknown; use {one}none, cpu, " + (", ".join(f"cuda{g.index}" for g in gpus()) or "cuda0"))
    return int(found[1])


_opened = cache(lambda index: Device(gpus()[index]))
_opening = threading.Lock()


def open_device(index: int) -> Device:
    """The GPU, ready to compute; PyggmlError says what is missing."""
    if reason := why_not(index):
        raise PyggmlError(f"layers cannot go to a GPU: {reason}; leave -ngl out to compute on the CPU")
    with _opening:                      # two streams of one GPU would count their blocks in the same counters (tails.py)
        return _opened(index)


class Device:
    """A GPU that computes: one stream, in which everything happens in order, and memory in arenas. Threads take turns (`active`).

    `allocated` and `peak` count bytes of arenas alive, and the most there ever were.
    """

    def __init__(self, gpu: Gpu) -> None:
        from numba import cuda

        self.gpu, self.cuda = gpu, cuda
        self.allocated = self.peak = 0
        self._turn, self._thread = threading.RLock(), threading.local()
        with self.active():
            self.stream = cuda.stream() if simulated() else self._own_stream()

    def _own_stream(self) -> Any:
        """A stream that does not wait for the default one, which stream capture forbids to touch."""
        from cuda.bindings import driver

        status, handle = driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise PyggmlError(f"{self.gpu} gives no stream: {status.name}")
        return self.cuda.external_stream(int(handle))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """A `with` in which this GPU is the current one of the calling thread, and no other thread's: what another one enqueued during a recording
        would become a part of it."""
        gpu = self.cuda.gpus[self.gpu.index]
        with self._turn:
            if not hasattr(self._thread, "seen"):
                self._thread.seen = True
                # for what Numba does in between, such as slicing arrays and freeing them: it would make a context of the first GPU
                if not simulated() and self.cuda.gpus.current is None:
                    gpu.__enter__()
            with gpu:
                yield

    @property
    def free(self) -> float:
        """Bytes of memory that can be allocated; infinite in the simulator."""
        with self.active():
            context = self.cuda.current_context()
            if not simulated():
                context.deallocations.clear()
            return context.get_memory_info().free

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A zeroed host array that can be copied to and from the GPU while the host goes on."""
        with self.active():
            array = self.cuda.pinned_array(shape, dtype)
        array[...] = 0
        return array

    def event(self, timing: bool = False) -> Any:
        """An event that can be recorded on the stream and waited for."""
        with self.active():
            return self.cuda.event() if simulated() else self.cuda.event(timing=timing)

    def upload(self, target: Any, source: np.ndarray) -> None:
        """Enqueue a copy to the GPU; both are arrays of one dtype and shape."""
        if source.size:
            target.copy_to_device(source, stream=self.stream)

    def download(self, target: np.ndarray, source: Any) -> None:
        """Enqueue a copy from the GPU; `synchronize` before reading."""
        if target.size:
            source.copy_to_host(target, stream=self.stream)

    def clear(self, array: Any) -> None:
        """Enqueue zeros."""
        from numba.cuda.cudadrv.driver import device_memset

        device_memset(array, 0, array.nbytes, stream=self.stream)

    def synchronize(self) -> None:
        """Wait for everything enqueued."""
        with self.active():
            self.stream.synchronize()

    def wait(self, event: Any) -> None:
        """Wait for a recorded event; other threads may go on meanwhile."""
        with self.cuda.gpus[self.gpu.index]:
            event.synchronize()

    def copy_bandwidth(self, n_bytes: int = 512 << 20, times: int = 10) -> float:
        """Bytes read and written a second by copies in its own memory; 0 in the simulator, whose clock means nothing."""
        if simulated():
            return 0.0
        room = Arena(self, 2 * n_bytes, "measuring the bandwidth")
        source, target, start, end = room.take(n_bytes), room.take(n_bytes), self.event(timing=True), self.event(timing=True)
        with self.active():
            target.copy_to_device(source, stream=self.stream)
            start.record(self.stream)
            for _ in range(times):
                target.copy_to_device(source, stream=self.stream)
            end.record(self.stream)
            self.synchronize()
            return 2 * n_bytes * times / (start.elapsed_time(end) / 1e3)


class Arena:
    """One allocation of device memory, handed out in pieces; it is freed when the arena and every piece are gone."""

    def __init__(self, device: Device, n_bytes: int, what: str) -> None:
        self.device, self.nbytes, self.used = device, round_up(max(n_bytes, ALIGN)), 0
        free = device.free
        if self.nbytes > free:
            raise PyggmlError(f"{what} needs {gib(self.nbytes)} on cuda{device.gpu.index}, where {gib(free)} are free; "
                              "use fewer layers (-ngl), a smaller context (-c) or a smaller -ub")
        try:
            with device.active():
                self.array = device.cuda.device_array(self.nbytes, np.uint8)
        except Exception as error:          # free memory may lie in pieces; Numba's error has no type that the simulator knows
            if "OUT_OF_MEMORY" not in str(error):
                raise
            raise PyggmlError(f"{what} needs {gib(self.nbytes)} in one piece on cuda{device.gpu.index}, which has {gib(free)} free in smaller ones; "
                              "use fewer layers (-ngl)") from error
        device.allocated += self.nbytes
        device.peak = max(device.peak, device.allocated)
        weakref.finalize(self, _given_back, device, self.nbytes)

    def take(self, n_bytes: int) -> Any:
        """The next bytes, uint8, aligned to what vector loads need."""
        start, self.used = self.used, self.used + round_up(max(n_bytes, 1))
        if self.used > self.nbytes:
            raise AssertionError(f"an arena of {self.nbytes} bytes was planned too small")
        return self.array[start:start + n_bytes]


def round_up(n_bytes: int) -> int:
    return -(-n_bytes // ALIGN) * ALIGN


def _given_back(device: Device, n_bytes: int) -> None:
    device.allocated -= n_bytes
