"""Processors and memory: masks, ranges and nodes as flags give them, workers where they were put, weights that stay in memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pyggml import native
from pyggml.backends import placement
from pyggml.context import Context
from pyggml.errors import ParameterError
from pyggml.model import Model

MODEL = Path(__file__).parents[2] / "models" / "books6m-q8_0.gguf"
needs_linux = pytest.mark.skipif(native.lib is None or not Path("/proc/self/task").exists(), reason="Linux and its kernels")


@pytest.fixture
def eight(monkeypatch, tmp_path):
    """Eight usable processors on two nodes, the second of which has one that is not usable."""
    monkeypatch.setattr(placement, "usable", lambda: set(range(8)))
    monkeypatch.setattr(placement, "SYSTEM", tmp_path)
    for node, cpus in enumerate(("0-3\n", "4-8\n", "9\n")):
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(cpus)


@pytest.mark.parametrize(("mask", "span", "expected"), [
    (None, None, None), ("f", None, {0, 1, 2, 3}), ("0x81", None, {0, 7}), (None, "2-4", {2, 3, 4}), ("1", "6-", {0, 6, 7}), (None, "-1", {0, 1}),
    ("fff", None, set(range(8))), (None, "5-99999999999", {5, 6, 7}),
])
def test_processors_that_flags_name(eight, mask, span, expected):
    assert placement.wanted(mask, span) == expected


@pytest.mark.parametrize(("mask", "span", "message"), [("xyz", None, "xyz"), ("", None, "hexadecimal"), (None, "3", "FIRST-LAST"),
                                                       (None, "4-2", "4-2"), ("100", None, "usable are 0, 1")])
def test_bad_processors(eight, mask, span, message):
    with pytest.raises(ParameterError, match=message):
        placement.wanted(mask, span)


def test_nodes(eight):
    assert placement.nodes() == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    assert placement.over_nodes()(5) == [{0, 1, 2, 3}] * 3 + [{4, 5, 6, 7}] * 2
    assert placement.one_each()(10)[7:] == [{7}, {0}, {1}]


def test_a_machine_without_nodes(monkeypatch, tmp_path):
    monkeypatch.setattr(placement, "SYSTEM", tmp_path)
    assert placement.nodes() == [placement.usable()] and placement.physical_cores() == len(placement.usable())


@needs_linux
def test_workers_are_where_they_were_put():
    before = os.sched_getaffinity(0)
    others = {int(t.name) for t in Path("/proc/self/task").iterdir()}
    try:
        place = placement.one_each()
        context = Context(Model.load(MODEL), n_ctx=16, n_threads=3, n_threads_batch=2, place=place)
        new = sorted({int(t.name) for t in Path("/proc/self/task").iterdir()} - others)
        wanted = place(3)
        assert [os.sched_getaffinity(t) for t in new] == [wanted[1], wanted[2], wanted[1]] and os.sched_getaffinity(0) == wanted[0]
        assert np.isfinite(context.eval([1, 2, 3])).all()
    finally:
        os.sched_setaffinity(0, before)


@needs_linux
def test_threads_for_batches():
    model = Model.load(MODEL)
    context = Context(model, n_ctx=32, n_threads=1, n_threads_batch=3)
    want = Context(model, n_ctx=32, n_threads=1).eval(range(20)).copy()
    np.testing.assert_array_equal(context.eval(range(20)), want)
    assert context.pool.barriers == 0 and context._batch_pool.barriers > 0
    context.eval([5])
    assert context.pool.barriers > 0
    with pytest.raises(ParameterError, match="n_threads_batch is 0"):
        Context(model, n_threads_batch=0)


LOCKED = """
import logging, re, sys
from pathlib import Path
from pyggml.context import Context
from pyggml.model import Model

logging.basicConfig(stream=sys.stdout)
path, use_mmap, repack = sys.argv[1], sys.argv[2] == "True", sys.argv[3] == "True"
locked = lambda: 1024 * int(re.search(r"VmLck:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = locked()
model = Model.load(path, use_mmap=use_mmap, use_mlock=True)
context = Context(model, n_ctx=16, repack=repack)
context.eval([1, 2])
print((locked() - before) / model.nbytes)
"""


@needs_linux
@pytest.mark.parametrize("repack", [True, False])
@pytest.mark.parametrize("use_mmap", [True, False])
def test_weights_stay_in_memory(repack, use_mmap):
    """In a process of its own, since what other tests lock and unlock counts too."""
    command = [sys.executable, "-c", LOCKED, str(MODEL), str(use_mmap), str(repack)]
    *told, share = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    if not told:                        # whoever may not lock that much is told
        assert 0.9 < float(share) < 1.6 + (2 << 20) / MODEL.stat().st_size
    else:
        assert len(told) == 1 and "cannot lock" in told[0] and "limit is" in told[0]


@needs_linux
def test_a_refused_lock_is_told_once(monkeypatch, caplog):
    calls = []
    real = native.lib

    class Refusing:
        def __getattr__(self, name):
            return getattr(real, name) if name != "pyg_lock" else lambda start, n: calls.append(n) or 12

    from pyggml.backends import cpu
    monkeypatch.setattr(cpu, "lib", Refusing())
    Context(Model.load(MODEL, use_mlock=True), n_ctx=16, repack=False).eval([1, 2])
    assert len(calls) == 1
    assert re.search(r"cannot lock \d+\.\d MB in memory \(Cannot allocate memory; the limit is .*\): going on without", caplog.text)


@needs_linux
def test_a_file_that_is_not_mapped_computes_the_same():
    want = Context(Model.load(MODEL), n_ctx=32).eval(range(20)).copy()
    model = Model.load(MODEL, use_mmap=False)
    for repack in (True, False, True):
        context = Context(model, n_ctx=32, repack=repack, n_threads=2)
        got = [context.eval(range(20)).copy(), context.eval([3]).copy()]
        assert not repack or np.array_equal(got[0], want)
    np.testing.assert_array_equal(model.file["blk.0.ffn_up.weight"].raw, Model.load(MODEL).file["blk.0.ffn_up.weight"].raw)
