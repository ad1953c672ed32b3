"""Numba's CUDA simulator with its threads as greenlets: switching costs a microsecond where threads cost dozens, so that whole models
run in tests. A block whose lanes wait for one that never comes is an error at once.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict, deque
from types import SimpleNamespace

import greenlet
import numpy as np
from numba.cuda.simulator import kernel, kernelapi


class Lane(greenlet.greenlet):
    """One thread of a block."""

    def __init__(self, block: Block, run, block_index, thread_index) -> None:
        super().__init__(run, block.hub)
        self._manager = block.manager
        self.block = block
        self.blockIdx, self.threadIdx = kernelapi.Dim3(*block_index), kernelapi.Dim3(*thread_index)
        x, y, _ = block.manager._block_dim
        self.thread_id = self.threadIdx.x + x * (self.threadIdx.y + y * self.threadIdx.z)

    def syncthreads(self) -> None:
        self.block.meet(self)

    def _all(self, value):
        state = self._manager.block_state
        state[self.threadIdx.x, self.threadIdx.y, self.threadIdx.z] = value
        self.syncthreads()
        seen = state.copy()
        self.syncthreads()
        return seen

    def syncthreads_count(self, value):
        return np.count_nonzero(self._all(value))

    def syncthreads_and(self, value):
        return int(np.all(self._all(value)))

    def syncthreads_or(self, value):
        return int(np.any(self._all(value)))


class Block:
    """A block at work: lanes that can go on, and lanes that wait for the whole block."""

    def __init__(self, manager) -> None:
        self.manager, self.hub = manager, greenlet.getcurrent()
        self.ready: deque[Lane] = deque()
        self.waiting: list[Lane] = []
        self.warps: defaultdict[int, Warp] = defaultdict(Warp)

    def run(self, grid_point, args) -> None:
        dims = self.manager._block_dim
        live = 0
        for index in np.ndindex(*dims):
            self.ready.append(Lane(self, lambda: self.manager._f(*args), grid_point, index))
            live += 1
        while self.ready:
            lane = self.ready.popleft()
            lane.switch()
            live -= lane.dead
            if not self.ready and live:
                if len(self.waiting) != live:
                    raise RuntimeError(f"block {grid_point}: {live - len(self.waiting)} threads wait for others of their warp that do not come")
                self.ready.extend(self.waiting)
                self.waiting.clear()

    def meet(self, lane: Lane) -> None:
        self.waiting.append(lane)
        self.hub.switch()


class Warp:
    """32 lanes that show each other a value."""

    def __init__(self) -> None:
        self.values: list = [None] * 32
        self.arrived: list[Lane] = []


def exchange(value):
    """(the lane's number in its warp, the values of all 32), once all have come; as prims._warp."""
    lane = greenlet.getcurrent()
    number, warp = lane.thread_id % 32, lane.block.warps[lane.thread_id // 32]
    values = warp.values
    values[number] = value
    warp.arrived.append(lane)
    if len(warp.arrived) == 32:
        warp.arrived.pop()
        lane.block.ready.extend(warp.arrived)
        warp.values, warp.arrived = [None] * 32, []
    else:
        lane.block.hub.switch()
    return number, values


def shared_array(self, shape, dtype, alignment=None):
    """As FakeCUDAShared.array, which reads source files to find out who calls."""
    if not isinstance(dtype, (np.dtype, type)):
        dtype = kernelapi.numpy_support.as_dtype(dtype)
    if shape == 0:
        count = self._dynshared_size // np.dtype(dtype).itemsize
        return np.frombuffer(self._dynshared.data, dtype=dtype, count=count)
    frame = sys._getframe(1)
    key = frame.f_code, frame.f_lasti           # the call, even of two in one line
    if key not in self._allocations:
        self._allocations[key] = np.empty(shape, dtype)
    return self._allocations[key]


def install(prims) -> None:
    """Let the simulator, and the warps of prims, use lanes."""
    kernelapi.threading = SimpleNamespace(Lock=threading.Lock, current_thread=greenlet.getcurrent)
    kernel.BlockManager.run = lambda self, grid_point, *args: Block(self).run(grid_point, args)
    kernelapi.FakeCUDAShared.array = shared_array
    prims._warp, prims._thread = exchange, greenlet.getcurrent
