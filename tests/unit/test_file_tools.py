"""hash, diff, split, merge and extract, each through its command."""

import hashlib
import json

import numpy as np
import pytest

from models import as_f16
from pyggml import cli, formats
from pyggml.formats import hashing, new_tensor, split
from pyggml.formats.diff import TensorChange
from pyggml.quants import dequantize, quantize

RNG = np.random.default_rng(5)
WEIGHTS = {f"blk.{i}.w": RNG.standard_normal((8, 64)).astype(np.float32) for i in range(5)} | {"norm": np.ones(64, np.float32)}
KV = {"general.architecture": "llama", "general.name": "m", "words": ["a", "b"], "nan": float("nan")}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.gguf"
    formats.write(path, KV, WEIGHTS)
    return path


def run(capsys, *args):
    """Exit status, lines of output, and the error output."""
    status = cli.main([str(a) for a in args])
    out = capsys.readouterr()
    return status, out.out.splitlines(), out.err


# ---- hash

@pytest.mark.parametrize("data, value", [        # computed with the xxhash package 4.1.0
    (b"", "ef46db3751d8e999"), (b"a", "d24ec4f1a98c6e5b"), (b"abc", "44bc2cf5ad770999"), (bytes(range(31)), "c346d2b59b4d8ee1"),
    (bytes(range(32)), "cbf59c5116ff32b4"), (bytes(range(100)), "6ac1e58032166597"), (bytes(range(256)) * 40, "58b820aa7970dbe2")])
def test_xxh64(data, value):
    for step in (1, 7, 31, 32, 33, 64, 100_000):
        digest = hashing.Xxh64()
        for start in range(0, len(data), step):
            digest.update(data[start:start + step])
        assert digest.hexdigest() == value


def test_hash_covers_tensor_data_and_nothing_else(model, capsys):
    data = b"".join(w.tobytes() for w in WEIGHTS.values())
    status, lines, _ = run(capsys, "hash", model, "--sha256", "--uuid", "--sha1", "--xxh64")
    assert status == 0 and f"sha256    {hashlib.sha256(data).hexdigest()}  m.gguf" in lines
    assert f"sha256    {hashlib.sha256(WEIGHTS['norm'].tobytes()).hexdigest()}  m.gguf:norm" in lines
    assert sum(line.startswith("uuid") for line in lines) == 1 and len(lines) == 3 * 7 + 1
    before = run(capsys, "hash", model)[1]
    assert len(before) == 7 and all(line.startswith("xxh64 ") for line in before)
    run(capsys, "edit", model, "general.name=other")
    assert run(capsys, "hash", model)[1] == before
    assert len(run(capsys, "hash", model, "--no-layer")[1]) == 1


def test_hash_of_a_big_endian_file_is_the_same(model, tmp_path, capsys):
    formats.write(tmp_path / "big.gguf", KV, WEIGHTS, order=">")
    little, big = (
        [line.split()[1] for line in run(capsys, "hash", path)[1]] for path in (model, tmp_path / "big.gguf"))
    assert little == big


def test_hash_check(model, tmp_path, capsys):
    manifest = tmp_path / "manifest"
    manifest.write_text("\n".join(run(capsys, "hash", model, "--all")[1]))
    status, lines, _ = run(capsys, "hash", model, "-c", manifest)
    assert status == 0 and all(line.endswith("Ok") for line in lines)
    formats.write(model, KV, WEIGHTS | {"norm": np.zeros(64, np.float32)})
    status, lines, _ = run(capsys, "hash", model, "-c", manifest)
    assert status == 1 and sum(line.endswith("Mismatch") for line in lines) == 3 + 4
    formats.write(model, KV, {"norm": WEIGHTS["norm"]})
    status, lines, _ = run(capsys, "hash", model, "--sha256", "-c", manifest)
    assert status == 1 and any("blk.0.w  -  Missing" in line for line in lines)
    manifest.write_text("\n".join(run(capsys, "hash", model, "--no-layer")[1]))
    assert run(capsys, "hash", model, "-c", manifest)[:2] == (0, [f"{manifest.read_text()}  -  Ok"])
    manifest.write_text("what is this")
    assert run(capsys, "hash", model, "-c", manifest)[0] == 1


# ---- diff

def test_diff_of_equal_models(model, tmp_path, capsys):
    formats.write(tmp_path / "big.gguf", KV, WEIGHTS, order=">")
    for other in (model, tmp_path / "big.gguf"):
        status, lines, _ = run(capsys, "diff", model, other)
        assert (status, lines) == (0, ["no difference"])


