"""The page that `info --plot` writes: right numbers, whatever the names and weights are."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from pyggml import cli, formats
from pyggml.formats import new_tensor, picture
from pyggml.formats.survey import spread, survey
from pyggml.quants import dequantize, quantize

pytest.importorskip("matplotlib")
RNG = np.random.default_rng(7)


def write(path, tensors, kv=None):
    formats.write(path, kv or {"general.architecture": "llama"}, tensors)
    return formats.open(path)


def plain(rows=64, columns=128):
    return RNG.standard_normal((rows, columns)).astype(np.float32)


def test_spread_of_every_weight(tmp_path):
    x = plain()
    x[40, 17] = -50
    x[:, 5] *= 30
    x[3, :64] = 0
    file = write(tmp_path / "m.gguf", {"w": x})
    s = survey(file)["w"]
    assert (s.n, s.bad, s.channel) == (x.size, 0, 5) and s.zeros == pytest.approx(63 / x.size + 1 / x.size)
    assert s.rms == pytest.approx(np.sqrt(np.mean(x.astype(np.float64) ** 2)))
    assert s.where == np.unravel_index(np.abs(x).argmax(), x.shape) and s.largest == np.abs(x).max()
    columns = np.sqrt((x.astype(np.float64) ** 2).mean(0))
    assert s.channel_ratio == pytest.approx(columns.max() / np.median(columns), rel=1e-5)
    expected = np.histogram(np.clip(x / s.rms, -10, 9.99999), 200, (-10, 10))[0]
    assert s.histogram.sum() == x.size and np.abs(s.histogram - expected).sum() <= 4      # a weight on a border may fall on either side


@pytest.mark.parametrize("order", "<>")
def test_a_sample_is_whole_rows_from_first_to_last(tmp_path, order):
    x = plain(1000, 64)
    x[999, 63] = 99
    blocks = quantize(x, "Q8_0")
    formats.write(tmp_path / "m.gguf", {}, [new_tensor("w", blocks, "Q8_0")], order=order)
    s = spread(formats.open(tmp_path / "m.gguf")["w"], sample=6400)
    assert s.n == 6400 and s.where == (999, 63)
    rows = dequantize(blocks, "Q8_0")[np.linspace(0, 999, 100).astype(int)]
    assert s.rms == pytest.approx(np.sqrt(np.mean(rows.astype(np.float64) ** 2)))


def test_long_rows_scalars_and_what_is_not_finite(tmp_path):
    x = plain(1, 5000).reshape(-1)
    bad = plain()
    bad[0, :3] = np.nan, np.inf, -np.inf
    file = write(tmp_path / "m.gguf", {"long": x, "scalar": np.float32(2).reshape(()), "bad": bad, "zero": np.zeros((4, 4), np.float32),
                                       "empty": np.zeros((0, 4), np.float32), "all": np.full((2, 2), np.nan, np.float32)})
    spreads = survey(file, 1000)
    assert spreads["long"].n == 1000 and spreads["scalar"].rms == 2 and spreads["bad"].bad == 3 and "empty" not in spreads
    assert np.isnan(spreads["zero"].outlier) and spreads["zero"].zeros == 1 and spreads["all"].bad == 4
    page = picture.html(file)
    assert "7 of the weights are NaN or infinite" in page


def pictures(page):
    found = [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert "http" not in re.sub(r'(xmlns(:\w+)?|about|resource)="[^"]*"|<metadata>.*?</metadata>', "", page, flags=re.DOTALL)
    return found


def test_command(tmp_path, capsys):
    tensors = {"token_embd.weight": plain()} | {f"blk.{i}.{name}.weight": plain() for i in range(3) for name in ("attn_q", "ffn_up")}
    tensors |= {f"blk.{i}.attn_norm.weight": plain(1)[0] for i in range(3)}
    write(tmp_path / "m.gguf", tensors)
    out = tmp_path / "out.html"
    assert cli.main(["info", str(tmp_path / "m.gguf"), "--plot", str(out)]) == 0
    assert "tensors  10, " in capsys.readouterr().out
    page = out.read_text()
    assert len(pictures(page)) == 6 and "every weight" in page and page.count("blk.1.ffn_up.weight") == 2
    assert cli.main(["info", str(tmp_path / "m.gguf"), "--plot", str(out)]) == 0 and out.read_text() == page      # the same page again


HOSTILE = ["$a$b$\\frac", "<script>alert(1)</script>", "{{ 7 * 7 }}", "\u202etxt.exe", "blk.9999.x", "blk.99999999.y",
           "\u6a21\u578b", "x" * 60, "a&b\"'"]


def test_names_do_nothing(tmp_path):
    write(tmp_path / "m.gguf", {name: plain() for name in HOSTILE})
    page = picture.html(formats.open(tmp_path / "m.gguf"))
    assert len(pictures(page)) == 3 and "<script" not in page and "{{ 7 * 7 }}" in page and "\u202e" not in page


@pytest.mark.parametrize("tensors", [{}, {"w": np.zeros((0, 4), np.float32)}, {"blk.0.x": np.zeros((3, 4), np.float32)},
                                     {"blk.0.x": np.full((3, 4), np.nan, np.float32)}], ids=["none", "empty", "zeros", "nan"])
def test_there_is_always_a_page(tmp_path, tensors):
    page = picture.html(write(tmp_path / "m.gguf", tensors))
    assert pictures(page) or "no tensors" in page


def test_unknown_types_count_by_size(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, {"a": plain(4, 8)})
    data = path.read_bytes()
    path.write_bytes(data.replace((4).to_bytes(8, "little") + (0).to_bytes(4, "little"), (4).to_bytes(8, "little") + (99).to_bytes(4, "little")))
    page = picture.html(formats.open(path))
    assert "type 99" in page and len(pictures(page)) == 2
