"""Scores, reference files, perplexity and comparisons."""

import json
import struct

import numpy as np
import pytest

import models
from pyggml import cli
from pyggml.context import Context
from pyggml.errors import Cancelled, PyggmlError
from pyggml.measure import basefile, compare, perplexity, scores
from pyggml.measure.chunks import Evaluator, split, tokenize
from pyggml.measure.lockstep import lockstep
from pyggml.model import Model
from pyggml.quantize import quantize_file


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.as_f16(tmp_path_factory.mktemp("source") / "f16.gguf")


@pytest.fixture(scope="module")
def small(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "q3.gguf"
    quantize_file(source, path, "Q3_K_M")
    return path


@pytest.fixture
def text(tmp_path):
    (tmp_path / "t.txt").write_text(models.TEXT)
    return str(tmp_path / "t.txt")


def logits(rows=7, n=301, seed=0, scale=5.0):
    return (np.random.default_rng(seed).standard_normal((rows, n)) * scale).astype(np.float32)


def softmax(x):
    x = x.astype(np.float64)
    return np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)


# ---- numbers per token ----

def test_log_softmax():
    x = logits()
    np.testing.assert_allclose(scores.log_softmax(x), np.log(softmax(x)), atol=2e-6)
    target = np.arange(7)
    np.testing.assert_allclose(scores.log_likelihood(x, target), np.log(softmax(x))[target, target], atol=2e-6)


