"""Editing metadata: the right keys change, tensor bytes never do, and whatever happens the file is the old or the new one."""

import argparse
import errno
import json
import os
import signal
import time
import traceback

import malformed
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml import formats
from pyggml.cli import edit as command
from pyggml.cli import info
from pyggml.errors import PyggmlError
from pyggml.formats import Typed, atomic, inplace
from pyggml.formats.edit import IN_PLACE, INSERTED, PADDING, REWRITTEN, Edits, edit

WEIGHTS = {"a": np.arange(3000, dtype=np.float32), "b": np.arange(77, dtype=np.int8)}
BASE = {"general.architecture": "llama", "general.name": "model", "n": 5, "words": ["a", "b"], "last": 1.5}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.gguf"
    formats.write(path, BASE, WEIGHTS)
    return path


def contents(path):
    """Metadata (without padding) and tensors of a file."""
    file = formats.open(path, use_mmap=False)
    kv = {key: (file.kv.type(key), value if isinstance(value := file.kv[key], str | int | float) else list(value))
          for key in file.kv if key != PADDING}
    return kv, {name: t.stored.tobytes() for name, t in file.tensors.items()}


def test_every_legal_file_keeps_the_rest(tmp_path):
    path = tmp_path / "m.gguf"
    for case in malformed.legal():
        if len(case.data) > 1 << 20:
            continue
        path.write_bytes(case.data)
        before = repr(contents(path))
        for edits in (Edits({"new": 5}), Edits({"new": "x" * 50_000}), Edits(rename={"new": "newer"}), Edits(remove=["newer"])):
            edit(path, edits)
        assert repr(contents(path)) == before, case.name


def can_insert(folder):
    """Whether this file system inserts blocks at the start of a file."""
    path = folder / "probe"
    path.write_bytes(bytes(8192))
    with open(path, "r+b") as f:
        ok = inplace._fallocate(f.fileno(), inplace._INSERT_RANGE, 4096)
    path.unlink()
    return ok


