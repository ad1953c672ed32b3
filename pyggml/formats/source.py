"""Where the bytes of a model come from: a memory map, plain reads of a file, or (remote.py) byte ranges over HTTP.

A source has a `name`, a `size` in bytes, `head(n)`: a buffer with at least the first n bytes, and `array(offset, n)`:
those bytes as uint8. A map hands out views; what a file that is cut meanwhile lacks reads as zeros there, and `verify` says so.
Reads hand out copies, and fail at once.
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
import weakref
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pyggml.errors import GGUFError, PyggmlError
from pyggml.formats.atomic import open_file
from pyggml.formats.values import printable
from pyggml.native import ffi, lib

FIRST_READ = 1 << 20
READ_AHEAD = 16 << 20            # asked for at a time


class Source(Protocol):
    name: str
    size: int
    map: mmap.mmap | None

    def head(self, n: int) -> Any: ...
    def array(self, offset: int, n: int) -> np.ndarray: ...
    def verify(self) -> None: ...
    def close(self) -> None: ...


def _open_regular(path: str) -> tuple[int, os.stat_result]:
    """A read-only descriptor of a regular file and its state; PyggmlError says what else it is."""
    try:
        fd = open_file(path, os.O_RDONLY)
    except OSError as error:
        raise PyggmlError(f"{printable(path)}: cannot open: {error.strerror}") from None
    state = os.fstat(fd)
    if not stat.S_ISREG(state.st_mode):
        os.close(fd)
        kind = "a directory" if stat.S_ISDIR(state.st_mode) else "not a regular file"
        raise PyggmlError(f"{printable(path)}: is {kind}; give the path of a model file")
    return fd, state


class _LocalFile:
    """A file that is opened here, or one whose descriptor the caller opened and keeps open."""

    map: mmap.mmap | None = None
    fd, borrowed = -1, True

    def __init__(self, path: str | os.PathLike[str], fd: int | None = None) -> None:
        self.name = os.fspath(path)
        self.fd, self.state = _open_regular(self.name) if fd is None else (fd, os.fstat(fd))
        self.borrowed = fd is not None
        self.size = self.state.st_size

    def __del__(self) -> None:
        _LocalFile.close(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (type(self), os.path.abspath(self.name), self.size, self.state.st_mtime_ns)

    def close(self) -> None:
        """Give the descriptor back; nothing can be read any more."""
        if not self.borrowed:
            os.close(self.fd)
        self.fd, self.borrowed = -1, True

    def changed(self) -> bool:
        """The file was written to or cut since it was opened (a new file renamed over it does not matter to the open one)."""
        now = os.fstat(self.fd)
        return (now.st_size, now.st_mtime_ns) != (self.state.st_size, self.state.st_mtime_ns)

    def verify(self) -> None:
        """GGUFError when bytes that were handed out were not the file's."""


def _reopened(kind: type[_LocalFile], path: str, size: int, mtime_ns: int) -> _LocalFile:
    """A file that was pickled, which is by its path."""
    file = kind(path)
    if (file.size, file.state.st_mtime_ns) != (size, mtime_ns):
        raise GGUFError(f"{printable(path)}: the file was changed since it was pickled; open it again")
    return file


mapped: weakref.WeakSet[MappedFile] = weakref.WeakSet()         # every file that is mapped now


