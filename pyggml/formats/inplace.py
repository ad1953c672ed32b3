"""Changing the start of a file where it lies, without moving what follows, and undoing it when it is cut off half way.

Before a byte is changed, the bytes that will be are written to `.NAME.undo` beside the file and flushed. When the change is on
disk the undo file is removed; if one is found later, the change was interrupted and is taken back. A change happens only while
nobody else has the file open: a lease of the kernel says so, and makes programs that open it meanwhile wait.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import struct
from collections.abc import Iterator

import numpy as np

from pyggml.errors import GGUFError
from pyggml.formats import atomic
from pyggml.formats.values import printable

_MAGIC = b"PYGGUNDO"
_RECORD = struct.Struct("<8sQQQQ32s")           # magic, file size, bytes inserted at the start, offset and length of the old bytes, SHA-256
_INSERT_RANGE, _COLLAPSE_RANGE = 0x20, 0x08     # linux/falloc.h


def undo_path(target: str) -> str:
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name}.undo")


@contextlib.contextmanager
def alone(path: str | os.PathLike[str]) -> Iterator[int | None]:
    """A read-write descriptor of a file that nobody else has open, while the block runs; None where that cannot be had."""
    target = os.path.realpath(path)
    try:
        fd = atomic.open_file(target, os.O_RDWR)
    except OSError:
        yield None
        return
    try:
        yield fd if _lock(fd, target) else None
    finally:
        os.close(fd)                            # gives lock and lease back


def _lock(fd: int, target: str) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), os.stat(target)):
            return False
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)      # who waits for the lease is announced by a signal; this one is ignored
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except (OSError, AttributeError):                       # open elsewhere, not the owner, or no leases on this system
        return False
    return True


def replace_start(path: str | os.PathLike[str], fd: int, old: np.ndarray, new: bytes) -> bool:
    """Replace the first bytes of the file behind `fd` (from `alone`) by `new`, which is as long as they are (`old`, uint8), or longer
    by whole blocks. False when the file system cannot insert blocks; nothing has changed then. OSError is raised with the file as it was.
    """
    target = os.path.realpath(path)
    inserted = len(new) - len(old)
    places = np.flatnonzero(old != np.frombuffer(new, np.uint8)) if not inserted else np.array([0, len(old) - 1])
    if not len(places):
        return True
    first, last = int(places[0]), int(places[-1]) + 1
    with atomic.orderly_end():
        size = os.fstat(fd).st_size
        _write_undo(target, struct.pack("<QQQQ", size, inserted, first, last - first), old[first:last].tobytes())
        try:
            if inserted and not _fallocate(fd, _INSERT_RANGE, inserted):
                _drop_undo(target)
                return False
            _write_at(fd, new[first:last + inserted], first)
            os.fsync(fd)
            if _read_at(fd, first, last + inserted - first) != new[first:last + inserted]:
                raise OSError(errno.EIO, "the header read back is not what was written")
        except BaseException:
            _undo(target, fd)
            raise
        _drop_undo(target)
        return True


def _digest(data: bytes) -> bytes:
    import hashlib  # 3 ms that every opened file would pay

    return hashlib.sha256(data).digest()


def _write_undo(target: str, numbers: bytes, old: bytes) -> None:
    digest = _digest(numbers + old)
    fd = os.open(undo_path(target), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _write_at(fd, _MAGIC + numbers + digest + old, 0)
        os.fsync(fd)
    except BaseException:
        os.unlink(undo_path(target))
        raise
    finally:
        os.close(fd)
    atomic.sync_folder(os.path.dirname(target))


def _drop_undo(target: str) -> None:
    """The change stands (or is taken back). The folder is not flushed: after a power cut the undo file may be there again, and
    takes the change back."""
    os.unlink(undo_path(target))


def _undo(target: str, fd: int) -> None:
    """Take a change back, if its undo file is whole; one that is not was cut off before the change began."""
    with open(undo_path(target), "rb") as f:
        record = f.read()
    if len(record) >= _RECORD.size:
        magic, size, inserted, first, length, digest = _RECORD.unpack_from(record)
        old = record[_RECORD.size:]
        if magic == _MAGIC and len(old) == length and _digest(record[8:40] + old) == digest:
            now = os.fstat(fd).st_size
            if now not in (size, size + inserted):
                raise GGUFError(f"{printable(target)}: an edit of this file was interrupted, and the file was changed since; "
                                f"check it, then remove {printable(undo_path(target))}")
            if inserted and now == size + inserted:
                _fallocate(fd, _COLLAPSE_RANGE, inserted)
            _write_at(fd, old, first)
            os.fsync(fd)
    _drop_undo(target)


def recover(path: str | os.PathLike[str]) -> None:
    """Take back an edit of `path` that was interrupted. GGUFError where that needs rights that are not there."""
    target = os.path.realpath(path)
    try:
        while os.path.lexists(undo_path(target)):
            fd = atomic.open_file(target, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)              # an editor at work finishes first
                # a file renamed over this one meanwhile has undo files of its own: look again
                if os.path.samestat(os.fstat(fd), os.stat(target)) and os.path.lexists(undo_path(target)):
                    _undo(target, fd)
            finally:
                os.close(fd)
    except OSError as error:
        raise GGUFError(f"{printable(target)}: an edit of this file was interrupted and cannot be taken back ({error.strerror}); "
                        "open it once as a user who may write it") from None


def _fallocate(fd: int, mode: int, n: int) -> bool:
    """Insert or remove `n` bytes at the start of a file; False where the file system cannot."""
    import ctypes
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return False
    if fallocate(fd, mode, ctypes.c_int64(0), ctypes.c_int64(n)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code))


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def _read_at(fd: int, offset: int, n: int) -> bytes:
    parts = []
    while n:
        part = os.pread(fd, n, offset)
        if not part:
            break
        parts.append(part)
        offset, n = offset + len(part), n - len(part)
    return b"".join(parts)
