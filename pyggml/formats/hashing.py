"""Hashes of tensor data: of each tensor and of all of them in file order, as llama.cpp's gguf-hash computes them. Metadata does not count,
so editing it changes no hash."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.formats.tensorfile import TensorFile
from pyggml.native import ffi, lib

# Namespace of the UUIDs that gguf-hash gives to models: uuid5(NAMESPACE_URL, "en.wikipedia.org/wiki/Llama.cpp")
NAMESPACE = uuid.UUID("ef001206-dadc-5f6d-a15f-3359e577d4e5")


class Xxh64:
    """XXH64 with seed 0, with the methods of hashlib's objects."""

    def __init__(self) -> None:
        if lib is None:
            raise PyggmlError("xxh64 needs the compiled extension; use --sha256, or install pyggml with a C compiler")
        self._state = ffi.new("pyg_xxh64 *")
        lib.pyg_xxh64_start(self._state, 0)

    def update(self, data: Any) -> None:
        view = ffi.from_buffer("uint8_t[]", data)
        lib.pyg_xxh64_add(self._state, view, len(view))

    def hexdigest(self) -> str:
        return f"{lib.pyg_xxh64_end(self._state):016x}"


class Uuid:
    """The version 5 UUID of the data within NAMESPACE."""

    def __init__(self) -> None:
        self._sha1 = hashlib.sha1(NAMESPACE.bytes)

    def update(self, data: Any) -> None:
        self._sha1.update(data)

    def hexdigest(self) -> str:
        return str(uuid.UUID(bytes=self._sha1.digest()[:16], version=5))


PIECE = 4 << 20             # bytes that go through the hashes together
ALGORITHMS: dict[str, Callable[[], Any]] = {"xxh64": Xxh64, "sha1": hashlib.sha1, "sha256": hashlib.sha256, "uuid": Uuid}
WHOLE_ONLY = {"uuid"}


class Digest(NamedTuple):
    algorithm: str
    value: str
    tensor: str         # "" for the whole model


def hashes(file: TensorFile, algorithms: list[str], per_tensor: bool = True) -> Iterator[Digest]:
    """Hashes of each tensor (where asked for) and then of the whole; the data is read once.

    While one piece goes through the hashes, each on a thread of its own, the next one is read.
    """
    whole = {name: ALGORITHMS[name]() for name in algorithms}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 2 * len(algorithms) + 1)) as pool:
        for tensor in file.tensors.values():
            single = {name: ALGORITHMS[name]() for name in algorithms if per_tensor and name not in WHOLE_ONLY}
            digests = [*single.values(), *whole.values()]
            pieces = tensor.pieces(PIECE)
            ahead = pool.submit(next, pieces, None)
            while (piece := ahead.result()) is not None:
                ahead = pool.submit(next, pieces, None)
                data = np.ascontiguousarray(piece)
                waiting = [pool.submit(digest.update, data) for digest in digests[1:]]
                digests[0].update(data)
                for done in waiting:
                    done.result()
            for name, digest in single.items():
                yield Digest(name, digest.hexdigest(), tensor.name)
    for name, digest in whole.items():
        yield Digest(name, digest.hexdigest(), "")
