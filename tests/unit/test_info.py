"""`pyggml info`: what it prints for people and for programs, and that nothing in a file can drive the terminal."""

import argparse
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from pyggml import formats
from pyggml.cli import info
from pyggml.errors import PyggmlError
from pyggml.formats import Typed


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.gguf"
    formats.write(path, {
        "general.architecture": "llama", "general.name": "evil \x1b[31m\u202e\n\x9b name", "nan": float("nan"), "flag": True,
        "words": [f"w{i}" for i in range(1000)], "nested": [[1, 2], ["a"]], "tokenizer.chat_template": "{{ a }}\nline \x07",
        "long": "x" * 5000, "big": Typed("u64", 2 ** 64 - 1), "bytes": Typed("str", b"a\xffb"),
    }, {"w\x1b": np.ones((4, 64), np.float32), "v": np.ones(3, np.float16)})
    return path


def run(path, *flags):
    parser = argparse.ArgumentParser()
    info.add_arguments(parser)
    return info.run(parser.parse_args([str(path), *flags]))


def test_text(model, capsys):
    assert run(model, "--tensors") == 0
    out = capsys.readouterr().out
    assert "general.architecture" in out and "str[1000]" in out and "... 992 more]" in out and "... (5000 characters)" in out
    assert r"evil \x1b[31m\u202e\n\x9b name" in out and r"a\xffb" in out and "[[1, 2], [\"a\"]]" in out
    assert hashlib.sha256(b"{{ a }}\nline \x07").hexdigest() in out
    assert "F32 1, F16 1" in out and "4 x 64" in out and r"w\x1b" in out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert len(out) < 5000


def test_full_text(model, capsys):
    run(model, "--full")
    out = capsys.readouterr().out
    assert "w999" in out and "x" * 5000 in out


def test_one_key(model, capsys):
    assert run(model, "--key", "general.architecture", "--key", "words", "--key", "nested", "--key", "long", "--key", "general.name") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama" and json.loads(lines[1])[999] == "w999" and lines[2] == '[[1, 2], ["a"]]' and lines[3] == "x" * 5000
    assert lines[4] == r"evil \x1b[31m\u202e\n\x9b name"
    with pytest.raises(PyggmlError, match='key "word" is missing; did you mean words?'):
        run(model, "--key", "word")


def test_json_of_metadata_alone(model, capsys):
    run(model, "--json", "--no-tensors")
    assert "tensors" not in json.loads(capsys.readouterr().out)


def test_json(model, capsys):
    run(model, "--json")
    out = capsys.readouterr().out
    document = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert out.isascii()
    metadata = document["metadata"]
    assert metadata["words"] == {"type": "str[]", "length": 1000, "value": [f"w{i}" for i in range(8)]}
    assert metadata["nan"]["value"] == "nan" and metadata["big"]["value"] == 2 ** 64 - 1 and metadata["nested"]["value"] == [[1, 2], ["a"]]
    assert metadata["general.name"]["value"] == "evil \x1b[31m\u202e\n\x9b name"
    assert document["tensors"][0] | {"offset": 0} == {"name": "w\x1b", "type": "F32", "shape": [4, 64], "offset": 0, "bytes": 1024}
    run(model, "--json", "--full")
    assert len(json.loads(capsys.readouterr().out)["metadata"]["words"]["value"]) == 1000


def test_template(model, capsys, tmp_path):
    run(model, "--chat-template")
    assert capsys.readouterr().out == "{{ a }}\nline \\x07\n"
    formats.write(tmp_path / "none.gguf", {})
    with pytest.raises(PyggmlError, match="has no chat template"):
        run(tmp_path / "none.gguf", "--chat-template")


def test_a_large_vocabulary(tmp_path):
    path = tmp_path / "v.gguf"
    formats.write(path, {"tokenizer.ggml.tokens": [f"token{i}" for i in range(150_000)], "tokenizer.ggml.merges": ["a b"] * 150_000})
    tokens = formats.open(path).kv["tokenizer.ggml.tokens"]
    assert len(tokens) == 150_000 and tokens[77] == "token77" and tokens.tolist()[-1] == "token149999"


def test_importing_formats_is_light():
    script = "import sys, pyggml.formats; print(sorted({'jinja2', 'urllib.request', 'html', 'http'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"