def test_divergence_is_that_of_the_definition():
    a, b, target = logits(seed=1), logits(seed=1) + 0.3 * logits(seed=2), np.arange(7)
    p, q = softmax(a), softmax(b)
    t = scores.divergence(scores.log_softmax(a), b, target)
    np.testing.assert_allclose(t.kld, (p * np.log(p / q)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(t.p_diff, q[target, target] - p[target, target], atol=1e-6)
    np.testing.assert_array_equal(t.same_top, p.argmax(-1) == q.argmax(-1))
    same = scores.divergence(scores.log_softmax(a), a, target)
    assert np.abs(same.kld).max() < 1e-5 and same.same_top.all()


def test_many_blocks_are_one(monkeypatch):
    a, b, target = logits(50, seed=3), logits(50, seed=4), np.arange(50)
    whole = scores.divergence(scores.log_softmax(a), b, target)
    monkeypatch.setattr(scores, "BLOCK", 700)
    parts = scores.divergence(scores.log_softmax(a), b, target)
    for name in scores.FIELDS:
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_summary():
    rng = np.random.default_rng(0)
    t = scores.Tokens(rng.exponential(3, 500), rng.exponential(3, 500), rng.exponential(0.1, 500), (rng.random(500) < 0.9).astype(float))
    s = scores.summary(t)
    assert s["Mean PPL(Q)"].value == pytest.approx(np.exp(t.nll.mean()))
    assert s["Mean KLD"].error == pytest.approx(t.kld.std() / np.sqrt(499))
    assert s["99.0% KLD"] == np.percentile(t.kld, 99) and s["Median KLD"] == np.median(t.kld)
    assert s["Mean ln(PPL(Q)/PPL(base))"].error == pytest.approx((t.nll - t.nll_base).std() / np.sqrt(499))
    assert s["RMS Δp"].value == pytest.approx(100 * np.sqrt((t.p_diff**2).mean()))


# ---- reference files ----

def test_base_file_keeps_16_nats(tmp_path):
    x = logits(9, 300, scale=8.0)
    records = basefile.encode(x)
    exact = np.log(softmax(x))
    floor = np.maximum(exact, exact.max(-1, keepdims=True) - basefile.SPAN)
    np.testing.assert_allclose(basefile.decode(records, 300), floor, atol=0.6 * basefile.SPAN / 65535)


def test_base_file_layout(tmp_path):
    chunks = np.arange(16, dtype=np.int32).reshape(2, 8)
    x = logits(2 * 3, 5)
    (tmp_path / "b").write_bytes(basefile.header(chunks, 5) + basefile.encode(x).tobytes())
    assert (tmp_path / "b").stat().st_size == basefile.size(8, 5, 2) == 20 + 64 + 6 * 2 * 10
    found = basefile.BaseFile(tmp_path / "b")
    np.testing.assert_array_equal(found.chunks, chunks)
    np.testing.assert_allclose(np.concatenate(list(found)), np.log(softmax(x)), atol=1e-3)
    assert struct.unpack_from("<iii", (tmp_path / "b").read_bytes(), 8) == (8, 5, 2)


def test_a_flat_row_is_kept(tmp_path):
    records = basefile.encode(np.zeros((1, 6), np.float32))
    np.testing.assert_allclose(basefile.decode(records, 6), np.log(1 / 6), rtol=1e-6)


@pytest.mark.parametrize("damage", [lambda b: b[:10], lambda b: b"x" + b[1:], lambda b: b[:-9], lambda b: b[:12] + struct.pack("<i", -4) + b[16:]])
def test_damaged_base_files_are_refused(tmp_path, damage):
    chunks = np.arange(16, dtype=np.int32).reshape(2, 8)
    (tmp_path / "b").write_bytes(damage(basefile.header(chunks, 5) + basefile.encode(logits(6, 5)).tobytes()))
    with pytest.raises(PyggmlError, match="b: "):
        basefile.BaseFile(tmp_path / "b")


# ---- perplexity ----

EXACT = {"exact": True, "type_k": "F32", "type_v": "F32"}


def by_hand(path, n_ctx, n_chunks):
    """Negative log-likelihoods, chunk by chunk and token by token."""
    model = Model.load(path)
    tokens = tokenize(model, models.TEXT, n_ctx)
    found = []
    for chunk in split(tokens, n_ctx, n_chunks):
        context = Context(model, n_ctx=n_ctx, **EXACT)
        ids = chunk.copy()
        if model.tokenizer.options["add_bos"]:
            ids[0] = model.tokenizer.bos
        p = softmax(context.eval(ids, "all"))
        found += [-np.log(p[j, chunk[j + 1]]) for j in range(n_ctx // 2, n_ctx - 1)]
    return np.array(found)


@pytest.mark.parametrize("n_ubatch", [12, 32, 100])
@pytest.mark.parametrize("golden", ["llama_quant.q8_0", "mixtral.q4_k_m_mix"])
def test_perplexity_is_that_of_the_definition(golden, n_ubatch):
    path = models.GOLDEN / f"{golden}.gguf"
    found = perplexity.perplexity(Model.load(path), models.TEXT, n_ctx=32, n_chunks=5, n_ubatch=n_ubatch, **EXACT)
    expected = by_hand(path, 32, 5)
    assert found.n_tokens == len(expected) == 5 * 15
    np.testing.assert_allclose(found.nll, expected, atol=2e-3)
    assert found.value == pytest.approx(np.exp(expected.mean()), rel=1e-3)
    assert found.error == pytest.approx(found.value * expected.std() / np.sqrt(74), rel=1e-3)


def test_stride(source):
    model = Model.load(source)
    n_ctx = 32 + 8 // 2
    found = perplexity.perplexity(model, models.TEXT, n_ctx=32, stride=8, n_chunks=4)
    tokens = tokenize(model, models.TEXT, 32)
    context, expected = Context(model, n_ctx=n_ctx), []
    for i in range(4):
        context.reset()
        chunk = tokens[8 * i:8 * i + n_ctx]
        p = softmax(context.eval(chunk, "all"))
        expected += [-np.log(p[j, chunk[j + 1]]) for j in range(n_ctx - 9, n_ctx - 1)]
    np.testing.assert_allclose(found.nll, expected, atol=0.03)


def test_short_text_is_refused(source):
    with pytest.raises(PyggmlError, match="tokens, and 128 are needed"):
        perplexity.perplexity(Model.load(source), "the cat", n_ctx=64)
    with pytest.raises(PyggmlError, match="too short to score"):
        perplexity.perplexity(Model.load(source), models.TEXT, n_ctx=2)
    with pytest.raises(PyggmlError, match="at least one is needed"):
        perplexity.perplexity(Model.load(source), models.TEXT, n_ctx=32, n_chunks=0)


def test_cancel(source):
    with pytest.raises(Cancelled, match="after 2 of 5"):
        perplexity.perplexity(Model.load(source), models.TEXT, n_ctx=32, n_chunks=5, progress=lambda done, total, found: done < 2)


def test_divergence_from_a_file_is_that_of_lockstep(source, small, tmp_path):
    perplexity.perplexity(Model.load(source), models.TEXT, n_ctx=32, n_chunks=6, base=tmp_path / "base")
    found = perplexity.kl_divergence(Model.load(small), tmp_path / "base")
    chunks = split(tokenize(Model.load(source), models.TEXT, 32), 32, 6)
    *_, [expected] = lockstep(Model.load(source), [Model.load(small)], chunks)
    assert len(found) == len(expected) == 6 * 15
    np.testing.assert_allclose(found.kld, expected.kld, rtol=0.02, atol=2e-4)
    kept = expected.nll_base < basefile.SPAN            # what is less likely than exp(-16) of the best is cut off in the file
    np.testing.assert_allclose(found.nll_base[kept], expected.nll_base[kept], atol=5e-4)


def test_base_of_another_vocabulary_is_refused(source, tmp_path):
    perplexity.perplexity(Model.load(source), models.TEXT, n_ctx=32, n_chunks=2, base=tmp_path / "base")
    with pytest.raises(PyggmlError, match="compare models with one vocabulary"):
        perplexity.kl_divergence(Model.load(models.GOLDEN / "mixtral.q4_k_m_mix.gguf"), tmp_path / "base")


def test_a_cancelled_base_file_is_not_left(source, tmp_path):
    with pytest.raises(Cancelled):
        perplexity.perplexity(Model.load(source), models.TEXT, n_ctx=32, n_chunks=5, base=tmp_path / "base", progress=lambda *_: False)
    assert not list(tmp_path.iterdir())


# ---- comparing ----

def test_a_file_is_no_distance_from_itself(source, small):
    found = compare.compare(source, [source, small], models.TEXT, n_ctx=32, n_chunks=8)
    same, other = found.files
    assert np.abs(same.tokens.kld).max() < 1e-5 and same.statistics["Same top p"].value == 100
    assert other.tokens.kld.mean() > 1e-3 and other.bits_per_weight < 5 < 15 < same.bits_per_weight
    [pair] = found.pairs
    assert pair.difference.value < -2 * pair.difference.error and pair.verdict == "f16.gguf is closer than q3.gguf"
    assert json.loads(json.dumps(found.as_dict()))["files"][1]["Mean KLD"][0] == pytest.approx(other.tokens.kld.mean())


def test_no_verdict_without_evidence(source, small):
    [pair] = compare.compare(source, [small, small], models.TEXT, n_ctx=32, n_chunks=3).pairs
    assert pair.verdict == "no difference seen"


def test_other_vocabulary_is_refused(source):
    with pytest.raises(PyggmlError, match="compare files made from one model"):
        compare.compare(source, [models.GOLDEN / "mixtral.q4_k_m_mix.gguf"], models.TEXT, n_ctx=32)


def test_contributions(source, small):
    parts = compare.contributions(source, small, models.TEXT, n_ctx=32, n_chunks=3)
    layers = compare.contributions(source, small, models.TEXT, n_ctx=32, n_chunks=3, by_layer=True)
    assert {p.name for p in layers} == {"blk.0", "blk.1", *(p.name for p in parts if not p.name.startswith("blk."))}
    assert [p.kld.value for p in parts] == sorted((p.kld.value for p in parts), reverse=True)
    whole = compare.compare(source, [small], models.TEXT, n_ctx=32, n_chunks=3).files[0].tokens.kld.mean()
    assert 0.3 * whole < sum(p.kld.value for p in parts) < 3 * whole


def test_evaluator_cuts_long_chunks(source):
    model = Model.load(source)
    chunks = split(tokenize(model, models.TEXT, 40), 40, 2)
    whole = np.concatenate([Evaluator(model, 40, n_ubatch=80).logits(chunks[i:i + 1], 20) for i in range(2)])
    pieces = Evaluator(model, 40, n_ubatch=16)
    assert pieces.at_once == 1
    for i in range(2):
        np.testing.assert_allclose(pieces.logits(chunks[i:i + 1], 20)[0], whole[i], atol=0.05)


# ---- commands ----

def test_commands(source, small, text, tmp_path, capsys):
    base, flags = str(tmp_path / "base"), ["-f", text, "-c", "32", "--chunks", "8"]
    assert cli.main(["perplexity", "-m", str(source), *flags, "--kl-divergence-base", base]) == 0
    out = capsys.readouterr().out
    assert out.startswith("[1]") and "Final estimate: PPL = " in out
    assert cli.main(["perplexity", "-m", str(small), "--kl-divergence", "--kl-divergence-base", base]) == 0
    out = capsys.readouterr().out
    assert "====== KL divergence statistics ======" in out and "Mean    KLD:" in out and "99.9%   KLD:" in out and "RMS Δp    :" in out
    assert cli.main(["compare", str(source), str(small), *flags, "--per-layer"]) == 0
    assert "q3.gguf" in (out := capsys.readouterr().out) and "blk.1" in out
    assert cli.main(["compare", str(source), str(small), *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chunks"] == 8
    assert cli.main(["perplexity", "-m", str(source)]) == 2
    assert cli.main(["perplexity", "-m", str(source), "--kl-divergence"]) == 2


def test_plot(source, small, text, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for place in (tmp_path, tmp_path / "none" / "report.html"):             # told before the work
        assert cli.main(["compare", str(source), str(small), "-f", text, "--plot", str(place)]) == 1
        out, err = capsys.readouterr()
        assert not out and f"{place}: no file can be written there" in err
    page = tmp_path / "report.html"
    assert cli.main(["compare", str(source), str(small), "-f", text, "-c", "32", "--chunks", "4", "--plot", str(page)]) == 0
    html = page.read_text()
    assert html.count("<svg") == 2 and "q3.gguf" in html and "<script" not in html and "src=" not in html
