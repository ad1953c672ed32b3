"""Importance matrices: both file formats, merging, what is collected, the command."""

import os
import re
import struct

import numpy as np
import pytest

import models
from pyggml import cli, formats
from pyggml.context import Context
from pyggml.errors import GGUFError, PyggmlError
from pyggml.formats.edit import Edits, edit
from pyggml.model import Model
from pyggml.quantize.calibrate import REDUCTIONS, Collector, collect
from pyggml.quantize.imatrix import STATISTICS, Entry, Imatrix, statistics
from pyggml.sites import find_sites


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.as_f16(tmp_path_factory.mktemp("source") / "f16.gguf")


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return models.as_f16(tmp_path_factory.mktemp("moe") / "f16.gguf", "mixtral.q4_k_m_mix")


def made(seed=0, counts=(8.0, 0.0, 3.0)):
    rng = np.random.default_rng(seed)
    stats = {key: rng.uniform(0, 9, (len(counts), 6)).astype(np.float32).astype(np.float64) for key in STATISTICS}
    dense = {key: rng.uniform(0, 9, (1, 4)).astype(np.float32).astype(np.float64) for key in STATISTICS}
    return Imatrix({"blk.0.a.weight": Entry(np.array(counts), stats), "blk.0.b.weight": Entry(np.array([16.0]), dense)}, ["x.txt"], 2, 8)


def test_gguf_round_trip(tmp_path):
    made().save(tmp_path / "i.gguf")
    found, expected = Imatrix.load(tmp_path / "i.gguf"), made()
    assert (found.datasets, found.n_chunks, found.chunk_size, len(found.sha256)) == (["x.txt"], 2, 8, 64)
    for name, entry in expected.entries.items():
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)
        for key in STATISTICS:
            np.testing.assert_array_equal(found.entries[name].stats[key], entry.stats[key])
    file = formats.open(tmp_path / "i.gguf")
    assert file.kv["general.type"] == "imatrix" and file["blk.0.a.weight.counts"].shape == (3, 1)


def test_legacy_round_trip(tmp_path):
    made().save(tmp_path / "i.dat", "dat")
    found, expected = Imatrix.load(tmp_path / "i.dat"), made()
    assert (found.datasets, found.n_chunks) == (["x.txt"], 2)
    for name, shape in (("blk.0.a.weight", (3, 5, 6)), ("blk.0.b.weight", (5, 4))):
        np.testing.assert_allclose(found.importance(name, shape), expected.importance(name, shape), rtol=1e-6)


def test_legacy_is_read_as_llama_cpp_writes_it(tmp_path):
    name, values = b"blk.0.b.weight", np.array([4, 8, 12], "<f4")
    data = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 4, 3) + values.tobytes()
    (tmp_path / "i.dat").write_bytes(data)
    np.testing.assert_array_equal(Imatrix.load(tmp_path / "i.dat").importance("blk.0.b.weight", (2, 3)), [[1, 2, 3]])


def test_a_cut_legacy_file_is_refused_wherever_it_is_cut(tmp_path):
    made().save(tmp_path / "i.dat", "dat")
    data = (tmp_path / "i.dat").read_bytes()
    whole = len(data) - 8 - len("x.txt")             # chunks and the text's name may be missing
    for end in (*range(0, whole, 3), *range(whole + 1, whole + 4), *range(whole + 5, len(data))):
        (tmp_path / "i.dat").write_bytes(data[:end])
        with pytest.raises(PyggmlError, match="i.dat: "):
            Imatrix.load(tmp_path / "i.dat")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(tmp_path, value):
    bad = made()
    bad.entries["blk.0.b.weight"].stats["in_sum2"][0, 1] = value
    for format in ("gguf", "dat"):
        bad.save(tmp_path / "i", format)
        with pytest.raises(PyggmlError, match="collect"):
            Imatrix.load(tmp_path / "i")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("format", ["gguf", "dat"])
def test_a_signalling_nan_is_refused_without_a_warning(tmp_path, format):
    only = Imatrix({"a": Entry(np.ones(1), {"in_sum2": np.full((1, 3), 12345.0)})})
    only.save(tmp_path / "i", format)
    data = (tmp_path / "i").read_bytes()
    (tmp_path / "i").write_bytes(data.replace(np.float32(12345).tobytes(), bytes.fromhex("0100807f"), 1))
    with pytest.raises(GGUFError, match=f"offset 0x{data.index(np.float32(12345).tobytes()):x}: .*nan"):
        Imatrix.load(tmp_path / "i")


@pytest.mark.parametrize(("name", "index"), [("in_sum2", 1), ("in_absmax", 3), ("counts", 0)])
def test_values_that_cannot_be_negative_are_refused_with_their_place(tmp_path, name, index):
    bad = made()
    entry = bad.entries["blk.0.b.weight"]
    (entry.counts if name == "counts" else entry.stats[name]).flat[index] = -1
    bad.save(tmp_path / "i.gguf")
    tensor = formats.open(tmp_path / "i.gguf")[f"blk.0.b.weight.{name}"]
    with pytest.raises(GGUFError, match=f'i.gguf: offset 0x{tensor.offset + 4 * index:x}: the tensor "blk.0.b.weight.{name}" holds -1.0; collect'):
        Imatrix.load(tmp_path / "i.gguf")


