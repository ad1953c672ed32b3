"""Quantizing whole files: bytes, refusals, cancelling and going on, provenance."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import models
from pyggml import cli, formats, quants
from pyggml.context import Context
from pyggml.errors import Cancelled, PyggmlError
from pyggml.model import Model
from pyggml.quantize import Imatrix, Options, plan, quantize_file, reproduce
from pyggml.quantize import encode as encode_module
from pyggml.quantize.imatrix import Entry


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.as_f16(tmp_path_factory.mktemp("source") / "f16.gguf")


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return models.as_f16(tmp_path_factory.mktemp("moe") / "f16.gguf", "mixtral.q4_k_m_mix")


@pytest.fixture
def small_pieces(monkeypatch):
    """Many pieces in every tensor."""
    monkeypatch.setattr(encode_module, "PIECE", 1024)


def importance(source, seed=0):
    rng = np.random.default_rng(seed)
    entries = {}
    for name, t in formats.open(source).tensors.items():
        if len(t.shape) > 1 and name.startswith("blk."):
            n = t.shape[0] if len(t.shape) == 3 else 1
            entries[name] = Entry(np.full(n, 10.0), {"in_sum2": rng.uniform(0.1, 50, (n, t.shape[-1]))})
    return Imatrix(entries, ["text.txt"], 3, 512)


def test_every_tensor_is_the_codec_of_its_type(source, tmp_path):
    quantize_file(source, tmp_path / "o.gguf", "Q4_0")
    before, after = formats.open(source), formats.open(tmp_path / "o.gguf")
    assert {t.type.name for t in after.tensors.values()} == {"F32", "Q4_0", "Q6_K"}
    for name, t in after.tensors.items():
        expected = quants.quantize(before[name].dequantize(), t.type, search=True) if t.type.quantized else before[name].raw
        np.testing.assert_array_equal(t.raw.reshape(-1), expected.reshape(-1), err_msg=name)


@pytest.mark.parametrize("recipe", ["Q4_0", "Q8_0", "Q5_1"])
def test_bytes_do_not_depend_on_threads(source, tmp_path, recipe, small_pieces):
    files = []
    for n in (1, 2, 7):
        quantize_file(source, tmp_path / "o.gguf", recipe, n_threads=n)
        files.append((tmp_path / "o.gguf").read_bytes())
    assert files[0] == files[1] == files[2]


def test_result_says_sizes_and_runs(source, tmp_path):
    result = quantize_file(source, tmp_path / "o.gguf", "Q8_0")
    after = formats.open(tmp_path / "o.gguf")
    assert result.size_after == sum(t.nbytes for t in after.tensors.values())
    assert result.bits_per_weight == pytest.approx(8.5, rel=0.02)
    tokens = np.arange(20)
    whole = Context(Model.load(source), n_ctx=32).eval(tokens, "all").copy()
    small = Context(Model.load(tmp_path / "o.gguf"), n_ctx=32).eval(tokens, "all")
    assert np.linalg.norm(small - whole) < 0.05 * np.linalg.norm(whole)


def test_metadata_follows(source, tmp_path):
    quantize_file(source, tmp_path / "o.gguf", "Q4_K_S", override_kv=(("general.name", "str", "other"), ("answer", "u32", 42)))
    kv, old = formats.open(tmp_path / "o.gguf").kv, formats.open(source).kv
    assert (kv["general.file_type"], kv["general.quantization_version"], kv["general.name"], kv["answer"]) == (14, 2, "other", 42)
    assert {k: kv.type(k) for k in old} == {k: old.type(k) for k in old}


def test_progress_reaches_the_end(source, tmp_path):
    seen = []
    quantize_file(source, tmp_path / "o.gguf", "Q4_0", progress=lambda done, total, name: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in formats.open(source).tensors.values())


# ---- refusals: one sentence, nothing written ----

def nan_model(path, source):
    file = formats.open(source)
    tensors = {n: t.numpy().copy() for n, t in file.tensors.items()}
    tensors["blk.1.ffn_up.weight"][3, 5] = np.nan
    formats.write(path, file.kv, tensors)
    return path


def huge_model(path, source):
    file = formats.open(source)
    tensors = {n: t.numpy().astype(np.float32) for n, t in file.tensors.items()}
    tensors["blk.0.ffn_up.weight"][0, 0] = 1e6
    formats.write(path, file.kv, tensors)
    return path


@pytest.mark.parametrize(("recipe", "options", "words"), [
    ("IQ2_XS", {}, "needs an importance matrix"),
    ("Q2_K_S", {}, "needs an importance matrix"),
    ("Q9_9", {}, "recipe 'Q9_9' is unknown"),
    ("Q4_0", {"tensor_types": (("attn_q", "q8_1"),)}, "Q8_1 is not a type for weights"),
    ("Q4_0", {"tensor_types": (("attn_q", "q8_x"),)}, "tensor type 'q8_x' is unknown"),
    ("Q4_0", {"imatrix": "nothing.gguf"}, "nothing.gguf: cannot open"),
    ("Q4_0", {"prune_layers": (9,)}, "--prune-layers 9"),
    ("Q4_0", {"include_weights": ("a",), "exclude_weights": ("b",), "imatrix": Imatrix({"a": Entry(np.ones(1), {"in_sum2": np.ones((1, 4))})})},
     "cannot be used together"),
    ("Q4_0", {"imatrix": Imatrix({"other.weight": Entry(np.ones(1), {"in_sum2": np.ones((1, 4))})})}, "is of another model"),
    ("Q4_0", {"imatrix": Imatrix({"blk.0.attn_q.weight": Entry(np.ones(1), {"in_sum2": np.ones((1, 4))})})}, "is of another model"),
    ("IQ2_XS", {"imatrix": Imatrix({"blk.0.attn_q.weight": Entry(np.ones(1), {"in_sum2": np.ones((1, 256))})})}, "nothing is known about the tensor"),
])
def test_refusals(source, tmp_path, recipe, options, words):
    with pytest.raises(PyggmlError, match=words) as error:
        quantize_file(source, tmp_path / "o.gguf", recipe, **options)
    assert "\n" not in str(error.value)
    assert not os.listdir(tmp_path)


def test_refuses_weights_that_are_no_numbers(source, tmp_path):
    for make, words in ((nan_model, 'blk.1.ffn_up.weight" holds nan in row 3'), (huge_model, 'blk.0.ffn_up.weight" holds 1e\\+06, beyond')):
        bad = make(tmp_path / "bad.gguf", source)
        with pytest.raises(PyggmlError, match=words):
            quantize_file(bad, tmp_path / "o.gguf", "Q4_0")
        assert os.listdir(tmp_path) == ["bad.gguf"]


def test_refuses_to_quantize_twice(source, tmp_path):
    quantize_file(source, tmp_path / "a.gguf", "Q8_0")
    with pytest.raises(PyggmlError, match="already Q8_0.*--allow-requantize"):
        quantize_file(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_0")
    quantize_file(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_0", allow_requantize=True)


def test_refuses_its_own_input(source, tmp_path):
    before = source.read_bytes()
    os.symlink(source, tmp_path / "link.gguf")
    for target in (source, tmp_path / "link.gguf"):
        with pytest.raises(PyggmlError, match="the output is the input"):
            quantize_file(source, target, "Q4_0")
    assert source.read_bytes() == before


def test_refuses_a_full_disk(source, tmp_path, monkeypatch):
    real = os.statvfs

    class Full:
        f_bavail, f_frsize = 10, 512

    monkeypatch.setattr(os, "statvfs", lambda path: Full if os.path.isdir(path) else real(path))
    with pytest.raises(PyggmlError, match="bytes needed, 5120 free"):
        quantize_file(source, tmp_path / "o.gguf", "Q4_0")
    assert not os.listdir(tmp_path)


def test_dry_run_tells_about_the_imatrix(source):
    job = plan(formats.open(source), Options(recipe="IQ2_XS"), dry_run=True)
    assert job.missing_imatrix and job.size_after < job.size_before / 5


# ---- cancelling and going on ----

def stop_at(share):
    return lambda done, total, name: done < share * total


def test_a_cancelled_run_goes_on_where_it_stopped(source, tmp_path, small_pieces):
    quantize_file(source, tmp_path / "whole.gguf", "Q4_0")
    target = tmp_path / "o.gguf"
    target.write_bytes(b"old")
    with pytest.raises(Cancelled):
        quantize_file(source, target, "Q4_0", progress=stop_at(0.6))
    assert target.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 3
    seen = []
    quantize_file(source, target, "Q4_0", progress=lambda done, total, name: seen.append(done / total))
    assert seen[0] > 0.3
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["o.gguf", "whole.gguf"]


@pytest.mark.parametrize("share", [0.1, 0.99])
def test_a_killed_run_goes_on_where_it_stopped(source, tmp_path, share):
    script = f"""if True:
        import os, signal
        from pyggml.formats import atomic
        from pyggml.quantize import quantize_file
        atomic.CHUNK = 1 << 12
        quantize_file({str(source)!r}, "o.gguf", "Q4_0", n_threads=1,
                      progress=lambda done, total, name: done < {share} * total or os.kill(os.getpid(), signal.SIGKILL))
    """
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert killed.returncode == -signal.SIGKILL
    assert [name.endswith(".part") for name in os.listdir(tmp_path)] == [True]
    seen = []
    quantize_file(source, tmp_path / "o.gguf", "Q4_0", progress=lambda done, total, name: seen.append(done / total))
    assert seen[0] >= share - 0.6              # the largest tensor is begun anew
    quantize_file(source, tmp_path / "whole.gguf", "Q4_0")
    assert (tmp_path / "o.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["o.gguf", "whole.gguf"]


def test_a_part_of_another_quantization_is_not_used(source, tmp_path, small_pieces):
    for recipe in ("Q4_0", "Q8_0"):
        quantize_file(source, tmp_path / f"{recipe}.gguf", recipe)
    with pytest.raises(Cancelled):
        quantize_file(source, tmp_path / "o.gguf", "Q4_0", progress=stop_at(0.6))
    quantize_file(source, tmp_path / "o.gguf", "Q8_0")
    assert (tmp_path / "o.gguf").read_bytes() == (tmp_path / "Q8_0.gguf").read_bytes()
    assert len(os.listdir(tmp_path)) == 3


def test_an_error_leaves_nothing(source, tmp_path, monkeypatch, small_pieces):
    def broken(*_):
        raise PyggmlError("no")

    monkeypatch.setattr(encode_module, "encode_rows", broken)
    with pytest.raises(PyggmlError, match="no"):
        quantize_file(source, tmp_path / "o.gguf", "Q4_0")
    assert not os.listdir(tmp_path)


# ---- provenance ----

def test_reproduce(source, tmp_path):
    importance(source).save(tmp_path / "im.gguf")
    target = tmp_path / "o.gguf"
    quantize_file(source, target, "Q4_0", imatrix=tmp_path / "im.gguf", tensor_types=(("attn_v", "q5_1"),))
    kv = formats.open(target).kv
    assert kv["quantize.imatrix.entries_count"] == 14 and kv["quantize.imatrix.chunks_count"] == 3 and kv["quantize.imatrix.dataset"] == "text.txt"
    assert kv["pyggml.quant.recipe"] == "Q4_0" and len(kv["pyggml.quant.source.sha256"]) == 64
    found = reproduce(target, str(source))
    assert found.same and found.n_tensors == len(formats.open(source).tensors)
    assert cli.main(["check", "--reproduce", "--source", str(source), str(target)]) == 0
    data = bytearray(target.read_bytes())
    data[-300] ^= 1
    target.write_bytes(data)
    assert not reproduce(target, str(source)).same
    assert cli.main(["check", "--reproduce", "--source", str(source), str(target)]) == 1


def test_reproduce_refuses(source, tmp_path):
    target = tmp_path / "o.gguf"
    quantize_file(source, target, "Q4_0")
    with pytest.raises(PyggmlError, match="its source f16.gguf is not at"):
        reproduce(target)
    with pytest.raises(PyggmlError, match="this is not the same source"):
        reproduce(target, str(target))
    quantize_file(source, target, "Q4_0", compat=True)
    assert not [k for k in formats.open(target).kv if k.startswith("pyggml.")]
    with pytest.raises(PyggmlError, match="was not made by"):
        reproduce(target, str(source))


# ---- imatrix, experts, splits, layers ----

def test_each_expert_has_its_importance(moe, tmp_path):
    imatrix = importance(moe)
    quantize_file(moe, tmp_path / "o.gguf", "Q3_K_S", imatrix=imatrix, compat=True)
    name = "blk.0.ffn_up_exps.weight"
    made, weights = formats.open(tmp_path / "o.gguf")[name], formats.open(moe)[name].dequantize()
    each = imatrix.importance(name, weights.shape)
    expected = np.stack([quants.quantize(w, made.type, each[e]) for e, w in enumerate(weights)])
    np.testing.assert_array_equal(made.raw.reshape(-1), expected.reshape(-1))
    assert not np.array_equal(expected, quants.quantize(weights, made.type).reshape(expected.shape))


def test_include_and_exclude(source, tmp_path):
    imatrix = importance(source)
    files = {}
    for label, options in {"none": {}, "all": {"imatrix": imatrix}, "q": {"imatrix": imatrix, "include_weights": ("attn_q",)},
                           "not q": {"imatrix": imatrix, "exclude_weights": ("attn_q",)}}.items():
        quantize_file(source, tmp_path / "o.gguf", "Q4_K_S", **options)
        files[label] = {n: t.raw.tobytes() for n, t in formats.open(tmp_path / "o.gguf").tensors.items()}
    q, k = "blk.0.attn_q.weight", "blk.0.attn_k.weight"
    assert files["q"][q] == files["all"][q] != files["none"][q] == files["not q"][q]
    assert files["not q"][k] == files["all"][k] != files["none"][k] == files["q"][k]


def split_model(source, folder):
    """`source` in two parts."""
    file = formats.open(source)
    names = list(file.tensors)
    for i, own in enumerate((names[:9], names[9:])):
        split = {"split.no": formats.Typed("u16", i), "split.count": formats.Typed("u16", 2), "split.tensors.count": formats.Typed("i32", len(names))}
        formats.write(folder / f"m-{i + 1:05d}-of-00002.gguf", (file.kv.typed() if i == 0 else {}) | split, [file[n] for n in own])
    return folder / "m-00001-of-00002.gguf"


def test_splits(source, tmp_path):
    first = split_model(source, tmp_path)
    quantize_file(source, tmp_path / "whole.gguf", "Q4_0")
    whole = formats.open(tmp_path / "whole.gguf")
    joined = quantize_file(first, tmp_path / "joined.gguf", "Q4_0")
    parts = quantize_file(first, tmp_path / "o.gguf", "Q4_0", keep_split=True)
    assert [os.path.basename(p) for p in parts.paths] == ["o-00001-of-00002.gguf", "o-00002-of-00002.gguf"]
    for path in (*joined.paths, parts.paths[0]):
        made = formats.open(path)
        assert set(made.tensors) == set(whole.tensors)
        assert all(np.array_equal(made[n].raw, whole[n].raw) for n in whole.tensors)
    assert reproduce(tmp_path / "joined.gguf", str(first)).same


def test_prune_layers(source, tmp_path):
    before = formats.open(source)
    n = before.kv["llama.block_count"]
    quantize_file(source, tmp_path / "o.gguf", "Q8_0", prune_layers=(0,))
    made = formats.open(tmp_path / "o.gguf")
    assert made.kv["llama.block_count"] == n - 1
    np.testing.assert_array_equal(made["blk.0.attn_q.weight"].raw, quants.quantize(before["blk.1.attn_q.weight"].dequantize(), "Q8_0", search=True))
    Context(Model.load(tmp_path / "o.gguf"), n_ctx=8).eval([1, 2])


# ---- the command ----

def test_command(source, tmp_path, capsys):
    target = str(tmp_path / "o.gguf")
    assert cli.main(["quantize", "--tensor-type", "attn_v=q5_1", "--override-kv", "x.y=bool:true", str(source), target, "q4_0", "2"]) == 0
    assert "quant size" in capsys.readouterr().out
    made = formats.open(target)
    assert made["blk.0.attn_v.weight"].type.name == "Q5_1" and made.kv["x.y"] is True
    assert cli.main(["quantize", "--dry-run", str(source), "IQ2_XS"]) == 0
    assert "needs an importance matrix" in capsys.readouterr().out
    assert cli.main(["quantize", str(source), target, "IQ2_XS"]) == 1
    assert cli.main(["quantize", str(source), target]) == 2
    assert cli.main(["quantize", str(source), target, "Q4_0", "x"]) == 2
    assert cli.main(["quantize", "--override-kv", "x.y=1", str(source), target, "Q4_0"]) == 1


def test_command_names_the_output_itself(source, tmp_path):
    copy = models.as_f16(tmp_path / "m.gguf")
    assert cli.main(["quantize", str(copy), "7"]) == 0
    assert formats.open(tmp_path / "ggml-model-Q8_0.gguf").kv["general.file_type"] == 7


@pytest.mark.parametrize("recipe", ["Q4_0", "Q4_K_M", "F16"])
def test_tensors_without_numbers_stay_that(tmp_path, recipe):
    empty = {f"blk.0.{i}.weight": np.zeros(shape, np.float16) for i, shape in enumerate(((4, 0), (0, 256), (3, 0, 256), (3, 256, 0), (0, 4, 0)))}
    formats.write(tmp_path / "a.gguf", {"general.architecture": "llama"}, empty | {"output.weight": np.ones((4, 256), np.float16)})
    quantize_file(tmp_path / "a.gguf", tmp_path / "b.gguf", recipe)
    made = formats.open(tmp_path / "b.gguf")
    assert {name: made[name].shape for name in empty} == {name: w.shape for name, w in empty.items()}
