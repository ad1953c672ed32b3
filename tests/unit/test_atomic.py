"""A file is replaced whole or not at all, whatever fails on the way."""

import contextlib
import errno
import fcntl
import os
import stat
import struct
import subprocess
import sys
import threading

import pytest

from pyggml.errors import PyggmlError
from pyggml.formats import atomic

CALLS = ("open", "write", "fsync", "replace", "fchmod", "fchown", "statvfs", "fstat", "stat", "listdir", "pread")


class Shim:
    """The os module, except that call number `at` of the listed functions does `act` instead."""

    def __init__(self, at: int, act) -> None:
        self.at, self.act, self.seen, self.log = at, act, 0, []

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args, **kwargs):
            self.seen += 1
            self.log.append(name)
            if self.seen == self.at:
                return self.act(name, real, args)
            return real(*args, **kwargs)
        return call


def save(path, data, shim=None):
    with atomic.replacing(path, len(data), lambda out: out.read(0, 4)) as out:
        half = len(data) // 2
        out.write(data[:half])
        out.flush()
        out.write(data[half:])


def fail(code):
    def act(name, real, args):
        raise OSError(code, os.strerror(code))
    return act


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("existing", [True, False])
def test_every_failing_call_leaves_the_old_file(tmp_path, monkeypatch, code, existing):
    path = tmp_path / "m.gguf"
    for at in range(1, 100):
        if existing:
            path.write_bytes(b"old!")
        else:
            path.unlink(missing_ok=True)
        shim = Shim(at, fail(code))
        monkeypatch.setattr(atomic, "os", shim)
        try:
            save(path, b"new content")
        except PyggmlError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        monkeypatch.setattr(atomic, "os", os)
        found = path.read_bytes() if path.exists() else None
        # once renamed, the new file stands even if flushing the folder fails
        assert found in ((b"old!" if existing else None), b"new content")
        assert [p.name for p in tmp_path.iterdir()] == (["m.gguf"] if found is not None else [])
        if shim.seen < at:
            break
    assert at > 10 and found == b"new content"


