"""What lies in a GPU's memory for longer than a run: weights, re-laid while they are uploaded, and the cache.

A weight goes through a pinned buffer into a staging area and from there, by a kernel, into the form that the kernels read
(layout.py); two pinned buffers take turns, so that reading the file and copying overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyggml.backends.cuda.base import DeviceView
from pyggml.backends.cuda.device import Arena, Device, round_up, simulated
from pyggml.backends.cuda.layout import RelaidWeight, cache_rows, put_cache_rows, relaid_bytes, relay_numpy
from pyggml.backends.cuda.upload import relay
from pyggml.graph import walk
from pyggml.ops import OPS
from pyggml.types import TensorType, tensor_type

if TYPE_CHECKING:
    from pyggml.graph import Tensor

STAGE = 64 << 20            # bytes of a weight that are uploaded at once
ROWS = 256                  # ... in whole multiples of so many rows
DTYPES = {"F32": np.float32, "I32": np.int32, "F16": np.float16, "BF16": np.uint16}     # element types; all others are bytes


def typed(array: Any, type: str) -> Any:
    """A device array of bytes as the element type that kernels see."""
    dtype = DTYPES.get(type, np.uint8)
    return array if dtype is np.uint8 else array.view(dtype)


def matrices(outputs: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that a graph reads as matrices (in products, or row by row), and those that it reads number by number."""
    whole: dict[str, Tensor] = {}
    single: dict[str, Tensor] = {}
    for node in walk(outputs):
        for i, source in enumerate(node.srcs):
            if source is not None and source.op == "weight":
                as_matrix = i == 0 and (node.op == "get_rows" or OPS[node.op].matmul)
                (whole if as_matrix else single)[source.name] = source
    return whole, single


