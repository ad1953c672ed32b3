"""A whole model over the fake driver: uploaded, launched, recorded and replayed by the real numba-cuda, computed as the PTX it compiled."""

import functools
import gc
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import fake_driver
import numpy as np
import pytest
from conftest import DRIVER

from pyggml import native
from pyggml.backends.cuda import device, graphs, kernelcache, matvec
from pyggml.context import Context
from pyggml.errors import Cancelled, PyggmlError
from pyggml.model import Model

pytestmark = pytest.mark.skipif(native.lib is None, reason="the CPU backend needs the native kernels")


def test_a_model_launched_recorded_and_replayed(toy):
    model = Model.load(toy)
    cpu, gpu = Context(model, n_ctx=32), Context(model, n_ctx=32, n_gpu_layers="all")
    expected, found = cpu.eval([1, 5, 9])[-1].copy(), gpu.eval([1, 5, 9])[-1].copy()
    nodes = []
    for _ in range(4):                          # launched, recorded, replayed, replayed
        assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
        before = DRIVER.calls.get("nodes", 0)
        token = [int(expected.argmax())]
        expected, found = cpu.eval(token)[-1].copy(), gpu.eval(token)[-1].copy()
        nodes.append(DRIVER.calls.get("nodes", 0) - before)
    assert nodes == [0, 17, 17, 17]             # launches of a token: 5 in a layer, and 12 in the last with the embedding and the logits
    assert not DRIVER.problems and DRIVER.calls["cuStreamBeginCapture"] == 1
    gpu_device = device.open_device(0)
    assert gpu_device.allocated <= DRIVER.used < gpu_device.allocated + (1 << 16)      # beside the arenas only small constants
    del gpu, cpu, model
    gc.collect()
    gpu_device.free                             # noqa: B018  which gives back what waits for it
    assert gpu_device.allocated == 0 and DRIVER.used < 1 << 16 and not any(isinstance(x, list) and len(x) > 1 for x in DRIVER.objects.values())


def test_a_run_that_is_stopped_while_it_is_recorded(toy):
    """The recording is whole, or later runs would leave out the rest of the steps."""
    model = Model.load(toy)
    cpu, gpu = Context(model, n_ctx=32), Context(model, n_ctx=32, n_gpu_layers="all")
    gpu.eval([1])                               # launched
    program = gpu.plan(1, 1).program
    whole = list(program._launches)
    program._launches[1] = (lambda *arguments: (gpu.cancel(), whole[1][0](*arguments)), whole[1][1])
    with pytest.raises(Cancelled):
        gpu.eval([5])                           # recorded, and stopped after its second step
    program._launches = whole
    for token in (5, 9):                        # replayed
        gpu.eval([token])
    expected = cpu.eval([1, 5, 9])[-1]
    assert np.linalg.norm(gpu._logits[-1] - expected) < 0.05 * np.linalg.norm(expected) and not DRIVER.problems


def test_what_was_not_launched_to_its_end_is_not_recorded():
    """Ctrl-C while kernels are compiled: the rest of them would be loaded in the middle of a recording, which a capture forbids."""
    recorder, launched = graphs.Recorder(device.open_device(0)), []

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorder.run(1, interrupted)
    before = DRIVER.calls.get("cuStreamBeginCapture", 0)
    recorder.run(1, lambda: launched.append(1))
    assert launched == [1] and DRIVER.calls["cuStreamBeginCapture"] == before
    recorder.run(1, lambda: launched.append(2))
    assert launched == [1, 2] and DRIVER.calls["cuStreamBeginCapture"] == before + 1


def test_another_thread_computes_the_same(toy):
    context, rows = Context(Model.load(toy), n_ctx=32, n_gpu_layers="all"), []
    for thread in (threading.Thread(target=lambda: rows.append(context.eval([1])[-1].copy())) for _ in range(2)):
        context.reset()
        thread.start()
        thread.join()
    context.reset()
    rows.append(context.eval([1])[-1].copy())
    assert len(rows) == 3 and (rows[0] == rows[1]).all() and (rows[0] == rows[2]).all() and not DRIVER.problems


