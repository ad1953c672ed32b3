"""Where bytes come from: what is not a regular file is named, and a file that changes under a reader is noticed, not crashed on."""

import os
import pickle
import threading

import numpy as np
import pytest

from pyggml import cli, formats
from pyggml.errors import GGUFError, PyggmlError


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.gguf"
    formats.write(path, {"a": "x" * 100}, {"w": np.arange(1 << 20, dtype=np.float32)})
    return path


def test_a_file_cut_while_it_is_read(model):
    file = formats.open(model, use_mmap=False)
    os.truncate(model, 1 << 20)
    with pytest.raises(GGUFError, match="the file was cut to 1048576 bytes while it was read"):
        np.asarray(file["w"].raw)
    assert file.sources[0].changed()
    assert file.kv["a"] == "x" * 100


@pytest.mark.parametrize("command", [["check"], ["hash"], ["extract", "w", "-o", "/dev/null/x"], ["diff"]])
def test_tools_survive_it(model, monkeypatch, capsys, command):
    from pyggml.formats.source import PlainFile
    real = PlainFile.array

    def cutting(self, offset, n):
        if offset > 0:
            os.truncate(model, 4096)
        return real(self, offset, n)
    monkeypatch.setattr(PlainFile, "array", cutting)
    name, *rest = command
    files = [str(model)] * (2 if name == "diff" else 1)
    assert cli.main([name, *files, *rest]) == 1
    assert "cut" in capsys.readouterr().err


def test_a_file_replaced_while_it_is_mapped_stays_readable(model):
    file = formats.open(model)
    formats.write(model, {}, {})
    assert file["w"].numpy()[-1] == (1 << 20) - 1 and not file.sources[0].changed()


def test_what_is_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, says in ((tmp_path, "is a directory"), (tmp_path / "pipe", "is not a regular file"), (tmp_path / "none", "No such file"),
                       ("/dev/zero", "is not a regular file")):
        with pytest.raises(PyggmlError, match=says):
            formats.open(path)


def test_descriptors_are_given_back(model):
    before = len(os.listdir("/proc/self/fd"))
    for use_mmap in (True, False):
        for _ in range(20):
            formats.open(model, use_mmap=use_mmap)["w"].raw.sum()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize("use_mmap", [True, False])
def test_closing(model, use_mmap):
    before = len(os.listdir("/proc/self/fd"))
    with formats.open(model, use_mmap=use_mmap) as file:
        weights, mapping = file["w"].numpy(), file.map
        assert "w" in file and "v" not in file and list(file) == ["w"]
    with pytest.raises(PyggmlError, match="closed|cannot read"):
        file["w"].dequantize()
    assert len(os.listdir("/proc/self/fd")) == before + use_mmap           # a map has a descriptor of its own
    assert weights[5] == 5 and (mapping is None or not mapping.closed)
    with formats.open(model, use_mmap=use_mmap) as file:
        mapping = file.map
    assert mapping is None or mapping.closed
    file.close()


def test_what_cannot_be_a_path(recwarn):
    for nonsense in (None, 5, []):
        with pytest.raises(TypeError):
            formats.open(nonsense)
    assert not recwarn


def test_copies_of_text_arrays_are_lists(tmp_path):
    path = tmp_path / "t.gguf"
    formats.write(path, {"t": ["a", "\udcff"]})
    assert pickle.loads(pickle.dumps(dict(formats.open(os.fsencode(path)).kv))) == {"t": ["a", "\udcff"]}


def test_reading_ahead_asks_for_the_whole_file(model, monkeypatch):
    from pyggml.formats import source
    asked, done = [], threading.Event()

    def advise(fd, at, n, advice):
        asked.append((at, n))
        if at + n >= os.stat(model).st_size:
            done.set()
    monkeypatch.setattr(source, "READ_AHEAD", 1 << 20)
    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    formats.open(model).read_ahead()
    assert done.wait(10)
    assert asked == [(at, 1 << 20) for at in range(0, os.stat(model).st_size, 1 << 20)]


@pytest.mark.parametrize("use_mmap", [True, False])
def test_an_open_file_is_pickled_by_its_path(model, use_mmap):
    file = formats.open(model, use_mmap=use_mmap)
    held = file["w"].raw                                # a tensor that keeps its bytes is pickled without them
    data = pickle.dumps((file, file["w"], file.kv))
    assert len(data) < 4096
    again, tensor, kv = pickle.loads(data)
    assert dict(again.kv) == dict(kv) == dict(file.kv)
    assert (again["w"].raw == held).all() and (tensor.numpy() == file["w"].numpy()).all()
    os.truncate(model, 1 << 20)
    with pytest.raises(GGUFError, match="was changed since it was pickled; open it again"):
        pickle.loads(data)


def test_a_model_in_memory_is_not_pickled(model):
    from pyggml.formats.source import Memory
    with pytest.raises(PyggmlError, match="a model in memory is not pickled; pickle its bytes"):
        pickle.dumps(formats.open_source(Memory(model.read_bytes())))


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_is_no_path(path):
    with pytest.raises(PyggmlError, match="is not the path of a file"):
        formats.open(path)