def test_short_writes_are_completed(tmp_path, monkeypatch):
    class Dribble(Shim):
        def __getattr__(self, name):
            if name == "write":
                return lambda fd, data: os.write(fd, data[:3])
            return super().__getattr__(name)
    monkeypatch.setattr(atomic, "os", Dribble(0, None))
    save(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_bytes_that_do_not_read_back_are_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old!")

    def check(out):
        raise PyggmlError("not what was written")
    with pytest.raises(PyggmlError, match="not what was written"), atomic.replacing(path, 3, check) as out:
        out.write(b"new")
    assert path.read_bytes() == b"old!" and len(list(tmp_path.iterdir())) == 1




def test_killed_at_every_call(tmp_path):
    path = tmp_path / "m.gguf"
    killed = 0
    for at in range(1, 100):
        path.write_bytes(b"old!")
        pid = os.fork()
        if pid == 0:
            atomic.os = Shim(at, lambda name, real, args: os.kill(os.getpid(), 9))
            save(path, b"new content")
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
        assert path.read_bytes() in (b"old!", b"new content")
        killed += died
        save(path, b"next")                               # the next writer cleans up
        assert path.read_bytes() == b"next" and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
        if not died:
            break
    assert killed > 10


def test_mode_and_link_are_kept(tmp_path):
    folder = tmp_path / "real"
    folder.mkdir()
    real, link = folder / "m.gguf", tmp_path / "link.gguf"
    real.write_bytes(b"old!")
    real.chmod(0o640)
    link.symlink_to(real)
    save(link, b"new content")
    assert link.is_symlink() and real.read_bytes() == b"new content" and stat.S_IMODE(real.stat().st_mode) == 0o640
    old = os.umask(0o027)
    try:
        save(tmp_path / "fresh", b"new content")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640


def test_the_temporary_file_of_a_living_writer_stays(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"old!")
    other = tmp_path / f".m.{os.getppid()}.01234567.tmp"
    other.write_bytes(b"busy")
    with open(other) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        save(path, b"new content")
        assert other.exists()
    other.rename(tmp_path / ".m.999999999.01234567.tmp")
    save(path, b"new content")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_second_writer_waits_for_the_first(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"old!")
    order = []
    inside, go = threading.Event(), threading.Event()

    def first():
        with atomic.replacing(path) as out:
            out.write(b"1")
            inside.set()
            go.wait()
            order.append("first")

    def second():
        with atomic.replacing(path) as out:
            order.append("second")
            out.write(b"2")

    a, b = threading.Thread(target=first), threading.Thread(target=second)
    a.start()
    inside.wait()
    b.start()
    b.join(0.1)
    go.set()
    a.join()
    b.join()
    assert order == ["first", "second"] and path.read_bytes() == b"2"


def test_readers_see_whole_files(tmp_path):
    path = tmp_path / "m"
    save(path, b"\0" * 4096)
    stop, seen = threading.Event(), []

    def read():
        while not stop.is_set():
            seen.append(len(set(path.read_bytes())) == 1)
    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for i in range(100):
        save(path, bytes([i % 256]) * 4096)
    stop.set()
    for reader in readers:
        reader.join()
    assert seen and all(seen)


def test_too_little_room_is_said_before_writing(tmp_path):
    with pytest.raises(PyggmlError, match=r"\d+ bytes needed, \d+ free"), atomic.replacing(tmp_path / "a", 1 << 62):
        raise AssertionError("the body must not run")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_only_regular_files_are_replaced(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(PyggmlError, match="not a regular file|Is a directory"):
        save(tmp_path / "x", b"new content")


def test_termination_leaves_nothing_behind(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"old!")
    script = ("import sys, time\nfrom pyggml.formats import atomic\n"
              "with atomic.replacing(sys.argv[1]) as out:\n out.write(bytes(4 << 20))\n print('writing', flush=True)\n time.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n" and len(list(tmp_path.iterdir())) == 2
    process.terminate()
    assert process.wait(10) == 143
    assert path.read_bytes() == b"old!" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("clones", [True, False], ids=["shares", "copies"])
@pytest.mark.parametrize("head, offset", [(4096, 4096), (8192, 100), (4096 + 100, 100), (5000, 4096), (12288, 4096 * 3)])
def test_the_rest_of_a_file_is_shared_or_copied(tmp_path, monkeypatch, clones, head, offset):
    """A file system that shares blocks is played: it takes whole blocks only, as the kernel does."""
    old, path = tmp_path / "old", tmp_path / "new"
    data = os.urandom(5 * 4096 + 77)
    old.write_bytes(data)
    shared = []

    def ioctl(fd, request, argument):
        source, start, length, target = struct.unpack("=qQQQ", argument)
        if request != 0x4020940D or not clones:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        assert start % 4096 == 0 and target % 4096 == 0 and length == 0
        shared.append(os.pwrite(fd, os.pread(source, len(data), start), target))
    monkeypatch.setattr(atomic.fcntl, "ioctl", ioctl)
    with open(old, "rb") as f, atomic.replacing(path) as out:
        out.write(b"h" * head)
        out.copy(f.fileno(), offset)
        assert out.tell() == head + len(data) - offset
        out.write(b"end")
    assert path.read_bytes() == b"h" * head + data[offset:] + b"end"
    assert bool(shared) == (clones and (head - offset) % 4096 == 0)


@pytest.mark.parametrize("clones", [True, False], ids=["shares", "copies"])
def test_shared_blocks_need_no_room(tmp_path, monkeypatch, clones):
    old, path = tmp_path / "old", tmp_path / "new"
    old.write_bytes(os.urandom(8 * 4096))
    path.write_bytes(b"old!")

    def ioctl(fd, request, argument):
        if not clones:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        os.pwrite(fd, old.read_bytes()[4096:], 4096)

    class Full:
        f_bavail, f_frsize = 2, 4096
    monkeypatch.setattr(atomic.fcntl, "ioctl", ioctl)
    monkeypatch.setattr(os, "statvfs", lambda folder: Full)
    outcome = contextlib.nullcontext() if clones else pytest.raises(PyggmlError, match="28672 bytes needed, 8192 free")
    with open(old, "rb") as f, outcome, atomic.replacing(path, 8 * 4096, copied=7 * 4096) as out:
        out.write(b"h" * 4096)
        out.copy(f.fileno(), 4096)
    assert path.read_bytes() == (b"h" * 4096 + old.read_bytes()[4096:] if clones else b"old!") and len(list(tmp_path.iterdir())) == 2


def test_disk_full_in_a_limited_process(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"old!")
    script = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
              "from pyggml.formats import atomic\nfrom pyggml.errors import PyggmlError\n"
              "try:\n with atomic.replacing(sys.argv[1]) as out: out.write(bytes(4 << 20))\n"
              "except PyggmlError as e: print(e); sys.exit(1)\n")
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert done.returncode == 1 and "cannot write: File too large" in done.stdout
    assert path.read_bytes() == b"old!" and len(list(tmp_path.iterdir())) == 1