def test_threads_that_open_a_gpu_at_once_share_it(monkeypatch):
    class Slow(device.Device):
        def __init__(self, gpu):
            time.sleep(0.1)
            super().__init__(gpu)

    monkeypatch.setattr(device, "Device", Slow)
    monkeypatch.setattr(device, "_opened", functools.cache(device._opened.__wrapped__))
    found: list = []
    threads = [threading.Thread(target=lambda: found.append(device.open_device(0))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1]


def test_the_second_gpu_is_the_only_one_that_is_used(toy):
    """Whoever asks Numba for something without naming a GPU gets a context of the first one, half a gigabyte of its memory, and events there."""
    answers = []

    def answer():
        context = Context(Model.load(toy), n_ctx=32, n_gpu_layers="all", main_gpu=1)
        context.greedy = True
        answers.append([context.eval([t])[-1].copy() for t in (1, 5)])

    thread = threading.Thread(target=answer)
    DRIVER.used_contexts.clear()
    thread.start()
    thread.join()
    expected = Context(Model.load(toy), n_ctx=32).eval([1, 5])[-1]
    assert np.linalg.norm(answers[0][-1] - expected) < 0.05 * np.linalg.norm(expected)
    assert DRIVER.used_contexts == {fake_driver.CONTEXT + 1} and not DRIVER.problems


def test_what_another_thread_enqueues_is_not_recorded():
    """One thread records while another wants to copy: the copy waits, and is done, not recorded."""
    gpu_device = device.open_device(0)
    arena, host = device.Arena(gpu_device, 64, "the test"), gpu_device.pinned((64,), np.uint8)

    def copy():
        with gpu_device.active():
            gpu_device.clear(arena.array)
            gpu_device.download(host, arena.array[:64])

    def enqueue():
        other.start()
        other.join(0.2)

    other, host[:] = threading.Thread(target=copy), 7
    with gpu_device.active():
        recording = graphs.Recording(gpu_device, enqueue)
    other.join()
    gpu_device.synchronize()
    assert not host.any() and not DRIVER.objects[int(recording._exec)] and not DRIVER.problems


def test_a_second_process_compiles_nothing(toy):
    """Kernels that a process compiled are there for the next; a file that is broken is compiled again, and whole afterwards."""
    kept = Path(os.environ["PYGGML_KERNEL_CACHE"])

    def another() -> dict:
        done = subprocess.run([sys.executable, str(Path(__file__).with_name("one_token.py")), str(toy)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    another()                                   # what the tests before this one did not compile
    files = sorted(kept.iterdir())
    second = another()
    assert second["compiled"] == 0 and not second["problems"] and sorted(kept.iterdir()) == files
    (cut,), (changed,) = kept.glob("_table-*"), kept.glob("_relay-*")
    cut.write_bytes(cut.read_bytes()[:2000])
    changed.write_bytes(bytes(b ^ (0x55 * (200 < n < 220)) for n, b in enumerate(changed.read_bytes())))
    assert another() == {**second, "compiled": 2}
    assert all(zipfile.ZipFile(path).testzip() is None for path in files)


def test_a_kernel_that_cannot_be_kept_computes_all_the_same(caplog):
    """Another release of numba-cuda may name its parts differently."""
    cache = kernelcache.KernelCache(matvec.matvec_kernel(matvec.Form("Q4_0")).py_func)
    with caplog.at_level("DEBUG", "pyggml"):
        cache.save_overload((), object())
        assert cache.load_overload((), object()) is None
    assert "the compiled matvec cannot be kept" in caplog.text and "the cache of kernels cannot be used" in caplog.text


def test_kernels_that_nobody_uses_are_deleted(tmp_path):
    old, new, other = (tmp_path / name for name in ("old-1.zip", "new-1.zip", "notes.txt"))
    for path, days in ((old, 100), (new, 80), (other, 100)):
        path.touch()
        os.utime(path, (time.time() - days * 86400,) * 2)
    kernelcache.delete_unused(tmp_path)
    assert sorted(tmp_path.iterdir()) == [new, other]


def test_where_kernels_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("PYGGML_KERNEL_CACHE", "0")
    assert kernelcache.folder() is None
    monkeypatch.setenv("PYGGML_KERNEL_CACHE", str(tmp_path / "here"))
    assert kernelcache.folder() == tmp_path / "here"
    monkeypatch.delenv("PYGGML_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernelcache.folder() == tmp_path / "pyggml" / "kernels"


def test_kernels_are_named_by_what_they_are_made_of():
    forms = [matvec.Form("Q4_0"), matvec.Form("Q4_1"), matvec.Form("Q4_0", rows=2), matvec.Form("Q4_0", "Q4_0")]
    names = [kernelcache.description(matvec.matvec_kernel(form)) for form in forms]
    assert len(set(names)) == len(names) and names[0] == kernelcache.description(matvec.matvec_kernel.__wrapped__(forms[0]))
    things = object()
    with pytest.raises(TypeError, match="no name that lasts"):
        kernelcache.description(lambda: things)


def test_a_compiler_that_lacks_its_libraries_is_named(monkeypatch):
    from numba.cuda.cudadrv import libs, nvvm

    assert device._no_compiler() == ""
    monkeypatch.setattr(libs, "get_libdevice", lambda: None)
    assert "libdevice) are not found" in device._no_compiler.__wrapped__()
    monkeypatch.setattr(nvvm, "_nvvm", None)
    assert "libdevice) are not found" in device._no_compiler.__wrapped__()


def test_memory_that_the_driver_does_not_give(monkeypatch):
    gpu_device = device.open_device(0)
    with pytest.raises(PyggmlError, match=r"the test needs 4\.00 GiB on cuda0, where 10\d\d\.\d MiB are free"):
        device.Arena(gpu_device, 4 << 30, "the test")
    monkeypatch.setattr(DRIVER, "largest", 1 << 20)             # there is enough, but in pieces
    with pytest.raises(PyggmlError, match=r"the test needs 2\.0 MiB in one piece on cuda0, which has 10\d\d\.\d MiB free in smaller ones"):
        device.Arena(gpu_device, 2 << 20, "the test")
