"""A tensor type defined in Python: written, read, checked, computed with and measured like any other."""

from pathlib import Path

import numpy as np
import pytest

from pyggml import Llama, cli, formats, quants
from pyggml.measure import compare
from pyggml.quantize import quantize_file
from pyggml.quants import CODECS
from pyggml.types import BY_ID, BY_NAME

MODEL = Path(__file__).parents[2] / "models" / "books6m-q8_0.gguf"
TEXT = "It was a dark and stormy night; the rain fell in torrents, and the wind swept the streets of the town. " * 4


@pytest.fixture(scope="module")
def eighths():
    """Eight bits a weight and a scale for 64 of them, as a user would write it."""
    class EIGHTHS(quants.Codec):
        id, block = 1003, 64
        layout = [("d", "<f2"), ("q", "i1", 64)]

        def decode(self, b):
            return b["d"].astype(np.float32)[:, None] * b["q"]

        def encode(self, x, w):
            d = (np.abs(x).max(axis=1) / 127).astype(np.float16)
            return self.blocks(len(x), d=d, q=np.rint(x / np.maximum(d.astype(np.float32), 1e-12)[:, None]).clip(-127, 127))

    yield quants.register(EIGHTHS)
    del BY_ID[1003], BY_NAME["EIGHTHS"], CODECS["EIGHTHS"]


@pytest.fixture(scope="module")
def model(eighths, tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "m.gguf"
    result = quantize_file(MODEL, path, "eighths", allow_requantize=True)
    assert 8.25 < result.bits_per_weight < 8.4
    return path


def test_it_is_read_and_checked(model, capsys):
    file = formats.open(model)
    assert {t.type.name for t in file.tensors.values()} == {"EIGHTHS", "F32"}
    for status, *arguments in ((0, "info", "--tensors", model),
                               (0, "check", "--level", "load", model), (0, "hash", model), (1, "diff", model, MODEL)):
        assert cli.main(list(map(str, arguments))) == status
    assert "EIGHTHS" in capsys.readouterr().out
    source, t = formats.open(MODEL)["blk.0.ffn_up.weight"].dequantize(), file["blk.0.ffn_up.weight"]
    assert np.abs(t.dequantize() - source).max() < np.abs(source).max() / 127
    with pytest.raises(Exception, match="EIGHTHS"):
        t.numpy()


def test_its_scales_are_looked_at(eighths, model, tmp_path, capsys):
    blocks = quants.quantize(np.ones((4, 128), np.float32), "EIGHTHS")
    blocks[2, 66:68] = 0xFF
    formats.write(tmp_path / "bad.gguf", {}, [formats.new_tensor("w", blocks, "EIGHTHS")])
    assert cli.main(["check", str(tmp_path / "bad.gguf")]) == 1
    assert 'tensor "w": row 2, block 1: d is NaN' in capsys.readouterr().err


def test_pieces_of_the_decoded_form(model):
    t = formats.open(model)["blk.0.ffn_up.weight"]
    decoded = t.computable
    assert decoded.type.name == "F32" and decoded is t.computable
    np.testing.assert_array_equal(decoded.numpy(), t.dequantize())
    np.testing.assert_array_equal(np.concatenate(list(decoded.pieces(1000))), t.dequantize().reshape(-1).view(np.uint8))


def test_it_runs_and_is_measured(model):
    llm = Llama(str(model), n_ctx=64, verbose=False)
    same = Llama(str(MODEL), n_ctx=64, verbose=False)
    prompt = "It was a dark night, and"
    assert llm(prompt, max_tokens=4, temperature=0)["choices"][0]["text"] == same(prompt, max_tokens=4, temperature=0)["choices"][0]["text"]
    found = compare.compare(str(MODEL), [str(model)], TEXT, n_ctx=32)
    assert found.files[0].statistics["Mean KLD"].value < 2e-3
