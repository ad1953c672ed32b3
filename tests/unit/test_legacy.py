"""Files from before GGUF: read into today's names and blocks, converted with their vocabulary, refused in one sentence when damaged."""

import struct

import numpy as np
import pytest

from pyggml import cli, formats
from pyggml.errors import GGUFError, PyggmlError
from pyggml.formats import ggml
from pyggml.formats.source import Memory
from pyggml.quants import dequantize, quantize
from pyggml.types import BY_NAME

E, HEADS, KV_HEADS, LAYERS, F, TOKENS = 64, 4, 2, 2, 96, 300
RNG = np.random.default_rng(3)


def weights(F=F):
    kv = E // HEADS * KV_HEADS
    shapes = {"tok_embeddings.weight": (TOKENS, E), "norm.weight": (E,), "output.weight": (TOKENS, E)}
    for i in range(LAYERS):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in {
            "attention.wq": (E, E), "attention.wk": (kv, E), "attention.wv": (kv, E), "attention.wo": (E, E), "attention_norm": (E,),
            "feed_forward.w1": (F, E), "feed_forward.w2": (E, F), "feed_forward.w3": (F, E), "ffn_norm": (E,)}.items()}
    return {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


WEIGHTS = weights()
VOCAB = [b" \xe2\x81\x87 ", b"", b""] + [bytes([i]) for i in range(256)] + [f" word{i}".encode() for i in range(TOKENS - 259)]


def old_blocks(blocks, name, version):
    """Today's blocks in the layout of ggjt `version`: the inverse of what the reader does."""
    b = blocks.reshape(-1, BY_NAME[name].bytes)
    scales = {"Q4_0": 1, "Q4_1": 2, "Q5_0": 1, "Q5_1": 2, "Q8_0": 1}[name]
    head, body = b[:, :2 * scales], b[:, 2 * scales:]
    if version < 2 and name != "Q8_0":
        nibbles = body[:, -16:]
        values = np.concatenate([nibbles & 15, nibbles >> 4], 1)        # weights 0 .. 31
        body = np.concatenate([body[:, :-16], values[:, 0::2] | values[:, 1::2] << 4], 1)
    if name in ("Q4_0", "Q4_1", "Q8_0"):
        head = np.ascontiguousarray(head).view("<f2").astype("<f4").view(np.uint8)
    return np.concatenate([head, body], 1).tobytes()


def old_file(kind, version, type_name="F32", magic=None, extra=b"", skip="", weights=WEIGHTS):
    row = BY_NAME[type_name]
    out = bytearray(magic or {"ggml": b"lmgg", "ggmf": b"fmgg", "ggjt": b"tjgg"}[kind])
    if kind != "ggml":
        out += struct.pack("<I", version)
    out += struct.pack("<7I", TOKENS, E, 256, HEADS, LAYERS, E // HEADS, 0)
    for i, text in enumerate(VOCAB):
        out += struct.pack("<I", len(text)) + text + (b"" if kind == "ggml" else struct.pack("<f", -float(i)))
    for name, w in {**weights, "rope.freqs": np.ones(8, np.float32)}.items():
        if name == skip:
            continue
        quantized = row.quantized and w.ndim == 2
        data = w.tobytes()
        if type_name == "F16" and w.ndim == 2:
            data = w.astype(np.float16).tobytes()
        elif quantized:
            blocks = quantize(w, type_name)
            data = old_blocks(blocks, type_name, version) if version < 3 else blocks.tobytes()
        number = row.id if w.ndim == 2 else 0
        out += struct.pack("<3I", w.ndim, len(name), number) + struct.pack(f"<{w.ndim}I", *w.shape[::-1]) + name.encode()
        out += bytes(-len(out) % 32 if kind == "ggjt" else 0) + data
    return bytes(out) + extra


KINDS = [("ggml", 0), ("ggmf", 1), ("ggjt", 1), ("ggjt", 2), ("ggjt", 3)]


@pytest.mark.parametrize("kind, version", KINDS)
@pytest.mark.parametrize("type_name", ["F32", "F16"])
def test_plain_weights(tmp_path, capsys, kind, version, type_name):
    path = tmp_path / "old.bin"
    path.write_bytes(old_file(kind, version, type_name))
    file = formats.open(path)
    assert file.format == (f"{kind} v{version}" if version else kind) and len(file.tensors) == len(WEIGHTS)
    for name, w in WEIGHTS.items():
        got = file[ggml.gguf_name(name)]
        expected = w.astype(np.float16) if type_name == "F16" and w.ndim == 2 else w
        np.testing.assert_array_equal(got.numpy(), expected)
    kv = file.kv
    assert (kv["llama.embedding_length"], kv["llama.block_count"], kv["llama.feed_forward_length"]) == (E, LAYERS, F)
    assert (kv["llama.attention.head_count"], kv["llama.attention.head_count_kv"], kv["llama.rope.dimension_count"]) == (HEADS, KV_HEADS, E // HEADS)
    tokens = kv["tokenizer.ggml.tokens"]
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"] and tokens[258:260] == ["<0xFF>", "\u2581word0"]
    assert list(kv["tokenizer.ggml.token_type"][:5]) == [2, 3, 3, 6, 6] and kv["tokenizer.ggml.token_type"][259] == 1
    if kind == "ggml":
        assert list(kv["tokenizer.ggml.scores"][257:262]) == [0, 0, 0, -1, -2]
    else:
        assert kv["tokenizer.ggml.scores"][299] == -299
    assert cli.main(["convert", str(path), str(tmp_path / "new.gguf"), "--name", "old one", "--eps", "1e-6"]) == 0
    assert cli.main(["check", "--level", "load", "--strict", str(tmp_path / "new.gguf")]) == 0
    new = formats.open(tmp_path / "new.gguf")
    assert new.kv["general.name"] == "old one" and new.kv["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-6)
    assert new.kv["tokenizer.ggml.tokens"] == tokens
    for name, t in file.tensors.items():
        np.testing.assert_array_equal(new[name].raw, t.raw)


@pytest.mark.parametrize("kind, version", KINDS)
@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_old_blocks_become_todays(tmp_path, capsys, kind, version, type_name):
    data = old_file(kind, version, type_name)
    file = formats.open_source(Memory(data))
    assert bool(file.warnings) == (version < 3 and type_name in ("Q4_0", "Q4_1", "Q8_0"))      # f32 scales are rounded
    (tmp_path / "old.bin").write_bytes(data)
    mapped = formats.open(tmp_path / "old.bin")
    for name, w in WEIGHTS.items():
        if w.ndim == 2:
            expected = quantize(w, type_name)
            for f in (file, mapped):
                t = f[ggml.gguf_name(name)]
                np.testing.assert_array_equal(t.raw, expected)
                np.testing.assert_array_equal(np.concatenate(list(t.pieces(1000))), expected.reshape(-1))
                np.testing.assert_array_equal(t.dequantize(), dequantize(expected, type_name))
    assert cli.main(["convert", str(tmp_path / "old.bin"), str(tmp_path / "new.gguf")]) == 0
    assert ("scales in f32" in capsys.readouterr().out) == bool(file.warnings)
    new = formats.open(tmp_path / "new.gguf")
    for name, t in file.tensors.items():
        np.testing.assert_array_equal(new[name].raw, t.raw)


def test_first_layout_pairs_neighbours():
    """By hand: in ggjt 1 the byte 0x21 holds weights 0 (low half, 1) and 1 (high half, 2)."""
    block = np.zeros((1, 20), np.uint8)
    block[0, :4] = np.array([0.5], "<f4").view(np.uint8)
    block[0, 4:] = 0x88
    block[0, 4] = 0xA9
    for step in ggml.OLD_BLOCKS[1, "Q4_0"][1]:
        block = step(block)
    np.testing.assert_array_equal(dequantize(block, "Q4_0")[0, :3], np.array([0.5, 1.0, 0.0], np.float32))


def test_scales_are_rounded_and_nothing_else():
    """A scale that f16 cannot hold: the block is the same but for the last bits of the scale."""
    block = np.zeros((1, 20), np.uint8)
    block[0, :4] = np.array([0.1], "<f4").view(np.uint8)
    block[0, 4:] = np.arange(16) * 17
    for step in ggml.OLD_BLOCKS[2, "Q4_0"][1]:
        block = step(block)
    np.testing.assert_array_equal(dequantize(block, "Q4_0"), np.float32(np.float16(0.1)) * (np.tile(np.arange(16), 2) - 8)[None])


HALVED = weights(F=128)         # whose halves of rows and columns divide into blocks
BY_COLUMNS = ("tok_embeddings", "attention.wo", "feed_forward.w2")


def write_parts(path, kind, version, type_name, n, weights=WEIGHTS):
    """The model in n files, PATH, PATH.1, ...: vectors in each, matrices cut by rows or columns."""
    for i in range(n):
        part = {name: w if w.ndim == 1 else np.split(w, n, any(stem in name for stem in BY_COLUMNS))[i] for name, w in weights.items()}
        path.with_name(f"{path.name}.{i}" if i else path.name).write_bytes(old_file(kind, version, type_name, weights=part))


@pytest.mark.parametrize("opened", ["", ".1"])
@pytest.mark.parametrize("kind, version", KINDS[:3])
@pytest.mark.parametrize("type_name", ["F16", "Q4_0"])
def test_several_files_are_one_model(tmp_path, capsys, kind, version, type_name, opened):
    path = tmp_path / "old.bin"
    write_parts(path, kind, version, type_name, 2, HALVED)
    file = formats.open(f"{path}{opened}")
    assert [source.name for source in file.sources] == [str(path), f"{path}.1"]
    assert file.kv["llama.feed_forward_length"] == 128 and file.kv["llama.attention.head_count_kv"] == KV_HEADS
    for name, w in HALVED.items():
        t = file[ggml.gguf_name(name)]
        assert t.shape == w.shape
        if w.ndim == 2:
            expected = quantize(w, type_name)
            np.testing.assert_array_equal(t.raw, expected)
            for limit in (1, 1000, 1 << 20):
                np.testing.assert_array_equal(np.concatenate(list(t.pieces(limit))), expected.reshape(-1))
        else:
            np.testing.assert_array_equal(t.numpy(), w)
    assert cli.main(["convert", f"{path}{opened}", str(tmp_path / "new.gguf")]) == 0
    assert cli.main(["check", "--level", "load", "--strict", str(tmp_path / "new.gguf")]) == 0
    assert cli.main(["check", "--level", "load", str(path)]) == 0 and cli.main(["hash", str(path)]) == 0
    assert "unused" not in capsys.readouterr().out


def test_four_files(tmp_path):
    write_parts(tmp_path / "m.bin", "ggmf", 1, "F32", 4)
    file = formats.open(tmp_path / "m.bin.3", use_mmap=False)
    assert len(file.sources) == 4
    for name, w in WEIGHTS.items():
        np.testing.assert_array_equal(file[ggml.gguf_name(name)].numpy(), w)


def test_files_that_do_not_belong_together(tmp_path):
    path = tmp_path / "old.bin"
    write_parts(path, "ggmf", 1, "F32", 2)
    other = path.with_name("old.bin.1")
    good = other.read_bytes()
    other.unlink()
    with pytest.raises(PyggmlError, match=r"old\.bin: offset 0xc: .* one of 2 .*missing: [^ ]*old\.bin\.1$"):
        formats.open(path)
    other.write_bytes(good[:-5])
    with pytest.raises(GGUFError, match=r"old\.bin\.1: offset 0x[0-9a-f]+: .* the file is incomplete or damaged"):
        formats.open(path)
    other.write_bytes(b"GGUF" + good[4:])
    with pytest.raises(GGUFError, match=r"old\.bin\.1: offset 0x0: .*magic"):
        formats.open(path)
    write_parts(tmp_path / "third.bin", "ggmf", 1, "F16", 2)
    other.write_bytes((tmp_path / "third.bin.1").read_bytes())
    with pytest.raises(GGUFError, match=r"old\.bin\.1: offset 0x[0-9a-f]+: tensor .* are not parts of one model"):
        formats.open(path)
    with pytest.raises(GGUFError, match=f"have {E // 2} of {E} values: the file is damaged, or one of several"):
        formats.open_source(Memory(path.read_bytes()))


@pytest.mark.parametrize("kind, version", KINDS)
def test_cut_anywhere(kind, version):
    data = old_file(kind, version)
    rng = np.random.default_rng(0)
    for n in [*range(0, 60), *rng.integers(60, len(data), 150)]:
        with pytest.raises(GGUFError) as caught:
            formats.open_source(Memory(data[:n], "x.bin"))
        assert str(caught.value).startswith("x.bin: offset 0x") and "\n" not in str(caught.value)


def test_flipped_bytes_are_refused_or_read():
    data = old_file("ggjt", 3)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        damaged[rng.integers(0, 2000)] = rng.integers(0, 256)
        try:
            formats.open_source(Memory(bytes(damaged)))
        except GGUFError:
            refused += 1
    assert refused


ONE_TOKEN = b"lmgg" + struct.pack("<7I", 1, 64, 1, 4, 1, 16, 1) + bytes(4)


@pytest.mark.parametrize("data, says", [
    (b"tjgg" + struct.pack("<I", 4) + bytes(100), "ggjt version is 4"),
    (b"fmgg" + struct.pack("<I", 2) + bytes(100), "ggmf version is 2"),
    (b"lmgg" + struct.pack("<7I", 2 ** 31, 1, 1, 1, 1, 1, 1), "n_vocab is 2147483648"),
    (b"lmgg" + struct.pack("<7I", 10, 65, 1, 4, 1, 1, 1), "offset 0x8: .*n_embd is 65, which does not divide into 4 heads"),
    (b"tjgg" + struct.pack("<8I", 3, 10, 64, 1, 4, 1, 65, 1), "offset 0x1c: .*n_rot is 65; it must be at most n_embd, 64"),
    (b"lmgg" + struct.pack("<7I", 10, 64, 1, 4, 1, 16, 1) + struct.pack("<I", 2 ** 32 - 1), "length is 4294967295"),
    (ONE_TOKEN[:4] + struct.pack("<I", 1 << 18) + ONE_TOKEN[8:32] + (struct.pack("<I", 900) + bytes(900)) * 20000, "reaches beyond 16777216 bytes"),
    (ONE_TOKEN + (struct.pack("<4I", 1, 10, 0, 1) + b"rope.freqs" + bytes(4)) * 2, "appears twice"),
    (ONE_TOKEN + b"".join(
        struct.pack("<4I", 1, 12, 0, 1) + b"%02drope.freqs" % i + bytes(4) for i in range(40)), "33 tensors are too many for 1 layers"),
    (b"algg" + bytes(50), "a LoRA adapter"),
])
def test_refused(data, says):
    with pytest.raises(GGUFError, match=says):
        formats.open_source(Memory(data))


@pytest.mark.parametrize("number, says", [(4, r"type 4 \(Q4_2\) was removed from the format"), (77, "type 77 is unknown to this version"),
                                          (2 ** 32 - 1, "type 4294967295 is unknown to this version")])
def test_types_that_are_gone_and_types_that_never_were(number, says):
    data = old_file("ggjt", 3, "F32")
    at = data.index(b"tok_embeddings") - 12
    with pytest.raises(GGUFError, match=f'offset 0x{at:x}: tensor "tok_embeddings.weight": {says}'):
        formats.open_source(Memory(data[:at] + struct.pack("<I", number) + data[at + 4:]))


def test_editing_asks_for_gguf(tmp_path, capsys):
    path = tmp_path / "old.bin"
    path.write_bytes(old_file("ggjt", 3))
    for how in ([], ["--dry-run"], ["--output", str(tmp_path / "b.gguf")]):
        assert cli.main(["edit", str(path), "general.name=x", *how]) == 1
        assert "this is a ggjt v3 file, only GGUF can be edited; first run `pyggml convert" in capsys.readouterr().err
    assert path.read_bytes() == old_file("ggjt", 3) and len(list(tmp_path.iterdir())) == 1


def test_other_models_are_named():
    data = old_file("ggjt", 3).replace(b"tok_embeddings", b"tok_embeddingz")
    with pytest.raises(GGUFError, match='tensor "tok_embeddingz.weight": no llama model has such a tensor, and only llama models'):
        formats.open_source(Memory(data))
    with pytest.raises(GGUFError, match='tensor "token_embd.weight" is missing .* only llama models'):
        formats.open_source(Memory(old_file("ggjt", 3, skip="tok_embeddings.weight")))


@pytest.mark.parametrize("order", ["little", "big"])
def test_convert_also_changes_the_byte_order(tmp_path, order):
    formats.write(tmp_path / "a.gguf", {"a": [1, 2]}, {"w": np.arange(4, dtype=np.float32)}, order=">" if order == "little" else "<")
    assert cli.main(["convert", str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf"), "--byte-order", order]) == 0
    file = formats.open(tmp_path / "b.gguf")
    assert file.order == ("<" if order == "little" else ">") and list(file["w"].numpy()) == [0, 1, 2, 3]