def test_diff_compares_no_change_with_the_others(tmp_path, capsys, monkeypatch):
    """Two lists of many tensors would take the square of that."""
    def compared(*_):
        raise AssertionError("a change was compared with another")

    for name in "ab":
        formats.write(tmp_path / name, {}, {f"{name}{i}": np.zeros(2, np.float32) for i in range(3)})
    monkeypatch.setattr(TensorChange, "__eq__", compared)
    status, lines, _ = run(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert status == 1 and len(lines) == 8


def test_diff_measures(model, tmp_path, capsys):
    noisy = WEIGHTS["blk.1.w"] + np.float32(0.01)
    blocks = quantize(WEIGHTS["blk.2.w"], "Q4_0")
    changed = [new_tensor("blk.0.w", WEIGHTS["blk.0.w"]), new_tensor("blk.1.w", noisy), new_tensor("blk.2.w", blocks, "Q4_0"),
               new_tensor("blk.3.w", WEIGHTS["blk.3.w"][:4]), new_tensor("norm", WEIGHTS["norm"]), new_tensor("extra", WEIGHTS["norm"])]
    formats.write(tmp_path / "b.gguf", {**KV, "general.name": "n", "more": 5}, changed)
    status, lines, _ = run(capsys, "diff", model, tmp_path / "b.gguf", "--json")
    document = json.loads("\n".join(lines))
    assert status == 1 and [c["key"] for c in document["metadata"]] == ["general.name", "more"]
    tensors = {c["name"]: c for c in document["tensors"]}
    assert set(tensors) == {"blk.1.w", "blk.2.w", "blk.3.w", "blk.4.w", "extra"}
    assert tensors["blk.4.w"]["b"] is None and tensors["extra"]["a"] is None and "rmse" not in tensors["blk.3.w"]
    assert [c["name"] for c in document["tensors"]][-2:] == ["blk.2.w", "blk.1.w"]       # most different first
    x, y = WEIGHTS["blk.2.w"].astype(np.float64), dequantize(blocks, "Q4_0").astype(np.float64)
    np.testing.assert_allclose(tensors["blk.2.w"]["rmse"], np.sqrt(np.mean((x - y) ** 2)), rtol=1e-6)
    np.testing.assert_allclose(tensors["blk.2.w"]["relative"], np.sqrt(np.mean((x - y) ** 2) / np.mean(x ** 2)), rtol=1e-6)
    np.testing.assert_allclose(tensors["blk.2.w"]["cosine"], (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), rtol=1e-6)
    np.testing.assert_allclose(tensors["blk.2.w"]["max_error"], np.abs(x - y).max(), rtol=1e-6)
    status, lines, _ = run(capsys, "diff", model, tmp_path / "b.gguf", "-n", "1")
    text = "\n".join(lines)
    assert "- general.name = (str) m" in text and "+ more = (u32) 5" in text and "- tensor blk.3.w: F32 8 x 64" in text
    assert "blk.2.w  F32 -> Q4_0" in text and "blk.1.w" not in text and "2 keys and 5 tensors differ; 2 tensors are equal" in text
    status, lines, _ = run(capsys, "diff", "--metadata", model, tmp_path / "b.gguf", "--json")
    assert status == 1 and {c["name"] for c in json.loads("\n".join(lines))["tensors"]} == {"blk.2.w", "blk.3.w", "blk.4.w", "extra"}


# ---- split and merge

@pytest.mark.parametrize("flags, sizes", [
    (["--split-max-tensors", 2], [2, 2, 2]), (["--split-max-tensors", 4], [4, 2]), (["--split-max-size", "5K"], [2, 2, 2]),
    (["--split-max-size", "1K"], [1, 1, 1, 1, 1, 1]), ([], [6]), (["--split-max-tensors", 4, "--no-tensor-first-split"], [0, 4, 2])])
def test_split_and_merge(model, tmp_path, capsys, flags, sizes):
    original = model.read_bytes()
    assert run(capsys, "split", model, tmp_path / "part", *flags, "--dry-run")[0] == 0
    assert len(list(tmp_path.iterdir())) == 1
    status, lines, _ = run(capsys, "split", model, tmp_path / "part", *flags)
    parts = sorted(tmp_path.glob("part-*"))
    assert status == 0 and len(lines) == len(parts) == len(sizes)
    opened = [formats.open(part, split=False) for part in parts]
    assert [len(f.tensors) for f in opened] == sizes
    assert [(f.kv["split.no"], f.kv["split.count"], f.kv["split.tensors.count"]) for f in opened] == [(i, len(sizes), 6) for i in range(len(sizes))]
    assert [f.kv.type(k) for f in opened[:1] for k in ("split.no", "split.count", "split.tensors.count")] == ["u16", "u16", "i32"]
    status, _, _ = run(capsys, "merge", parts[-1], tmp_path / "whole.gguf")
    assert status == 0 and (tmp_path / "whole.gguf").read_bytes() == original
    status, _, error = run(capsys, "merge", parts[0], tmp_path / "whole.gguf")
    assert status == 1 and "exists already; --force" in error
    assert run(capsys, "split", "--merge", parts[-1], tmp_path / "again.gguf")[0] == 0
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "again.gguf").unlink()
    status, _, error = run(capsys, "merge", tmp_path / "whole.gguf", tmp_path / "other.gguf")
    assert status == 1 and "not a part of one" in error
    status, _, error = run(capsys, "merge", parts[0], parts[-1], "--force")
    assert status == 1 and "the output is the input" in error
    assert run(capsys, "merge", "--delete-splits", "--force", parts[0], tmp_path / "whole.gguf")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "whole.gguf"]


