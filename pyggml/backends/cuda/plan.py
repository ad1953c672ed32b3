"""The CUDA backend's program (Program of backends/base.py): views and steps over a GPU's memory, launched one after the other.

A run copies the sizes and inputs to the GPU in one piece, launches the steps, or replays them as a recorded graph, and copies the
results back. Steps see run-time sizes only on the GPU, so that a recording serves every run of its bucket of cells.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pyggml.backends.base import Input
from pyggml.backends.cuda.act import act_bytes
from pyggml.backends.cuda.ahead import Ahead
from pyggml.backends.cuda.base import DeviceStep, DeviceView, Launch, Needs, Scratch
from pyggml.backends.cuda.cachestore import roped_bytes
from pyggml.backends.cuda.device import Arena, Device, round_up, simulated
from pyggml.backends.cuda.graphs import Recorder, bucket
from pyggml.backends.cuda.merge import merged
from pyggml.backends.cuda.store import DTYPES, typed
from pyggml.errors import UnsupportedStep
from pyggml.types import tensor_type

if TYPE_CHECKING:
    from pyggml.backends.cuda.store import DeviceWeights
    from pyggml.graph import Tensor

FAMILIES = ("basic", "norm", "rope", "matmul", "cachestore", "attention", "moe", "sample")
RECORDED = 64           # batches of up to so many tokens are recorded: larger ones compute longer than they launch


@cache
def kernels() -> tuple[dict[str, Launch], dict[str, Needs]]:
    """Every family's launches and needs, by step."""
    launches: dict[str, Launch] = {}
    needs: dict[str, Needs] = {}
    for family in FAMILIES:
        module = importlib.import_module(f"pyggml.backends.cuda.{family}")
        launches |= module.LAUNCHES
        needs |= module.NEEDS
    return launches, needs


class Uncounted:
    """Stands for memory in a program that is planned only to count what it needs."""

    def __getitem__(self, key: Any) -> Uncounted:
        return self


class Store:
    """The weights as the plans of one context see them (Weights of backends/base.py), and memory that their programs share, as only
    one of them runs at a time. Without a device it only counts.
    """

    small = sys.maxsize         # whoever reads activations prepares them

    def __init__(self, weights: DeviceWeights, device: Device | None, n_bytes: int = 0) -> None:
        self.weights, self.device = weights, device
        self.arena = Arena(device, n_bytes, "computing a batch") if device is not None else None
        self._constants: dict[int, tuple[np.ndarray, Arena, Any]] = {}

    def act_format(self, weight: Tensor, fixed: bool) -> int:
        return 0

    def act_bytes(self, format: int, k: int, columns: int) -> int:
        raise AssertionError("activations are prepared by the launch that reads them")

    def keep_rows(self, name: str) -> None:
        """Rows are read from the re-laid form."""

    def program(self, n_slots: int) -> DeviceProgram:
        return DeviceProgram(self, n_slots)

    def view(self, program: DeviceProgram, weight: Tensor, pack: bool) -> int:
        return program.add(self.weights.view(weight))

    def constant(self, array: np.ndarray) -> Any:
        """The array on the GPU; asked for twice it is one."""
        if self.device is None:
            return Uncounted()
        if id(array) not in self._constants:
            arena = Arena(self.device, array.nbytes, "a constant")
            place = arena.take(array.nbytes)
            with self.device.active():
                self.device.upload(place, array.reshape(-1).view(np.uint8))
                self.device.synchronize()
            self._constants[id(array)] = array, arena, place
        return self._constants[id(array)][2]


@dataclass
class _Copy:
    """Values that are copied before or after each run, as many rows as slots[slot] says (-1: all)."""

    host: np.ndarray
    place: Any
    slot: int
    _parts: dict[int, tuple[np.ndarray, Any]] = field(default_factory=dict)

    def part(self, slots: np.ndarray) -> tuple[np.ndarray, Any]:
        """(host, device) arrays of this run's rows; kept, as slicing a device array costs as much as a launch."""
        rows = int(slots[self.slot]) if self.slot >= 0 else len(self.host)
        if rows not in self._parts:
            count = rows * math.prod(self.host.shape[1:])
            self._parts[rows] = self.host.reshape(-1)[:count], self.place[:count] if count else None
        return self._parts[rows]