def test_in_place_then_grown_then_in_place(model, tmp_path):
    before = contents(model)
    inode = model.stat().st_ino
    assert edit(model, Edits({"general.name": "MODEL"})).method == IN_PLACE
    grown = edit(model, Edits({"tokenizer.chat_template": "x" * 5000}))
    assert grown.method == (INSERTED if can_insert(tmp_path) else REWRITTEN)
    assert edit(model, Edits({"tokenizer.chat_template": "y" * 15000}, ["n"], {"last": "final"})).method == IN_PLACE
    kv, tensors = contents(model)
    assert tensors == before[1]
    assert kv == {"general.architecture": ("str", "llama"), "general.name": ("str", "MODEL"), "words": ("str[]", ["a", "b"]),
                  "final": ("f32", 1.5), "tokenizer.chat_template": ("str", "y" * 15000)}
    assert (model.stat().st_ino == inode) == can_insert(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_nothing_to_change(model):
    before = model.read_bytes(), model.stat().st_mtime_ns
    assert edit(model, Edits({"general.name": "model"})) == ([], "")
    assert before == (model.read_bytes(), model.stat().st_mtime_ns)


def test_file_that_is_open_elsewhere_is_replaced(model):
    held = formats.open(model)
    before = held["a"].raw.tobytes(), dict(held.kv)
    assert edit(model, Edits({"general.name": "MODEL"})).method == REWRITTEN
    assert (held["a"].raw.tobytes(), dict(held.kv)) == before
    assert formats.open(model).kv["general.name"] == "MODEL"


def test_dry_run_and_output(model, tmp_path):
    before = model.read_bytes()
    result = edit(model, Edits({"n": 6}), dry_run=True)
    assert result.method == IN_PLACE and result.changes[0][:3] == ("n", Typed("u32", 5), Typed("u32", 6))
    copy = tmp_path / "copy.gguf"
    edit(model, Edits({"n": 6}), output=copy)
    assert model.read_bytes() == before
    assert contents(copy)[0]["n"] == ("u32", 6) and contents(copy)[1] == contents(model)[1]


def test_alignment_moves_the_tensors(model):
    tensors = contents(model)[1]
    assert edit(model, Edits({"general.alignment": 4096})).method == REWRITTEN
    file = formats.open(model)
    assert file.alignment == 4096 and all(t.offset % 4096 == 0 for t in file.tensors.values())
    assert contents(model)[1] == tensors


@pytest.mark.parametrize("order", "<>")
def test_byte_orders(tmp_path, order):
    path = tmp_path / "m.gguf"
    formats.write(path, BASE, WEIGHTS, order=order)
    before = contents(path)
    edit(path, Edits({"n": 7, "new": [1, 2]}, rename={"last": "final"}))
    kv, tensors = contents(path)
    assert tensors == before[1] and kv["n"] == ("u32", 7) and kv["new"] == ("i32[]", [1, 2]) and kv["final"] == ("f32", 1.5)


TEXT = st.text(st.characters(codec="utf-8"), max_size=300)
VALUES = st.one_of(st.integers(-5, 2 ** 40), TEXT, st.lists(TEXT.map(lambda t: t[:5]), max_size=20),
                   st.floats(width=32, allow_nan=False), st.booleans())
NAMES = st.sampled_from(["a", "b", "c.d", "general.description2", "n", "words"])


@settings(max_examples=120)
@given(st.lists(st.tuples(st.dictionaries(NAMES, VALUES, max_size=3), st.sets(NAMES, max_size=2)), min_size=1, max_size=4), st.booleans())
def test_any_sequence_of_edits(tmp_path_factory, steps, held_open):
    path = tmp_path_factory.mktemp("edit") / "m.gguf"
    formats.write(path, BASE, WEIGHTS)
    expected, tensors = contents(path)
    keep = formats.open(path) if held_open else None
    for values, removed in steps:
        removed = {key for key in removed if key in expected and key not in values}
        edit(path, Edits(values, removed))
        for key in removed:
            del expected[key]
        for key, value in values.items():
            expected[key] = (formats.values.typed(value).type, value)
        assert contents(path) == (expected, tensors)
    assert keep is None or dict(keep.kv)["n"] == 5


def nested(depth):
    return 1 if depth == 0 else [nested(depth - 1)]


@pytest.mark.parametrize("edits, says", [
    (Edits(remove=["general.nam"]), 'key "general.nam" is missing; did you mean general.name'),
    (Edits(rename={"x": "y"}), 'key "x" is missing'),
    (Edits(rename={"n": "last"}), 'key "last" is already there'),
    (Edits({"n": 1}, remove=["n"]), "removed and changed at once"),
    (Edits({"general.name": 5}), "its type is u32; it must be str; --force"),
    (Edits({"llama.block_count": 0}), "it is 0; it must be from 1 to 4096"),
    (Edits(rename={"n": "general.name"}, remove=["general.name"]), "its type is u32; it must be str"),
    (Edits({"general.alignment": Typed("u32", 3)}, force=True), "power of two"),
    (Edits({"x": Typed("u8", 300)}), "300 does not fit type u8; it takes whole numbers from 0 to 255"),
    (Edits({"llama.attention.head_count": Typed("u32[]", ["a"])}), '"a" does not fit type u32'),
    (Edits({"n": Typed("u32[]", 5)}), "5 is not a list"),
    (Edits({"": 5}), "1 to 65535 bytes"),
    (Edits({"\ud800": 5}), "UTF-8 text of 1 to 65535 bytes"),
    (Edits({"k\udcff": 5}), "UTF-8 text of 1 to 65535 bytes"),
    (Edits(rename={"n": "k\0"}), "without NUL"),
    (Edits({"x": "\ud800"}), "half of a character"),
    (Edits({"x": ["a", "\udc41"]}), "half of a character"),
    (Edits({"x": nested(65)}), "nested 65 deep .*; such a file could not be read again"),
    (Edits({"x": "x" * (32 << 20) + "x"}), "length of the string is 33554433 .*; such a file could not be read again"),
    (Edits({f"x{i}": "x" * (30 << 20) for i in range(3)}), "reach .* such a file could not be read again"),
    (Edits({PADDING: "x"}, force=True), "holds the room"),
    (Edits({PADDING: "x" * 100_000}), "holds the room"),
    (Edits(rename={"n": PADDING}), "holds the room"),
])
def test_refused(model, edits, says):
    before = model.read_bytes()
    for how in ({}, {"dry_run": True}, {"output": model.parent / "b.gguf"}):
        with pytest.raises(PyggmlError, match=says):
            edit(model, edits, **how)
        assert model.read_bytes() == before and len(list(model.parent.iterdir())) == 1


@pytest.mark.parametrize("data, says", [
    (b"version https://git-lfs.github.com/spec/v1\n", "this is a git-LFS pointer"),
    (b"<!DOCTYPE html>", "this is an HTML page"),
    (b"", "this is empty"),
])
def test_other_files_are_named(tmp_path, data, says):
    path = tmp_path / "old.bin"
    path.write_bytes(data)
    for how in ({}, {"dry_run": True}, {"output": tmp_path / "b.gguf"}):
        with pytest.raises(PyggmlError, match=says):
            edit(path, Edits({"n": 1}), **how)
        assert path.read_bytes() == data and len(list(tmp_path.iterdir())) == 1


def test_force(model):
    edit(model, Edits({"general.name": 5}, force=True))
    assert formats.open(model).kv["general.name"] == 5


ENDS = [signal.SIGINT, signal.SIGTERM]


def in_child(work):
    """Run `work()` in a child process; returns its id. Exit status 0, or 1 with a traceback when it raises."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)      # an interrupt waits until the child is where it can be caught
    pid = os.fork()
    if pid == 0:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    return pid


def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- faults -----------------------------------------------------------------------------------------------------------------------

CALLS = {"open", "pwrite", "write", "fsync", "replace", "unlink", "fallocate", "copy_file_range", "pread", "fchmod", "fstat", "stat"}
SMALL, LARGE = {"general.name": "MODEL"}, {"tokenizer.chat_template": "x" * 9000}


class Shim:
    """Stands for `os` (and fallocate) in the modules that write; call number `at` does `act` instead of its work."""

    def __init__(self, monkeypatch, at, act):
        self.at, self.act, self.seen = at, act, 0
        for module in (atomic, inplace):
            monkeypatch.setattr(module, "os", self)
        real = inplace._fallocate
        monkeypatch.setattr(inplace, "_fallocate", lambda *args: self.count("fallocate", real, args, {}))

    def count(self, name, real, args, kwargs):
        self.seen += 1
        if self.seen == self.at:
            self.act()
        return real(*args, **kwargs)

    def __getattr__(self, name):
        real = getattr(os, name)
        return (lambda *args, **kwargs: self.count(name, real, args, kwargs)) if name in CALLS else real


@pytest.mark.parametrize("values", [SMALL, LARGE], ids=["fits", "grows"])
@pytest.mark.parametrize("held_open", [False, True], ids=["alone", "shared"])
def test_killed_at_every_call(model, monkeypatch, values, held_open):
    original = model.read_bytes()
    old = contents(model)
    edit(model, Edits(values))
    new = contents(model)
    killed = 0
    for at in range(1, 200):
        model.write_bytes(original)

        def work():
            with pytest.MonkeyPatch.context() as patch, open(model if held_open else os.devnull, "rb"):
                Shim(patch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))       # noqa: B023 runs in this turn of the loop
                edit(model, Edits(values))
        died = status(in_child(work))
        assert died in (0, -signal.SIGKILL)
        assert contents(model) in (old, new)
        assert not os.path.exists(inplace.undo_path(str(model)))
        killed += died != 0
        if died == 0:
            break
    assert killed > 10
    edit(model, Edits({"n": 99}))
    with open(model, "rb"):
        edit(model, Edits({"n": 100}))                              # a rewrite, which cleans up
    assert [p.name for p in model.parent.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("values", [SMALL, LARGE], ids=["fits", "grows"])
@pytest.mark.parametrize("held_open", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_every_failing_call(model, monkeypatch, values, held_open, code):
    original = model.read_bytes()
    old = contents(model)
    edit(model, Edits(values))
    new = contents(model)

    def act():
        raise OSError(code, os.strerror(code))
    for at in range(1, 200):
        model.write_bytes(original)
        with pytest.MonkeyPatch.context() as patch, open(model if held_open else os.devnull, "rb"):
            shim = Shim(patch, at, act)
            try:
                edit(model, Edits(values))
            except PyggmlError as error:
                assert "m.gguf" in str(error) and "\n" not in str(error)
        assert contents(model) in (old, new)
        if shim.seen < at:
            break
    assert at > 10 and contents(model) == new
    assert [p.name for p in model.parent.iterdir()] == ["m.gguf"]


def test_interrupted_edit_is_taken_back_by_the_next_reader(model, monkeypatch):
    original = model.read_bytes()
    real = os.fsync

    def fsync(fd):
        if os.path.samestat(os.fstat(fd), os.stat(model)):
            os.kill(os.getpid(), signal.SIGKILL)
        real(fd)

    def work():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            edit(model, Edits(LARGE if can_insert(model.parent) else SMALL))
    assert status(in_child(work)) == -signal.SIGKILL
    assert model.read_bytes() != original and os.path.exists(inplace.undo_path(str(model)))
    formats.open(model)
    assert model.read_bytes() == original and [p.name for p in model.parent.iterdir()] == ["m.gguf"]


def test_damaged_undo_file_means_the_edit_never_began(model):
    original = model.read_bytes()
    for record in (b"", b"PYGGUNDO", b"PYGGUNDO" + bytes(100)):
        with open(inplace.undo_path(str(model)), "wb") as f:
            f.write(record)
        formats.open(model)
        assert model.read_bytes() == original and len(list(model.parent.iterdir())) == 1


def test_readers_see_whole_versions_during_edits(model):
    names = [f"version {i} " + "x" * (50 * (i % 40)) for i in range(200)]
    tensors = contents(model)[1]

    def read():
        name = ""
        while name != names[-1]:
            kv, data = contents(model)
            name = kv["general.name"][1]
            assert data == tensors and name in {*names, "model"}
    pids = [in_child(read) for _ in range(8)]
    for name in names:
        edit(model, Edits({"general.name": name}))
        time.sleep(0.001)
    assert [status(pid) for pid in pids] == [0] * 8


def test_two_writers_at_once(model):
    def write(who):
        for i in range(40):
            edit(model, Edits({f"writer{who}": i}))
    pids = [in_child(lambda who=who: write(who)) for who in range(2)]
    assert [status(pid) for pid in pids] == [0, 0]
    kv = contents(model)[0]
    assert kv["writer0"] == ("u32", 39) and kv["writer1"] == ("u32", 39)
    assert [p.name for p in model.parent.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("end", ENDS)
def test_interrupts_at_random_times(model, end):
    good = contents(model)
    names = {"model"}
    rng = np.random.default_rng(1)
    for i in range(60):
        names.add(f"name{i}")
        edits = Edits({"general.name": f"name{i}", "pad": "x" * int(rng.integers(0, 3)) * 9000})
        pid = in_child(lambda edits=edits: edit(model, edits))
        time.sleep(float(rng.random()) * 0.02)
        os.kill(pid, end)
        status(pid)
        kv, tensors = contents(model)
        assert tensors == good[1] and kv["general.name"][1] in names
        assert not [p for p in model.parent.iterdir() if p.name.endswith((".undo", ".tmp"))]


def test_read_only_file(model):
    if os.geteuid() == 0:
        with pytest.MonkeyPatch.context() as patch:         # root may write anything: say it may not
            patch.setattr(os, "access", lambda path, mode: False)
            with pytest.raises(PyggmlError, match="read-only; make it writable or use --output"):
                edit(model, Edits(SMALL))
    else:
        model.chmod(0o444)
        with pytest.raises(PyggmlError, match="read-only"):
            edit(model, Edits(SMALL))


# ---- the command -------------------------------------------------------------------------------------------------------------------

def run(path, *args):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_intermixed_args([str(path), *args]))


def test_command(model, tmp_path, capsys):
    template = tmp_path / "t.jinja"
    template.write_text("{{ x }}\n")
    assert run(model, "n=6", "--remove", "last", "x:u64=7", "y=0.5", "z=text", "w=[1, 2]", 's:str[]=["p", "q"]', "--rename", "words=terms",
               "--chat-template-file", str(template), "general.name=123", "k:f32=nan") == 0
    kv = contents(model)[0]
    assert {k: kv[k] for k in kv if k != "k"} == {
        "general.architecture": ("str", "llama"), "general.name": ("str", "123"), "n": ("u32", 6), "terms": ("str[]", ["a", "b"]),
        "x": ("u64", 7), "y": ("f32", 0.5), "z": ("str", "text"), "w": ("i32[]", [1, 2]), "s": ("str[]", ["p", "q"]),
        "tokenizer.chat_template": ("str", "{{ x }}\n")}
    assert np.isnan(kv["k"][1]) and kv["k"][0] == "f32"
    out = capsys.readouterr().out
    for line in ("~ n: (u32) 5 -> (u32) 6", "- last = (f32) 1.5", "+ x = (u64) 7", "~ words => terms", "11 keys changed"):
        assert line in out


def test_a_slip_in_a_key_is_noticed(model, capsys):
    run(model, "llama.block_countt=6", "my.own.key=1")
    out = capsys.readouterr().out
    assert "+ llama.block_countt = (u32) 6   (new: did you mean llama.block_count?)\n" in out and "+ my.own.key = (u32) 1\n" in out


def test_special_token_by_its_text(tmp_path, capsys):
    path = tmp_path / "m.gguf"
    formats.write(path, {"tokenizer.ggml.tokens": ["<s>", "a", "</s>"], "tokenizer.ggml.eos_token_id": 0})
    assert run(path, "--special-token", "eos", "</s>", "--special-token", "bos", "<s>") == 0
    assert formats.open(path).kv["tokenizer.ggml.eos_token_id"] == 2 and formats.open(path).kv.type("tokenizer.ggml.bos_token_id") == "u32"
    for name, token, says in (("eos", "b", "has no token 'b'"), ("oes", "a", "no program knows the key tokenizer.ggml.oes_token_id")):
        with pytest.raises(PyggmlError, match=says):
            run(path, "--special-token", name, token)
    formats.write(path, {"a": 1})
    with pytest.raises(PyggmlError, match="tokenizer.ggml.tokens"):
        run(path, "--special-token", "eos", "a")


def document_of(model, folder, capsys):
    """A file with what `pyggml info --json --full` prints."""
    parser = argparse.ArgumentParser()
    info.add_arguments(parser)
    info.run(parser.parse_args([str(model), "--json", "--full"]))
    (folder / "m.json").write_text(capsys.readouterr().out)
    return folder / "m.json"


def test_json_goes_round(model, tmp_path, capsys):
    document = document_of(model, tmp_path, capsys)
    formats.write(tmp_path / "empty.gguf", {}, WEIGHTS)
    run(tmp_path / "empty.gguf", "--from-json", str(document))
    assert contents(tmp_path / "empty.gguf") == contents(model)
    document.write_text(json.dumps({"a": 1, "b": {"type": "u8[]", "value": [1]}, "c": {"type": "f64", "value": "inf"}}))
    run(model, "--from-json", str(document))
    kv = contents(model)[0]
    assert (kv["a"], kv["b"], kv["c"]) == (("u32", 1), ("u8[]", [1]), ("f64", float("inf")))


@pytest.mark.parametrize("args, says", [
    (["n"], "is not of the form KEY"), (["=5"], "is not of the form"), (["n=x"], "'x' is not of type u32; it takes whole numbers from 0"),
    (["n=true"], "not of type u32"), (["words=x"], "is not of type str.*; it takes a JSON list"),
    (["x:bool=1"], "takes true or false"), (["x:bool[]=[1]"], "1 does not fit type bool"), (["x:u8[]=[true]"], "true does not fit type u8"),
    (["n:u9=1"], "'u9' is unknown"), (["--rename", "n"], "OLD=NEW"),
    (["--from-json", "none.json"], None), (["general.name:u32=1"], "must be str"),
])
def test_wrong_use(model, args, says):
    before = model.read_bytes()
    with pytest.raises((PyggmlError, OSError), match=says):
        run(model, *args)
    assert model.read_bytes() == before


def test_the_room_is_nobodys_to_set(model, tmp_path, capsys):
    """Not even when it comes with all the keys of another file."""
    edit(model, Edits({"n": [1] * 5000}))
    assert PADDING in formats.open(model).kv
    for wrong in (Edits({PADDING: ""}), Edits(remove=[PADDING]), Edits(rename={PADDING: "x"})):
        with pytest.raises(PyggmlError, match="holds the room"):
            edit(model, wrong)
    document, other = document_of(model, tmp_path, capsys), tmp_path / "other.gguf"
    formats.write(other, {"n": 1}, WEIGHTS)
    run(other, "--from-json", str(document))
    assert contents(other) == contents(model)


@pytest.mark.parametrize("value, says", [
    ({"type": "f64", "value": "abc"}, "'abc' is not of type f64"), ({"type": "u8[]", "value": 5}, "5 is not a list"),
    ({"type": 5, "value": 5}, "'5' is unknown"), ({"type": "arr[]", "value": 5}, "5 is not a list"),
    ({"type": "bool", "value": "x"}, '"x" does not fit'),
    ({"type": "str", "value": 5}, "5 is not text"), ({"type": "f32[]", "value": [[1]]}, "is not of type f32"), (None, "cannot be"),
])
def test_wrong_json(model, tmp_path, value, says):
    document = tmp_path / "m.json"
    document.write_text(json.dumps({"x": value}))
    with pytest.raises(PyggmlError, match=says):
        run(model, "--from-json", str(document))


def test_true_as_python_writes_it(model):
    run(model, "x:bool=True", "y=false")
    assert contents(model)[0]["x"] == ("bool", True) and contents(model)[0]["y"] == ("bool", False)


def test_abbreviated_json_is_refused(model, tmp_path):
    document = tmp_path / "m.json"
    document.write_text(json.dumps({"metadata": {"w": {"type": "str[]", "length": 1000, "value": ["a"]}}}))
    with pytest.raises(PyggmlError, match="abbreviated"):
        run(model, "--from-json", str(document))


def test_cost_follows_the_header(tmp_path):
    """A large sparse file is edited in place, and its tensors are neither read nor written: it stays sparse."""
    path = tmp_path / "big.gguf"
    formats.write(path, BASE, {"a": np.zeros(1, np.float32)})
    with open(path, "r+b") as f:
        f.truncate(4 << 30)
    for i in range(5):
        assert edit(path, Edits({"general.name": f"m{i:03}"})).method == IN_PLACE
    assert path.stat().st_blocks * 512 < 1 << 20
