"""The one routine that puts a file on disk: whole or not at all.

A temporary file is written beside the target, flushed to disk, read back and checked, and only then renamed over the target; the
folder is flushed last. Whatever fails before the rename leaves the old file as it was and removes the temporary one; what a killed
run leaves behind is removed by the next writer of the same file. Assumptions: rename within a folder is atomic, and after fsync
returns the bytes survive power loss.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pyggml.errors import Cancelled, PyggmlError
from pyggml.formats.values import printable

CHUNK = 1 << 20
BLOCK = 4096                # of file systems that can share blocks between files
_FICLONERANGE = 0x4020940D  # linux/fs.h
_SYNC_FILE_RANGE_WRITE = 2  # fcntl.h
_YOUNG = 60           # seconds in which a temporary file without a lock may still be about to be locked


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """Within the block SIGTERM raises SystemExit instead of ending the process at once, so that what was begun is cleaned up."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def open_file(path: str, flags: int) -> int:
    """A descriptor; a pipe without a writer does not block, a file that is being edited in place (inplace.py) does, for a moment."""
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except BlockingIOError:
        return os.open(path, flags | os.O_CLOEXEC)


class Output:
    """A file being written: `write` buffers and checks short writes, `tell` is the position in bytes."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd, self.path = fd, path
        self._pending, self._done = bytearray(), 0

    def write(self, data: Any) -> None:
        view = memoryview(data)
        if not view.nbytes:             # a shape with zeros cannot be cast
            return
        view = view.cast("B")
        if len(self._pending) + len(view) > CHUNK:
            self.flush()
        if len(view) > CHUNK:
            self._write(view)
        else:
            self._pending += view

    def restart(self, size: int) -> None:
        """Keep the first `size` bytes of what an earlier run has written and go on from there."""
        self._pending.clear()
        os.ftruncate(self.fd, size)
        self._done = os.lseek(self.fd, size, os.SEEK_SET)

    def overwrite(self, offset: int, data: bytes) -> None:
        """Replace bytes that are already written."""
        self.flush()
        os.pwrite(self.fd, data, offset)

    def copy(self, fd: int, offset: int) -> None:
        """Append the file behind `fd` from `offset` to its end: shared blocks where the file system can, copied by the kernel otherwise.
        PyggmlError before anything is copied when there is no room."""
        self.flush()
        left = os.fstat(fd).st_size - offset
        if left > BLOCK and (self._done - offset) % BLOCK == 0:
            before = -offset % BLOCK                            # blocks are shared from a block's start on
            self._copy(fd, offset, before)
            request = struct.pack("=qQQQ", fd, offset + before, 0, self._done)
            with contextlib.suppress(OSError):                  # most file systems cannot
                fcntl.ioctl(self.fd, _FICLONERANGE, request)
                self._done += left - before
                os.lseek(self.fd, self._done, os.SEEK_SET)
                return
            offset, left = offset + before, left - before
        check_room(self.path, left)
        self._copy(fd, offset, left)

    def _copy(self, fd: int, offset: int, n: int) -> None:
        while n:
            _start_writing(self.fd)                             # to disk, while the next part is copied
            try:
                done = os.copy_file_range(fd, self.fd, min(n, 32 * CHUNK), offset)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                done = self._copy_by_hand(fd, offset, n)
            else:
                self._done += done
            if not done:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            offset, n = offset + done, n - done

    def _copy_by_hand(self, fd: int, offset: int, n: int) -> int:
        part = os.pread(fd, min(n, 8 * CHUNK), offset)
        self._write(memoryview(part))
        return len(part)

    def pad(self, alignment: int) -> None:
        self.write(bytes(-self.tell() % alignment))

    def tell(self) -> int:
        return self._done + len(self._pending)

    def flush(self) -> None:
        pending, self._pending = self._pending, bytearray()
        self._write(memoryview(pending))

    def _write(self, view: memoryview) -> None:
        while view:
            n = os.write(self.fd, view)
            self._done += n
            view = view[n:]

    def read(self, offset: int, n: int) -> bytes:
        """Bytes already written and flushed, read back from the file."""
        parts = []
        while n:
            part = os.pread(self.fd, n, offset)
            if not part:
                raise PyggmlError(f"{self.path}: what was written cannot be read back; the disk or its file system is damaged")
            parts.append(part)
            offset, n = offset + len(part), n - len(part)
        return b"".join(parts)


def _start_writing(fd: int) -> None:
    """Have the system begin to write a file's bytes to disk, where it can be asked to; a later fsync then waits less."""
    import ctypes
    sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if sync_file_range is not None:
        sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)       # offset 0, length 0: all of it


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], size: int = 0, check: Callable[[Output], None] | None = None, resume: str = "",
              copied: int = 0) -> Iterator[Output]:
    """Write a new version of `path` (or a new file): the body writes to the Output; leaving it normally puts the file in place.

    size: bytes that will be written, where known: too little room is reported before anything is written.
    copied: of those, what Output.copy appends, which needs no room on a file system that shares blocks.
    check: called with the flushed file before the rename; raises when what it reads back is not what was written.
    resume: a key of hexadecimal digits that stands for all that goes into the file. A run that is killed or cancelled then leaves its
    part behind, and the next run with the same key finds it: `tell` is where it ended (see Output.restart). Bytes written before
    the machine went down are not trusted: the part's name carries the boot.
    A symbolic link is followed: what it points to is replaced. Mode and owner of an old file are kept.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    state = "the old file is unchanged" if os.path.lexists(target) else "nothing was written"
    try:
        with orderly_end(), locked(target) as old:
            remove_stale(folder, name)
            unique = f"{resume}.{_boot()}.part" if resume else f"{os.getpid()}.{os.urandom(4).hex()}.tmp"
            temporary = os.path.join(folder, f".{name}.{unique}")
            there = os.stat(temporary).st_blocks * 512 if resume and os.path.exists(temporary) else 0
            check_room(target, size - there - copied)
            _remove_parts(folder, name, resume)
            new = 0 if resume else os.O_EXCL
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | new | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666 if old is None else 0o600)
            out = Output(fd, target)
            try:
                _lock_part(fd, target)
            except PyggmlError:
                os.close(fd)
                raise
            try:
                if old is not None:
                    _copy_owner(fd, old)
                out.restart(os.fstat(fd).st_size)
                yield out
                out.flush()
                os.fsync(fd)
                if check is not None:
                    check(out)
                os.replace(temporary, target)
                state = "the new file is in place, but may not survive a power cut"
            except BaseException as error:
                if resume and isinstance(error, Cancelled | KeyboardInterrupt | SystemExit):
                    out.flush()
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary)
                raise
            finally:
                os.close(fd)
            sync_folder(folder)
    except OSError as error:
        raise PyggmlError(f"{target}: cannot write: {error.strerror or error}{_room(folder, size)}; {state}") from error


def _room(folder: str, size: int) -> str:
    try:
        free = os.statvfs(folder)
    except OSError:
        return ""
    return f" ({size} bytes needed, {free.f_bavail * free.f_frsize} free)" if size else f" ({free.f_bavail * free.f_frsize} bytes free)"


def refuse_input(outputs: Iterable[str | os.PathLike[str]], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """PyggmlError when a file that is to be written is one of those that it is made of, by whatever name."""
    there = [path for path in inputs if os.path.exists(path)]
    for path in outputs:
        if os.path.exists(path) and any(os.path.samefile(path, name) for name in there):
            raise PyggmlError(f"{printable(os.fspath(path))}: the output is the input; write to another path")


def require_place(path: str | os.PathLike[str]) -> None:
    """PyggmlError where no file can be written to `path`: before long work."""
    if os.path.isdir(path) or not os.access(os.path.dirname(os.path.realpath(path)), os.W_OK):
        raise PyggmlError(f"{printable(os.fspath(path))}: no file can be written there; give another path")


def check_room(path: str | os.PathLike[str], size: int) -> None:
    """PyggmlError when the disk of `path` has no room for `size` bytes."""
    folder = os.path.dirname(os.path.realpath(path))
    free = os.statvfs(folder)
    if size > free.f_bavail * free.f_frsize:
        raise PyggmlError(f"{os.fspath(path)}: cannot write: {size} bytes needed, {free.f_bavail * free.f_frsize} free in {folder}; "
                          "write to another disk")


_held = threading.local()      # files this thread has locked: a writer may lock around reading and replacing a file


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[os.stat_result | None]:
    """Hold the lock of an existing file, so that a second writer waits; yields its state, or None for a new file."""
    target, held = os.path.realpath(path), vars(_held).setdefault("files", {})
    if target in held:
        yield held[target]
        return
    with _lock(target) as state:
        held[target] = state
        try:
            yield state
        finally:
            del held[target]


@contextlib.contextmanager
def _lock(target: str) -> Iterator[os.stat_result | None]:
    while True:
        try:
            fd = open_file(target, os.O_RDONLY)
        except FileNotFoundError:
            yield None
            return
        try:
            state = os.fstat(fd)
            if not stat.S_ISREG(state.st_mode):
                raise PyggmlError(f"{target}: is not a regular file; give another path to write to")
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(state, os.stat(target))
            except FileNotFoundError:
                same = False
            if same:                            # else another writer replaced it while this one waited: lock the new file
                yield state
                return
        finally:
            os.close(fd)


def _copy_owner(fd: int, old: os.stat_result) -> None:
    with contextlib.suppress(PermissionError):  # only root may give a file away; the writer then owns it
        os.fchown(fd, old.st_uid, old.st_gid)
    os.fchmod(fd, stat.S_IMODE(old.st_mode))


def _lock_part(fd: int, target: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PyggmlError(f"{target}: another run is writing this file; wait for it, or write to another path") from None


def _boot() -> str:
    """A name for the time since the machine was started; unique where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip().replace("-", "")[:16]
    return os.urandom(8).hex()


def _remove_parts(folder: str, name: str, resume: str) -> None:
    """Remove what cancelled runs left of other versions of this target."""
    pattern = re.compile(re.escape("." + name) + r"\.([0-9a-f]+)\.([0-9a-f]+)\.part")
    for entry in os.listdir(folder):
        match = pattern.fullmatch(entry)
        if match and (match[1], match[2]) != (resume, _boot()):
            _remove_unlocked(os.path.join(folder, entry))


def _remove_unlocked(path: str) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(fd)


def remove_stale(folder: str, name: str) -> None:
    """Remove temporary files of the file `name` whose writer is gone: nobody holds their lock."""
    pattern = re.compile(re.escape("." + name) + r"\.(\d+)\.[0-9a-f]{8}\.tmp")
    for entry in os.listdir(folder):
        match = pattern.fullmatch(entry)
        if not match:
            continue
        with contextlib.suppress(OSError):
            fd = os.open(os.path.join(folder, entry), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _alive(int(match[1])) or time.time() - os.fstat(fd).st_mtime > _YOUNG:
                    os.unlink(os.path.join(folder, entry))
            finally:
                os.close(fd)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