@dataclass(frozen=True)
class _Wanted:
    """A weight to upload."""

    weight: Tensor
    relaid: bool

    @property
    def nbytes(self) -> int:
        return relaid_bytes(self.weight.type, self.weight.sizes) if self.relaid else self.weight.data.nbytes

    @property
    def staged(self) -> int:
        """Bytes of the staging area that it needs."""
        return math.prod(self.chunk) if self.relaid else 0

    @property
    def chunk(self) -> tuple[int, int]:
        """(rows, bytes of a row) that are uploaded at once."""
        shape = self.weight.sizes
        row_bytes, rows = tensor_type(self.weight.type).row_bytes(shape[-1]), math.prod(shape[:-1])
        return min(rows, max(ROWS, STAGE // row_bytes // ROWS * ROWS)), row_bytes


class DeviceWeights:
    """The weights of one model on one GPU. Nothing is uploaded before `load`."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._held: dict[tuple[str, bool], DeviceView] = {}
        self._arenas: list[Arena] = []

    def view(self, weight: Tensor) -> DeviceView:
        """The weight; one without memory as long as it is not loaded."""
        held = (self._held.get((weight.name, relaid)) for relaid in (True, False))
        return next((v for v in held if v is not None), None) or DeviceView(None, weight.type, weight.sizes)

    # ---- uploading ----

    def _missing(self, outputs: Sequence[Tensor]) -> list[_Wanted]:
        whole, single = matrices(outputs)
        wanted = [_Wanted(w, relaid) for relaid, weights in ((True, whole), (False, single)) for w in weights.values()]
        return [w for w in wanted if (w.weight.name, w.relaid) not in self._held]

    def missing_bytes(self, outputs: Sequence[Tensor]) -> tuple[int, int]:
        """Bytes that `load` will take for good, and beside them while it runs."""
        wanted = self._missing(outputs)
        return sum(round_up(w.nbytes) for w in wanted), round_up(max((w.staged for w in wanted), default=0))

    def load(self, outputs: Sequence[Tensor]) -> None:
        """Upload every weight that these graphs read and that is not there yet."""
        wanted = self._missing(outputs)
        if not wanted:
            return
        stays, staged = self.missing_bytes(outputs)
        arena = Arena(self.device, stays, "the weights")
        upload = _Upload(self.device, staged)
        for w in wanted:
            self._held[w.weight.name, w.relaid] = upload.matrix(w, arena.take(w.nbytes)) if w.relaid else upload.numbers(w, arena.take(w.nbytes))
        self.device.synchronize()
        self._arenas.append(arena)


class _Upload:
    """Copies to the GPU through two pinned buffers that take turns."""

    def __init__(self, device: Device, staged: int) -> None:
        self.device = device
        self.staging = Arena(device, staged, "uploading weights").array if staged else None
        self._buffers = [device.pinned((max(staged, 1),), np.uint8) for _ in range(2)]
        self._done = [device.event() for _ in range(2)] if staged else []
        self._turn = 0

    def matrix(self, wanted: _Wanted, target: Any) -> DeviceView:
        weight, (rows, row_bytes) = wanted.weight, wanted.chunk
        raw = weight.data.raw.reshape(-1, row_bytes)
        relaid = None
        if simulated():                                             # a thread for each byte takes the simulator minutes
            self.device.upload(target, relay_numpy(weight.type, weight.sizes, raw))
            relaid = RelaidWeight(weight.type, weight.sizes, typed(target, weight.type))
            raw = raw[:0]
        for start in range(0, len(raw), rows):
            stop = min(start + rows, len(raw))
            staged = self.staging[:(stop - start) * row_bytes]      # type: ignore[index]
            self._copy(staged, raw[start:stop].reshape(-1))
            relaid = relay(weight.type, weight.sizes, staged, target, self.device.stream, rows=(start, stop))
        return DeviceView(typed(target, weight.type), weight.type, weight.sizes, weight=relaid)

    def numbers(self, wanted: _Wanted, target: Any) -> DeviceView:
        weight = wanted.weight
        source = np.ascontiguousarray(weight.data.raw.reshape(-1))
        self.device.upload(target, source)
        self.device.synchronize()                                   # the source is not pinned, and may be a copy
        return DeviceView(typed(target, weight.type), weight.type, weight.sizes)

    def _copy(self, target: Any, source: np.ndarray) -> None:
        turn, self._turn = self._turn, 1 - self._turn
        self.device.wait(self._done[turn])                           # the copy that used this buffer last; at once when there was none
        pinned = self._buffers[turn][:source.size]
        pinned[:] = source
        self.device.upload(target, pinned)
        self._done[turn].record(self.device.stream)


# ---- the cache ----------------------------------------------------------------------------------------------------------------

class DeviceCacheTensor:
    """Keys or values of one layer (as cache.CacheTensor, whose cells it can take and give)."""

    def __init__(self, name: str, type: TensorType, shape: tuple[int, int, int], arena: Arena) -> None:
        self.name, self.type, self.shape, self.device = name, type, shape, arena.device
        self.raw = arena.take(shape[0] * shape[1] * type.row_bytes(shape[2]))
        self._arena = arena

    @property
    def _sliced(self) -> bool:
        """Whether a cell's row is one piece: quantized caches keep codes and scales apart."""
        return not self.type.quantized

    def cells(self, n: int) -> np.ndarray:
        """The first `n` cells, uint8 (n_kv, n, bytes of a row) as they lie in this machine's caches."""
        row = self.type.row_bytes(self.shape[2])
        if not n:
            return np.empty((self.shape[0], 0, row), np.uint8)
        if not self._sliced:
            return cache_rows(self.type.name, self.shape, self._whole(), n)
        host = np.empty((self.shape[0], n * row), np.uint8)
        with self.device.active():
            for head in range(self.shape[0]):
                self.device.download(host[head], self._piece(head, n * row))
            self.device.synchronize()
        return host.reshape(self.shape[0], n, row)

    def put(self, cells: np.ndarray) -> None:
        """Write what `cells` gave into the first cells."""
        cells = np.ascontiguousarray(cells)
        if not cells.shape[1]:
            return
        with self.device.active():
            if self._sliced:
                for head in range(self.shape[0]):
                    self.device.upload(self._piece(head, cells[head].size), cells[head].reshape(-1))
            else:
                host = self._whole()
                put_cache_rows(self.type.name, self.shape, host, cells)
                self.device.upload(self.raw, host)
            self.device.synchronize()

    def _piece(self, head: int, n_bytes: int) -> Any:
        start = head * self.shape[1] * self.type.row_bytes(self.shape[2])
        return self.raw[start:start + n_bytes]

    def _whole(self) -> np.ndarray:
        host = np.empty(self.raw.nbytes, np.uint8)
        with self.device.active():
            self.device.download(host, self.raw)
            self.device.synchronize()
        return host


def cache_bytes(tensors: Iterable[Any]) -> int:
    """Bytes that these cache tensors take on a GPU."""
    return sum(round_up(t.shape[0] * t.shape[1] * t.type.row_bytes(t.shape[2])) for t in tensors)


def cache_arena(device: Device, n_bytes: int) -> Arena:
    """Zeroed room for cache tensors: what no token wrote must not be NaN, as kernels multiply it by 0."""
    arena = Arena(device, n_bytes, "the cache")
    with device.active():
        device.clear(arena.array)
    return arena