class DeviceProgram:
    """Views and steps over one GPU's memory, which is taken from what the store shares; what does not fit there is the program's own."""

    def __init__(self, store: Store, n_slots: int) -> None:
        self.store = store
        self.device: Any = store.device
        self.nbytes = 0                     # taken of the shared memory
        self.slots = np.zeros(n_slots, np.int32)
        self.aborted = np.zeros(1, np.int32)
        self.native_calls = 0
        self.step_ns: np.ndarray | None = None
        self.views: list[DeviceView] = []
        self.steps: list[DeviceStep] = []
        self.results: list[_Copy] = []
        self._own: list[Arena] = []
        self.places: dict[str, tuple[np.ndarray, Any]] = {}     # (host, device memory) of each input
        self._floats: list[_Copy] = []
        self.ahead: Ahead | None = None

    # ---- memory ----

    def take(self, n_bytes: int) -> Any:
        """Bytes for this program alone while it runs."""
        start, self.nbytes = self.nbytes, self.nbytes + round_up(n_bytes)
        if self.device is None:
            return Uncounted()
        assert self.store.arena is not None
        if self.nbytes <= self.store.arena.nbytes:
            return self.store.arena.array[start:start + n_bytes]
        self.nbytes = start                 # something smaller may still fit
        self._own.append(Arena(self.device, n_bytes, "computing a batch"))
        return self._own[-1].take(n_bytes)

    def memory(self, n_bytes: int) -> Any:
        return self.take(n_bytes)

    def inputs(self, wanted: dict[str, Input]) -> dict[str, tuple[np.ndarray, Any]]:
        """Integers lie one after another behind the slots, so that one copy uploads them all."""
        offsets, end = {}, round_up(self.slots.nbytes)
        for name, given in wanted.items():
            if given.dtype is np.int32:
                offsets[name], end = end, end + round_up(4 * math.prod(given.shape))
        host, place = self._host(end // 4, np.int32), self.take(end)
        self._uploads = host, self._array(place, "I32", end // 4)
        self.slots, self.device_slots = host[:len(self.slots)], self._array(place, "I32", len(self.slots))
        placed = {}
        for name, given in wanted.items():
            count = math.prod(given.shape)
            if name in offsets:
                placed[name] = host[offsets[name] // 4:][:count].reshape(given.shape), place[offsets[name]:]
            else:
                floats, room = self._host(given.shape, given.dtype), self.take(4 * count)
                self._floats.append(_Copy(floats, self._array(room, "F32", count), given.slot))
                placed[name] = floats, room
        self.places = placed
        return placed

    def _host(self, shape: Any, dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype) if self.device is None else self.device.pinned(shape, dtype)

    def _array(self, place: Any, type: str, count: int) -> Any:
        """The first `count` elements of a place in memory, for a tensor type's rows the bytes."""
        if self.device is None:
            return None
        return typed(place[:count * np.dtype(DTYPES[type]).itemsize if type in DTYPES else count], type)

    def constant(self, array: np.ndarray) -> Any:
        return self.store.constant(array)

    # ---- views and steps ----

    def add(self, view: DeviceView) -> int:
        self.views.append(view)
        return len(self.views) - 1

    def view(self, array: Any, type: str, shape: Sequence[int], *, slot: int = -1) -> int:
        shape = tuple(shape)
        count = math.prod(shape) if type in DTYPES else math.prod(shape[:-1]) * tensor_type(type).row_bytes(shape[-1])
        return self.add(DeviceView(self._array(array, type, count), type, shape, slot))

    def step(self, op: str, dst: int, src: Sequence[int], i: Sequence[int], f: Sequence[float], sync: bool) -> int:
        self.steps.append(DeviceStep(op, self.views[dst], tuple(None if s < 0 else self.views[s] for s in src), tuple(i), tuple(f),
                                     number=len(self.steps)))
        return len(self.steps) - 1

    def result(self, array: Any, type: str, shape: tuple[int, ...], slot: int) -> np.ndarray:
        host = self._host(shape, DTYPES[type])
        self.results.append(_Copy(host, self._array(array, type, math.prod(shape)), slot))
        return host

    def finish(self, timing: bool) -> DeviceProgram:
        launches, needs = kernels()
        self.step_ns = np.zeros(len(self.steps), np.int64) if timing else None
        for step in self.steps:
            if step.op not in launches:
                raise UnsupportedStep(f"the step {step.op} has no CUDA kernel; use -ngl 0")
        self.n_cells = max((s.src[1].shape[1] for s in self.steps if s.op.startswith("attention") and s.src[1] is not None), default=1)
        self.steps = merged(self.steps, [r.place for r in self.results])
        if Ahead.fits(self):
            self.ahead = Ahead(self, launches)
        more = self.ahead.own_steps if self.ahead is not None else []
        wants = [needs[s.op](s, self.n_cells) for s in (*self.steps, *more) if s.op in needs]
        act, temp = (self.take(max((w[i] for w in wants), default=0) or 1) for i in range(2))
        left = max((act_bytes(s.hands_on.kind, s.dst.shape[-1], math.prod(s.dst.shape[:-1])) for s in self.steps if s.hands_on), default=1)
        handed, handing = self.take(left), self.take(left)
        roped = max((roped_bytes(s) for s in self.steps if s.op == "attention_step"), default=4)
        self.scratch = Scratch(act, handed, handing, self._array(self.take(roped), "F32", roped // 4), temp, self.n_cells)
        self._launches = [(launches[s.op], s) for s in self.steps]
        self._recorder = Recorder(self.device)
        return self

    # ---- running ----

    def run(self, pool: Any, alone: bool) -> bool:
        """Upload, compute, download, and wait for it."""
        if self.aborted[0]:
            return False
        self.native_calls += 1
        with self.device.active():
            self.upload()
            self.scratch.cells = self.bucket()
            self.compute()
            for r in self.results:
                self.device.download(*r.part(self.slots))
            self.device.synchronize()
        return not self.aborted[0]

    def upload(self) -> None:
        """Enqueue the copy of sizes and inputs."""
        self.device.upload(self._uploads[1], self._uploads[0])
        for f in self._floats:
            host, place = f.part(self.slots)
            self.device.upload(place, host)

    def bucket(self) -> int:
        """The bucket of cells of the inputs."""
        if "cell" not in self.places:
            return self.n_cells
        return bucket(int(self.places["cell"][0][:self.slots[0]].max()) + 1, self.n_cells)

    def compute(self) -> None:
        """Enqueue the steps."""
        if self.step_ns is not None:
            self._timed()
        elif self.small:
            self._recorder.run(self.scratch.cells, self.launch)
        else:
            self.launch()

    @property
    def small(self) -> bool:
        """Whether runs are so short that launching step by step would dominate them."""
        return all(len(host) <= RECORDED for host, _ in self.places.values())

    def launch(self) -> None:
        """Enqueue every step on its own: all of them, as this may be recorded, and takes milliseconds."""
        self.scratch.begin()
        for launch, step in self._launches:
            launch(self.device.stream, self.device_slots, step, self.scratch)

    def _timed(self) -> None:
        """Launch step by step, each between two events; products of one launch have shares of its time by the size of their matrices."""
        assert self.step_ns is not None
        self.scratch.begin()
        events = [self.device.event(timing=True) for _ in range(len(self._launches) + 1)]
        clock = [time.perf_counter_ns()]
        events[0].record(self.device.stream)
        for (launch, step), event in zip(self._launches, events[1:], strict=True):
            launch(self.device.stream, self.device_slots, step, self.scratch)
            event.record(self.device.stream)
            clock.append(time.perf_counter_ns())
        self.device.synchronize()
        for i, (_, step) in enumerate(self._launches):
            taken = clock[i + 1] - clock[i] if simulated() else round(1e6 * events[i].elapsed_time(events[i + 1]))
            together = (step, *step.beside)
            sizes = [s.src[0].array.nbytes for s in together if step.beside and s.src[0] is not None] or [1]
            for one, size in zip(together, sizes, strict=True):
                self.step_ns[one.number] += taken * size // sum(sizes)