class MappedFile(_LocalFile):
    """A read-only shared map: arrays are views of it, pages come in when they are touched.

    `guarded`: a part that is gone from the file reads as zeros (native/guard.c); without, touching it would end the process.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.map = mmap.mmap(self.fd, self.size, access=mmap.ACCESS_READ) if self.size else None
        self._bytes = np.frombuffer(self.map, np.uint8) if self.map is not None else np.empty(0, np.uint8)
        self._watch = -1
        if self.map is not None and lib is not None:
            self._watch = lib.pyg_guard_watch(ffi.cast("void *", self._bytes.ctypes.data), self.size)
        self.guarded = self._watch >= 0 or self.map is None
        if self._watch >= 0:
            self._forget = weakref.finalize(self.map, lib.pyg_guard_forget, self._watch)
            self._forget.atexit = False
            mapped.add(self)

    def close(self) -> None:
        """Give the map back too, unless arrays of it are in use: they keep it until they are gone."""
        self._bytes = np.empty(0, np.uint8)
        try:
            if self.map is not None:
                self.map.close()
                if self._watch >= 0:
                    self._forget()
        except BufferError:
            pass
        super().close()

    def read_ahead(self) -> None:
        """Ask the system for the whole file, in order and in the background: sooner than by touching page after page."""
        if self.size < READ_AHEAD or not hasattr(os, "posix_fadvise"):
            return
        fd, size = os.dup(self.fd), self.size

        def ask() -> None:
            for at in range(0, size, READ_AHEAD):
                os.posix_fadvise(fd, at, READ_AHEAD, os.POSIX_FADV_WILLNEED)
            os.close(fd)

        threading.Thread(target=ask, name="pyggml-read-ahead", daemon=True).start()

    def verify(self) -> None:
        if self._watch >= 0 and lib.pyg_guard_lost(self._watch):
            now = os.fstat(self.fd).st_size
            why = f"the file was changed while it was in use (it had {self.size} bytes, now {now})" if self.changed() else \
                "a part of the file cannot be read; its disk is damaged"
            raise GGUFError(f"{printable(self.name)}: {why}; what was made of it is worthless, open it again")

    def head(self, n: int) -> Any:
        return self.map if self.map is not None else b""

    def array(self, offset: int, n: int) -> np.ndarray:
        if self.fd < 0:
            raise PyggmlError(f"{printable(self.name)}: the file is closed; open it again")
        return self._bytes[offset:offset + n]


class PlainFile(_LocalFile):
    """Reads into private memory: nothing that happens to the file afterwards can hurt."""

    def __init__(self, path: str | os.PathLike[str], fd: int | None = None) -> None:
        super().__init__(path, fd)
        self._head = b""

    def head(self, n: int) -> Any:
        have, n = len(self._head), min(n, self.size)
        if have < n:
            self._head = b"".join((self._head, self.array(have, n - have).data))     # bytes: a slice of them costs the least
        return self._head

    def array(self, offset: int, n: int) -> np.ndarray:
        data = np.empty(n, np.uint8)
        self._read(data, offset)
        return data

    def _read(self, into: np.ndarray, offset: int) -> None:
        view, done = memoryview(into.data), 0
        while done < into.nbytes:
            try:
                got = os.preadv(self.fd, [view[done:]], offset + done)
            except OSError as error:
                raise GGUFError(f"{printable(self.name)}: offset 0x{offset + done:x}: cannot read: {error.strerror}") from None
            if not got:
                raise GGUFError(f"{printable(self.name)}: the file was cut to {offset + done} bytes while it was read; open it again")
            done += got


class Memory:
    """A model that is already in memory."""

    map: mmap.mmap | None = None

    def __init__(self, data: Any, name: str = "<memory>") -> None:
        self.name, self._data = name, memoryview(data).cast("B")
        self.size, self._bytes = self._data.nbytes, np.frombuffer(self._data, np.uint8)

    def head(self, n: int) -> Any:
        return self._data

    def array(self, offset: int, n: int) -> np.ndarray:
        return self._bytes[offset:offset + n]

    def __reduce__(self) -> tuple[Any, ...]:
        raise PyggmlError(f"{printable(self.name)}: a model in memory is not pickled; pickle its bytes, or write it to a file and open that")

    def verify(self) -> None:
        """Memory stays."""

    def close(self) -> None:
        """Memory is whose it was."""


def is_address(path: str) -> bool:
    """Whether `path` names a file on a server (remote.py) rather than a local one."""
    return path.startswith(("http://", "https://", "hf:"))


def source_of(path: str | os.PathLike[str], use_mmap: bool = True) -> Source:
    """The bytes of a local file or of one on a server."""
    name = os.fspath(path)
    if is_address(name):
        from pyggml.formats.remote import HttpFile
        return HttpFile(name, FIRST_READ)
    return local(name, use_mmap)


def local(path: str | os.PathLike[str], use_mmap: bool = True) -> MappedFile | PlainFile:
    if use_mmap:
        file = MappedFile(Path(path))
        if file.guarded:
            return file
    return PlainFile(Path(path))