@pytest.mark.parametrize(("start", "says"), [
    (b"PK\x03\x04" + bytes(60), "ZIP archive"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"\n<html>", "HTML page"),
    (b"", "empty"), (b"\x05\0\0\0" + bytes(40), "the length of a name is 0")], ids=lambda value: str(value)[:12])
def test_another_file_is_named_with_the_place(tmp_path, start, says):
    (tmp_path / "i.dat").write_bytes(start)
    with pytest.raises(GGUFError, match=rf"i\.dat: offset 0x[04]: .*{re.escape(says)}"):
        Imatrix.load(tmp_path / "i.dat")


def test_a_name_of_a_wrong_length_does_not_fill_the_screen(tmp_path):
    made().save(tmp_path / "i.dat", "dat")
    data = (tmp_path / "i.dat").read_bytes()
    (tmp_path / "i.dat").write_bytes(data[:4] + (40_000).to_bytes(4, "little") + data[8:] + b"\xff" * 90_000)
    with pytest.raises(GGUFError, match=r'offset 0x9c48: the number of calls of "blk.0.a.weight.*\.\.\. \(40000 characters\)" is ') as caught:
        Imatrix.load(tmp_path / "i.dat")
    assert len(str(caught.value)) < 1000


def test_a_number_of_entries_that_looks_like_another_format(tmp_path):
    many = Imatrix({f"blk.{i}.w": Entry(np.ones(1), {"in_sum2": np.ones((1, 1))}) for i in range(0x7B)})
    many.save(tmp_path / "i.dat", "dat")
    assert (tmp_path / "i.dat").read_bytes().startswith(b"{")          # as JSON does
    assert len(Imatrix.load(tmp_path / "i.dat").entries) == 0x7B


