"""Hashes of tensor data: of each tensor and of all of them in file order, as llama.cpp's gguf-hash computes them. Metadata does not count,
so editing it changes no hash."""

from __future__ import annotations

import hashlib
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
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


PIECE, AHEAD = 2 << 20, 6           # bytes that go through the hashes together; how many such pieces may wait
ALGORITHMS: dict[str, Callable[[], Any]] = {"xxh64": Xxh64, "sha1": hashlib.sha1, "sha256": hashlib.sha256, "uuid": Uuid}
WHOLE_ONLY = {"uuid"}


class Digest(NamedTuple):
    algorithm: str
    value: str
    tensor: str         # "" for the whole model


def hashes(file: TensorFile, algorithms: list[str], per_tensor: bool = True) -> Iterator[Digest]:
    """Hashes of each tensor (where asked for) and then of the whole; the data is read once.

    Each hash that runs through all tensors has a thread of its own, and so have those of single tensors; none waits for another
    while the pieces read ahead last.
    """
    whole = {name: ALGORITHMS[name]() for name in algorithms}
    single = [name for name in algorithms if per_tensor and name not in WHOLE_ONLY]
    with ExitStack() as stack:
        worker = {key: stack.enter_context(ThreadPoolExecutor(1)) for key in [*((name, True) for name in whole), *((name, False) for name in single)]}
        under_way: deque[list[Future[Any]]] = deque()
        found: deque[tuple[str, str, Future[str]]] = deque()
        for tensor in file.tensors.values():
            of_tensor = {name: ALGORITHMS[name]() for name in single}
            for piece in tensor.pieces(PIECE):
                data = np.ascontiguousarray(piece)
                under_way.append([worker[name, all_of_it].submit(digest.update, data)
                                  for all_of_it, digests in ((True, whole), (False, of_tensor)) for name, digest in digests.items()])
                while len(under_way) > AHEAD:
                    for done in under_way.popleft():
                        done.result()
            found.extend((name, tensor.name, worker[name, False].submit(digest.hexdigest)) for name, digest in of_tensor.items())
            while found and found[0][2].done():
                name, of, value = found.popleft()
                yield Digest(name, value.result(), of)
        yield from (Digest(name, value.result(), of) for name, of, value in found)
        for done in (future for futures in under_way for future in futures):
            done.result()
    for name, digest in whole.items():
        yield Digest(name, digest.hexdigest(), "")