def test_alignment_survives_a_split(tmp_path, capsys):
    path = tmp_path / "m.gguf"
    formats.write(path, {**KV, "general.alignment": 4096}, WEIGHTS)
    run(capsys, "split", path, tmp_path / "part", "--split-max-tensors", 2)
    assert {formats.open(p, split=False).alignment for p in tmp_path.glob("part-*")} == {4096}
    run(capsys, "merge", tmp_path / "part-00001-of-00003.gguf", tmp_path / "whole.gguf")
    assert (tmp_path / "whole.gguf").read_bytes() == path.read_bytes()


def test_a_failing_split_leaves_no_parts(model, tmp_path, monkeypatch):
    written = []

    def write(path, *args, **kwargs):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        formats.write(path, *args, **kwargs)
    monkeypatch.setattr(split.writer, "write", write)
    file = formats.open(model)
    with pytest.raises(OSError):
        split.split(file, str(tmp_path / "part"), split.plan(file, 2))
    assert len(written) == 2 and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("flags", [["--split-max-size", "5X"], ["--split-max-size", "0M"], ["--split-max-tensors", "0"],
                                   ["--split-max-tensors", "-3"]])
def test_wrong_split_sizes(model, capsys, flags):
    assert run(capsys, "split", model, "out", *flags)[0] == 2
    assert run(capsys, "split", model, "out", "--split-max-size", "5M", "--split-max-tensors", "3")[0] == 1


# ---- extract

def test_extract(tmp_path, capsys):
    path, evil = tmp_path / "m.gguf", "../../etc/x y"
    blocks = quantize(WEIGHTS["blk.0.w"], "Q8_0")
    ints = np.arange(6, dtype=np.int32).reshape(2, 3)
    formats.write(path, {}, [new_tensor("q", blocks, "Q8_0"), new_tensor("i", ints), new_tensor(evil, WEIGHTS["norm"]),
                             new_tensor("h", np.array([0x3F80], np.uint16), "BF16", (1,))])
    out = tmp_path / "out"
    out.mkdir()
    assert run(capsys, "extract", path, "*", "-o", out)[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["_.._etc_x_y.npy", "h.npy", "i.npy", "q.npy"]
    np.testing.assert_array_equal(np.load(out / "q.npy"), dequantize(blocks, "Q8_0"))
    np.testing.assert_array_equal(np.load(out / "i.npy"), ints)
    assert np.load(out / "h.npy").tolist() == [1.0]
    assert run(capsys, "extract", path, "q", "--raw", "-o", tmp_path / "raw.npy")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "raw.npy"), blocks)
    formats.write(tmp_path / "alike.gguf", {}, {"a/b": np.zeros(1, np.float32), "a:b": np.ones(1, np.float32)})
    status, _, error = run(capsys, "extract", tmp_path / "alike.gguf", "*", "-o", tmp_path / "alike")
    assert status == 1 and 'tensor "a:b" and "a/b" would both be a_b.npy' in error
    status, _, error = run(capsys, "extract", path, "none", "-o", out)
    assert status == 1 and 'tensor "none" is missing' in error


# ---- the output is the input

@pytest.mark.parametrize("command", [
    ["extract", "{m}", "output_norm.weight", "-o", "{m}"], ["extract", "{m}", "output_norm.weight", "-o", "{link}"], ["info", "{m}", "--plot", "{m}"],
    ["convert", "{part}", "{part2}"], ["split", "{part}", "{stem}", "--no-tensor-first-split"], ["merge", "{part}", "{part2}", "--force"],
    ["quantize", "{m}", "{m}", "Q8_0"], ["compare", "{m}", "{part}", "-f", "{text}", "--plot", "{part}"],
    ["perplexity", "{m}", "-f", "{text}", "--kl-divergence-base", "{m}"], ["imatrix", "{m}", "-f", "{text}", "-o", "{m}"]])
def test_a_model_is_not_written_over_by_what_is_made_of_it(tmp_path, capsys, command):
    names = {"m": tmp_path / "m.gguf", "link": tmp_path / "link.gguf", "text": tmp_path / "text", "stem": tmp_path / "s",
             "part": tmp_path / "s-00001-of-00002.gguf", "part2": tmp_path / "s-00002-of-00002.gguf"}
    file = formats.open(as_f16(names["m"]))
    split.split(file, str(names["stem"]), split.plan(file, max_tensors=3)[:1] + [list(file.tensors.values())[3:]])
    names["link"].symlink_to(names["m"])
    names["text"].write_text("some text " * 999)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    status, _, error = run(capsys, *(word.format(**names) for word in command))
    assert status == 1 and "the output is the input; write to another path" in error, error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_convert_in_place_changes_the_byte_order(model, capsys):
    assert run(capsys, "convert", model, model, "--byte-order", "big")[0] == 0
    assert formats.open(model).order == ">" and np.array_equal(formats.open(model)["norm"].numpy(), WEIGHTS["norm"])