def test_what_is_no_regular_file_is_refused_without_reading_it(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero", tmp_path):
        with pytest.raises(PyggmlError, match="regular file|directory"):
            Imatrix.load(path)


@pytest.mark.parametrize("key, value", [("imatrix.datasets", 5), ("imatrix.datasets", [1, 2]), ("imatrix.chunk_count", "x"),
                                        ("imatrix.chunk_count", [1, 2]), ("imatrix.chunk_size", float("nan")), ("imatrix.chunk_size", True)])
def test_keys_of_the_wrong_type_are_named(tmp_path, key, value):
    made().save(tmp_path / "i.gguf")
    edit(tmp_path / "i.gguf", Edits({key: value}, force=True))
    with pytest.raises(PyggmlError, match=f'i.gguf: the key "{key}" is '):
        Imatrix.load(tmp_path / "i.gguf")


@pytest.mark.parametrize("shape, counts", [((), ()), ((0,), (1,)), ((0, 4), (0,)), ((4, 0), (4,)), ((2, 4), (3,)), ((2, 4), (0,))])
def test_statistics_of_no_shape_are_refused(tmp_path, shape, counts):
    formats.write(tmp_path / "i.gguf", {"general.type": "imatrix"}, {
        "w.in_sum2": np.ones(shape, np.float32), "w.counts": np.ones(counts, np.float32)})
    with pytest.raises(PyggmlError, match='the statistics of "w" have no or different shapes'):
        Imatrix.load(tmp_path / "i.gguf")


def test_a_place_that_takes_no_file_is_told_before_the_work(source, tmp_path, capsys):
    (tmp_path / "text").write_text("short")
    assert cli.main(["imatrix", "-m", str(source), "-f", str(tmp_path / "text"), "-o", str(tmp_path / "no" / "i.gguf")]) == 1
    assert "no file can be written there" in capsys.readouterr().err


def test_a_type_of_file_that_is_no_text_says_nothing(tmp_path):
    made().save(tmp_path / "i.gguf")
    edit(tmp_path / "i.gguf", Edits({"general.type": [1, 2]}, force=True))
    assert Imatrix.load(tmp_path / "i.gguf").entries.keys() == made().entries.keys()


def test_other_files_are_refused(source, tmp_path):
    with pytest.raises(PyggmlError, match="not an importance matrix"):
        Imatrix.load(source)
    with pytest.raises(PyggmlError, match="nothing to write"):
        Imatrix().save(tmp_path / "i.gguf")
    with pytest.raises(PyggmlError, match="is of another model"):
        made().importance("blk.0.b.weight", (5, 7))


def test_unreached_experts_weigh_everything_alike():
    found = made().importance("blk.0.a.weight", (3, 5, 6))
    assert (found[1] == 1).all() and not (found[0] == 1).all()
    assert made().importance("unknown", (5, 4)) is None


def test_merging_is_summing():
    whole = made(1)
    whole.merge(made(2))
    for name, entry in whole.entries.items():
        a, b = made(1).entries[name], made(2).entries[name]
        np.testing.assert_array_equal(entry.counts, a.counts + b.counts)
        np.testing.assert_array_equal(entry.stats["in_sum2"], a.stats["in_sum2"] + b.stats["in_sum2"])
        np.testing.assert_array_equal(entry.stats["in_absmax"], np.maximum(a.stats["in_absmax"], b.stats["in_absmax"]))
    assert whole.n_chunks == 4 and whole.datasets == ["x.txt", "x.txt"]
    other = Imatrix({"blk.0.b.weight": Entry(np.ones(1), {"in_sum2": np.ones((1, 9))})})
    with pytest.raises(PyggmlError, match="combine importance matrices of one model"):
        whole.merge(other)


# ---- collecting ----

def reference(path, tokens, n_ctx):
    """The statistics by the numpy engine, from every input as it is."""
    from pyggml.backends.reference import ReferencePlan

    model = Model.load(path)
    context = Context(model, n_ctx=n_ctx, exact=True, type_k="F32", type_v="F32")
    sites = find_sites(context.output)
    plan = ReferencePlan([t for s in sites for t in (s.x, s.ids) if t is not None])
    n = len(tokens)
    cells = np.arange(n, dtype=np.int32)
    values = iter(plan.run({"tokens": tokens, "pos": cells, "cell": cells, "first": np.zeros(n, np.int32), "wanted": cells}))
    return [(s, next(values), next(values) if s.ids is not None else None) for s in sites]


@pytest.mark.parametrize("which", ["source", "moe"])
def test_what_is_collected_is_what_the_matrices_multiply(which, request):
    path = request.getfixturevalue(which)
    tokens = np.arange(3, 3 + 40, dtype=np.int32)
    collector = Collector(Model.load(path).file, process_output=True)
    context = Context(Model.load(path), n_ctx=64, exact=True, type_k="F32", type_v="F32", watch=collector)
    context.sequences(tokens[None], 0, range(40))
    for site, x, ids in reference(path, tokens, 64):
        for name in site.weights:
            if not collector.wants(name):
                continue
            entry = collector.entries[name]
            for e in range(len(entry.counts)):
                rows = x if ids is None else np.stack([x[t] if x.ndim == 2 else x[t, u] for t, u in np.argwhere(ids == e)] or [np.zeros(x.shape[-1])])
                assert entry.counts[e] == (len(x) if ids is None else (ids == e).sum())
                for key, reduce in REDUCTIONS.items():
                    np.testing.assert_allclose(entry.stats[key][e], reduce(rows.astype(np.float64)), rtol=2e-3, atol=2e-3, err_msg=f"{name} {key}")


def test_collect(source):
    model = Model.load(source)
    found = collect(model, models.TEXT, dataset="text", n_ctx=32, n_chunks=6, n_ubatch=64)
    assert found.n_chunks == 6 and found.datasets == ["text"] and all(e.counts == 6 * 32 for e in found.entries.values())
    assert set(found.entries) == {n for n, t in model.file.tensors.items() if len(t.shape) > 1 and n.startswith("blk.")}
    alone = collect(model, models.TEXT, n_ctx=32, n_chunks=6, n_ubatch=8)
    for name, entry in found.entries.items():
        np.testing.assert_allclose(alone.entries[name].stats["in_sum2"], entry.stats["in_sum2"], rtol=0.02)


def test_collect_refuses_short_text(source):
    with pytest.raises(PyggmlError, match="128 are needed"):
        collect(Model.load(source), "the cat", n_ctx=64)


def test_statistics(tmp_path):
    rows = {r["tensor"]: r for r in statistics(made())}
    x = made().importance("blk.0.b.weight", (5, 4))[0]
    assert rows["b"]["n"] == 4 and rows["b"]["sum"] == pytest.approx(x.sum(), rel=1e-5) and rows["a"]["n"] == 12
    p = x / x.sum()
    assert rows["b"]["entropy"] == pytest.approx(-(p * np.log2(p)).sum(), rel=1e-5)


def test_command(source, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(models.TEXT)
    out, flags = str(tmp_path / "i.gguf"), ["-f", str(tmp_path / "t.txt"), "-c", "32", "--chunks", "4"]
    assert cli.main(["imatrix", "-m", str(source), *flags, "-o", out]) == 0
    assert "Final estimate" in capsys.readouterr().out
    both = str(tmp_path / "both.dat")
    assert cli.main(["imatrix", "--in-file", out, "--in-file", out, "-o", both, "--output-format", "dat"]) == 0
    a, b = Imatrix.load(out), Imatrix.load(both)
    np.testing.assert_allclose(a.importance("blk.0.attn_q.weight", (1, 256)), b.importance("blk.0.attn_q.weight", (1, 256)), rtol=1e-6)
    again = str(tmp_path / "again.gguf")
    assert cli.main(["imatrix", "--in-file", f"{out},{out}", "-o", again]) == 0 and Imatrix.load(again).n_chunks == 8
    assert cli.main(["imatrix", "--show-statistics", "--in-file", out]) == 0
    assert "ffn_down" in capsys.readouterr().out
    assert cli.main(["imatrix", "-m", str(source)]) == 2
