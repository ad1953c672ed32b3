"""Sound GGUF files that are no sound models, and impossible requests: one sentence that names the file and the value, and status 1.

A model of two tiny layers is changed in one place per case; every command that meets the change must refuse it, and those that do
not look there must still work.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pyggml import Llama, cli, formats, native
from pyggml.errors import PyggmlError
from pyggml.formats import Typed

DIM, HEADS, KV_HEADS, FF, LAYERS, CONTEXT = 64, 4, 2, 96, 2, 64
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
TYPES = [2, 3, 3, *[6] * 256, *[1] * 27]


def parts():
    """Keys and tensors of a model that runs."""
    rng = np.random.default_rng(0)
    kv = {"general.architecture": Typed("str", "llama")}
    kv |= {f"llama.{key}": Typed("u32", value) for key, value in (
        ("block_count", LAYERS), ("context_length", CONTEXT), ("embedding_length", DIM), ("feed_forward_length", FF),
        ("attention.head_count", HEADS), ("attention.head_count_kv", KV_HEADS))}
    kv |= {"llama.attention.layer_norm_rms_epsilon": Typed("f32", 1e-5), "llama.rope.freq_base": Typed("f32", 10000.0)}
    kv |= {f"tokenizer.ggml.{key}": value for key, value in {
        "model": Typed("str", "llama"), "tokens": Typed("str[]", TOKENS), "scores": Typed("f32[]", -np.arange(len(TOKENS), dtype=np.float32)),
        "token_type": Typed("i32[]", np.array(TYPES, np.int32)), "bos_token_id": Typed("u32", 1), "eos_token_id": Typed("u32", 2)}.items()}

    def matrix(rows, columns):
        return (rng.standard_normal((rows, columns)) / columns ** 0.5).astype(np.float32)

    kv_dim = DIM * KV_HEADS // HEADS
    tensors = {"token_embd.weight": matrix(len(TOKENS), DIM), "output.weight": matrix(len(TOKENS), DIM),
               "output_norm.weight": np.ones(DIM, np.float32)}
    shapes = {"attn_q": (DIM, DIM), "attn_k": (kv_dim, DIM), "attn_v": (kv_dim, DIM), "attn_output": (DIM, DIM), "ffn_gate": (FF, DIM),
              "ffn_up": (FF, DIM), "ffn_down": (DIM, FF)}
    for layer in range(LAYERS):
        tensors |= {f"blk.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors |= {f"blk.{layer}.{name}.weight": np.ones(DIM, np.float32) for name in ("attn_norm", "ffn_norm")}
    return kv, tensors


def write(path, keys=None, tensors=None):
    """The model with these keys and tensors set; None takes one away, a function makes a new tensor of the old one."""
    kv, arrays = parts()
    for key, value in (keys or {}).items():
        kv[key] = value
    for name, value in (tensors or {}).items():
        arrays[name] = value(arrays[name]) if callable(value) else value
    formats.write(path, {k: v for k, v in kv.items() if v is not None}, {n: a for n, a in arrays.items() if a is not None})
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "m.gguf")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("the cat sat on a mat " * 20)
    return str(path)


def arguments(command, model, text):
    """A call of this command that is fast on the tiny model."""
    more = {"run": ["-p", "ab", "-n", "2", "--temp", "0"], "tokenize": ["-p", "ab"], "bench": ["-p", "4", "-n", "1", "-r", "1"],
            "perplexity": ["-f", text, "-c", "16", "--chunks", "1"]}
    return [command, model, *more.get(command, [])]


def refused(capsys, argv, says):
    """The call ends with 1 and a last line on stderr that contains `says`, which is the only one that the command did not plan."""
    assert cli.main(argv) == 1
    lines = capsys.readouterr().err.splitlines()
    assert says in lines[-1] and lines[-1].startswith(f"pyggml {argv[0]}: ")
    assert all(line.startswith("perplexity: ") for line in lines[:-1])
    assert "Traceback" not in lines[-1] and lines[-1].isprintable() and len(lines[-1]) < 800


def u32(value):
    return Typed("u32", value)


def f32(value):
    return Typed("f32", value)


def spoil(value):
    """A tensor with one number replaced."""
    def change(array):
        array = array.copy()
        array[-1, -1] = value
        return array
    return change


YARN = {"llama.rope.scaling.type": Typed("str", "yarn"), "llama.rope.scaling.factor": f32(4.0)}
# keys, tensors, part of the message
MODELS = {
    "no architecture": ({"general.architecture": None}, {}, '"general.architecture" is missing'),
    "architecture of another type": ({"general.architecture": u32(7)}, {}, '"general.architecture" is 7'),
    "unknown architecture": ({"general.architecture": Typed("str", "frob\n\x1b[31m")}, {}, r'the architecture "frob\n\x1b[31m" is not known'),
    **{f"{key} missing": ({f"llama.{key}": None}, {}, f'"llama.{key}" is missing') for key in (
        "block_count", "context_length", "embedding_length", "attention.head_count", "feed_forward_length",
        "attention.layer_norm_rms_epsilon")},
    **{f"{key} is text": ({f"llama.{key}": Typed("str", "4")}, {}, f'"llama.{key}" is ') for key in (
        "block_count", "context_length", "attention.head_count", "feed_forward_length", "attention.layer_norm_rms_epsilon", "rope.freq_base")},
    **{f"{key} 0": ({f"llama.{key}": u32(0)}, {}, f'"llama.{key}" is 0') for key in (
        "block_count", "context_length", "embedding_length", "attention.head_count", "attention.head_count_kv", "feed_forward_length",
        "rope.dimension_count", "attention.key_length")},
    **{f"{key} huge": ({f"llama.{key}": u32(2**32 - 1)}, {}, f'"llama.{key}" is 4294967295') for key in (
        "block_count", "context_length", "embedding_length", "attention.head_count", "attention.head_count_kv", "feed_forward_length",
        "rope.dimension_count", "attention.key_length", "attention.value_length", "expert_count")},
    "more layers than tensors": ({"llama.block_count": u32(3)}, {}, '"blk.2.attn_norm.weight" is missing'),
    "heads for one layer of two": ({"llama.attention.head_count": Typed("u32[]", np.array([4], np.uint32))}, {}, "2 positive numbers"),
    "heads as text": ({"llama.feed_forward_length": Typed("str[]", ["96", "96"])}, {}, "a whole number, or one for each layer"),
    "heads that do not divide": ({"llama.attention.head_count_kv": u32(3)}, {}, "it must divide the 4 heads"),
    "more heads than values": ({"llama.attention.head_count": u32(4096), "llama.attention.head_count_kv": None}, {}, "key_length"),
    "odd rotation": ({"llama.rope.dimension_count": u32(7)}, {}, "it must be even"),
    "rotation beyond the head": ({"llama.rope.dimension_count": u32(64)}, {}, "at most the head size 16"),
    "epsilon NaN": ({"llama.attention.layer_norm_rms_epsilon": f32(float("nan"))}, {}, "is nan"),
    "epsilon below 0": ({"llama.attention.layer_norm_rms_epsilon": f32(-1.0)}, {}, "is -1.0"),
    "rope base 0": ({"llama.rope.freq_base": f32(0.0)}, {}, '"llama.rope.freq_base" is 0.0'),
    "rope base 1": (YARN | {"llama.rope.freq_base": f32(1.0)}, {}, '"llama.rope.freq_base" is 1.0'),
    "epsilon as an array": ({"llama.attention.layer_norm_rms_epsilon": Typed("f32[]", np.zeros(300, np.float32))}, {}, "292 more]; it must be"),
    "architecture as an array": ({"general.architecture": Typed("i8[]", np.zeros(300, np.int8))}, {}, "292 more], not a string"),
    "endless architecture": ({"general.architecture": Typed("str", "frob" * 9999)}, {}, "(39996 characters)"),
    "rope factor that no position survives": ({"llama.rope.scaling.factor": f32(1e-45)}, {}, "it must be 0 or a number from 1e-06"),
    "unknown rope scaling": ({"llama.rope.scaling.type": Typed("str", "frob")}, {}, "known are none, linear, yarn"),
    "rope factor below 0": (YARN | {"llama.rope.scaling.factor": f32(-4.0)}, {}, '"llama.rope.scaling.factor" is -4.0'),
    **{f"yarn turns {turns}": (YARN | {"llama.rope.scaling.yarn_beta_fast": Typed("f64", turns)}, {}, "a finite number from 1e-06 to 1e+09")
       for turns in (0.0, 5e-324, 1e-30, 1e300)},
    **{f"yarn share {share}": (YARN | {"llama.rope.scaling.yarn_ext_factor": Typed("f64", share)}, {}, "a finite number from -1e+06 to 1e+06")
       for share in (1e300, -1e300)},
    "more experts used than there are": ({"llama.expert_count": u32(4), "llama.expert_used_count": u32(5)}, {}, "expert_used_count"),
    "rope factors 0": ({}, {"rope_freqs.weight": np.zeros(8, np.float32)}, '"rope_freqs.weight" must hold positive numbers'),
    "rope factors of another length": ({}, {"rope_freqs.weight": np.ones(3, np.float32)}, "has shape [3]"),
    **{f"no {name}": ({}, {name: None}, f'"{name}" is missing') for name in (
        "token_embd.weight", "output_norm.weight", "blk.1.attn_q.weight", "blk.0.ffn_down.weight")},
    **{f"half of {name}": ({}, {name: lambda a: a[:len(a) // 2]}, "the keys of this model ask for") for name in (
        "output.weight", "output_norm.weight", "blk.1.attn_q.weight", "blk.1.ffn_norm.weight")},
    **{f"{name} in one dimension": ({}, {name: lambda a: a.reshape(-1)}, f'"{name}" has shape') for name in (
        "token_embd.weight", "output.weight", "blk.1.attn_q.weight")},
    **{f"no rows in {name}": ({}, {name: lambda a: a[:0]}, f'"{name}" has shape [0') for name in (
        "token_embd.weight", "output.weight", "output_norm.weight")},
    **{f"{name} of whole numbers": ({}, {name: lambda a: a.astype(np.int32)}, "which cannot be computed with") for name in (
        "token_embd.weight", "output.weight", "output_norm.weight")},
    "bias of another length": ({}, {"blk.0.attn_q.bias": np.zeros(3, np.float32)}, '"blk.0.attn_q.bias" has shape [3]'),
    "a norm of q without one of k": ({}, {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}, '"blk.0.attn_k_norm.weight" is missing'),
}
BPE = {"tokenizer.ggml.model": Typed("str", "gpt2"), "tokenizer.ggml.merges": Typed("str[]", ["a b"])}
VOCABULARIES = {
    "no tokenizer": ({"tokenizer.ggml.model": None}, "the file has no tokenizer"),
    "unknown tokenizer": ({"tokenizer.ggml.model": Typed("str", "frob")}, "'frob'"),
    "tokenizer of another type": ({"tokenizer.ggml.model": u32(3)}, "tokenizer.ggml.model is 3"),
    "flag as an array": ({"tokenizer.ggml.add_bos_token": Typed("i8[]", np.zeros(300, np.int8))}, "292 more], not true or false"),
    "unknown cut into words": (BPE | {"tokenizer.ggml.pre": Typed("str", "llama-bpf")}, "most like it: llama-bpe, "),
    "endless cut into words": (BPE | {"tokenizer.ggml.pre": Typed("str", "frob\n" * 9999)}, "(49995 characters)"),
    "flag as endless texts": ({"tokenizer.ggml.add_bos_token": Typed("str[]", ["frob" * 9999] * 300)}, "292 more], not true or false"),
    "endless kind of tokenizer": ({"tokenizer.ggml.model": Typed("str", "frob" * 9999)}, "(39996 characters)"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "the file has no vocabulary"),
    "tokens are numbers": ({"tokenizer.ggml.tokens": Typed("u32[]", np.arange(len(TOKENS), dtype=np.uint32))}, "not a list of texts"),
    "empty vocabulary": ({"tokenizer.ggml.tokens": Typed("str[]", [])}, "tokenizer.ggml.tokens is empty"),
    "too few scores": ({"tokenizer.ggml.scores": Typed("f32[]", np.zeros(5, np.float32))}, "has 5 entries"),
    "score NaN": ({"tokenizer.ggml.scores": Typed("f32[]", np.full(len(TOKENS), np.nan, np.float32))}, "is not a number"),
    "bytes that are none": ({"tokenizer.ggml.token_type": Typed("i32[]", np.full(len(TOKENS), 6, np.int32))}, "is of type byte"),
    "BPE without merges": ({"tokenizer.ggml.model": Typed("str", "gpt2")}, "tokenizer.ggml.merges is missing"),
}
ANOTHER_SIZE = {n: {"tokenizer.ggml.tokens": Typed("str[]", [f"t{i}" for i in range(n)]), "tokenizer.ggml.scores": None,
                    "tokenizer.ggml.token_type": None} for n in (200, 400)}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_run(case, tmp_path, capsys, text):
    keys, tensors, says = MODELS[case]
    path = write(tmp_path / "m.gguf", keys, tensors)
    for command in ("run", "bench", "perplexity"):
        refused(capsys, arguments(command, path, text), says)
    with pytest.raises(PyggmlError, match=re.escape(says)):
        Llama(path)([1], max_tokens=1)
    for command in ("info", "tokenize"):
        assert cli.main(arguments(command, path, text)) == 0


def test_a_file_name_that_would_move_the_cursor(tmp_path, capsys, text):
    """No command prints it as it is, whichever part of the program refuses the file."""
    path = write(tmp_path / "a\n\x1b[31m\u202e.gguf", {"general.architecture": None, "tokenizer.ggml.model": None})
    for command in ("run", "bench", "perplexity", "tokenize"):
        refused(capsys, arguments(command, path, text), r"a\n\x1b[31m\u202e.gguf: ")
    for argv in (["imatrix", "--in-file", path, "-o", str(tmp_path / "o")], ["quantize", path, path, "q8_0"], ["info", path, "--key", "x"],
                 ["edit", path, "--remove", "x"], ["hash", path, "-c", path]):
        refused(capsys, argv, r"a\n\x1b[31m\u202e.gguf")


@pytest.mark.parametrize("case", VOCABULARIES)
def test_a_vocabulary_that_cannot_be_read(case, tmp_path, capsys, text):
    keys, says = VOCABULARIES[case]
    path = write(tmp_path / "m.gguf", keys)
    for command in ("run", "tokenize", "perplexity"):
        refused(capsys, arguments(command, path, text), says)
        with pytest.raises(PyggmlError, match=re.escape(str(path))):
            Llama(path, vocab_only=command == "tokenize")
    for command in ("info", "bench"):
        assert cli.main(arguments(command, path, text)) == 0


@pytest.mark.parametrize("size", ANOTHER_SIZE)
def test_a_vocabulary_of_another_size_than_the_token_table(size, tmp_path, capsys, text):
    path = write(tmp_path / "m.gguf", ANOTHER_SIZE[size])
    for command in ("run", "perplexity"):
        refused(capsys, arguments(command, path, text), f'has {size} tokens and the tensor "token_embd.weight" {len(TOKENS)} rows')


@pytest.mark.parametrize("value", [np.nan, np.inf, "x" * 9999])
def test_a_count_that_is_no_number_cannot_choose_types(value, tmp_path, capsys):
    typed = Typed("str", value) if isinstance(value, str) else Typed("f64", value)
    for key in ("expert_count", "attention.head_count_kv"):
        path = write(tmp_path / "m.gguf", {f"llama.{key}": typed})
        refused(capsys, ["quantize", path, str(tmp_path / "q.gguf"), "q4_k_m"], f'{path}: key "llama.{key}" is ')
        assert os.listdir(tmp_path) == ["m.gguf"]


@pytest.mark.filterwarnings("error")
def test_numbers_that_overflow_are_no_warnings(tmp_path, capsys, text):
    path = write(tmp_path / "m.gguf", {}, {"blk.0.attn_norm.weight": lambda a: a * np.float32(1e38)})
    refused(capsys, ["imatrix", path, "-f", text, "-c", "16", "-o", str(tmp_path / "i")], 'the inputs of "blk.')
    path = write(tmp_path / "m.gguf", {}, {"output.weight": lambda a: a * np.float32(1e6)})
    assert cli.main(["imatrix", path, "-f", text, "-c", "16", "-o", str(tmp_path / "i")]) == 0
    assert "PPL = inf" in capsys.readouterr().out


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["blk.1.attn_q.weight", "blk.0.ffn_down.weight", "output.weight"])
def test_numbers_that_are_not_finite(name, value, tmp_path, capsys, text):
    path = write(tmp_path / "m.gguf", {}, {name: spoil(value)} if name != "output.weight" else {name: lambda a: a * value})
    for command in ("run", "perplexity"):
        refused(capsys, arguments(command, path, text), "not finite" if command == "perplexity" else f"{path}: ")
    refused(capsys, ["quantize", path, str(tmp_path / "q.gguf"), "q8_0"], f'tensor "{name}" holds')
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_types_of_other_programs(tmp_path, capsys, text):
    """A tensor whose type nobody knows stops a model only where it is used."""
    def retype(name):
        path = write(tmp_path / "m.gguf", {}, {"extra.weight": np.zeros((2, DIM), np.float32)})
        data = bytearray((tmp_path / "m.gguf").read_bytes())
        at = data.index(name.encode()) + len(name) + 4 + 2 * 8          # behind the number of dimensions and two of them
        data[at:at + 4] = (777).to_bytes(4, "little")
        (tmp_path / "m.gguf").write_bytes(data)
        return path

    path = retype("extra.weight")
    for command in ("run", "bench", "perplexity"):
        assert cli.main(arguments(command, path, text)) == 0
    assert cli.main(arguments("info", path, text)) == 1         # it shows the file and says what is odd
    capsys.readouterr()
    path = retype("blk.0.attn_k.weight")
    for command in ("run", "bench", "perplexity"):
        refused(capsys, arguments(command, path, text), "type 777 is unknown")
    assert cli.main(arguments("info", path, text)) == 1 and "type 777" in capsys.readouterr().out


def test_a_model_that_is_cut_short(model, tmp_path, capsys, text):
    data = Path(model).read_bytes()
    path = tmp_path / "m.gguf"
    for size in sorted({0, 1, 3, 4, 7, 8, 23, 24, *range(30, len(data), len(data) // 40), len(data) - 1}):
        path.write_bytes(data[:size])
        for command in ("run", "info", "tokenize", "bench", "perplexity"):
            refused(capsys, arguments(command, str(path), text), str(path))
        refused(capsys, ["quantize", str(path), str(tmp_path / "q.gguf"), "q8_0"], str(path))
        with pytest.raises(PyggmlError, match="m.gguf"):
            Llama(path)
    assert os.listdir(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize("content", [b"", b"hello\n", b"<!DOCTYPE html><html>", b"PK\x03\x04" + bytes(60), b"\x89PNG\r\n\x1a\n" + bytes(60)],
                         ids=["empty", "text", "html", "zip", "png"])
def test_what_is_no_model(content, tmp_path, capsys, text):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    for command in ("run", "info", "tokenize", "bench", "perplexity"):
        refused(capsys, arguments(command, str(path), text), f"{path}: offset 0x0: ")


def test_what_is_no_file(tmp_path, capsys, text):
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    for name, says in (("", "is a directory"), ("loop", "cannot open"), ("fifo", "not a regular file"), ("missing", "No such file")):
        for command in ("run", "info", "tokenize", "bench", "perplexity"):
            refused(capsys, arguments(command, str(tmp_path / name), text), says)
    refused(capsys, ["run", "", "-p", "a"], "is not the path of a file")


# ---- impossible requests ----

FLAGS = [
    ("-c -1", "n_ctx is -1; it must be from 0"), ("-c 2147483648", "n_ctx is 2147483648"), ("-t 0", "n_threads is 0"), ("-t -1", "n_threads is -1"),
    ("-t 10000", "n_threads is 10000"), ("-b 0", "n_batch is 0"), ("-ub -1", "n_ubatch is -1"), ("-s -2", "seed=-2"), ("--temp nan", "temp=nan"),
    ("--temp -1", "temp=-1"), ("--temp 1e300", "temp=1e+300"), ("--top-k -2", "top_k=-2"), ("--top-p 1.5", "top_p=1.5"), ("--min-p nan", "min_p=nan"),
    ("--repeat-penalty 0", "repeat_penalty=0"), ("--frequency-penalty inf", "frequency_penalty=inf"), ("--mirostat 3", "mirostat=3"),
    ("-c 2", "does not fit into the context of 2"),
]


@pytest.mark.parametrize(("flags", "says"), FLAGS, ids=[flags for flags, _ in FLAGS])
def test_impossible_flags(flags, says, model, capsys):
    refused(capsys, ["run", model, "-p", "ab", "-n", "1", *flags.split()], says)


def test_the_largest_context_costs_nothing_until_it_is_used(model, capsys):
    if native.lib is not None:
        assert cli.main(["run", model, "-p", "ab", "-n", "1", "-c", str(2**31 - 1)]) == 0


@pytest.mark.parametrize("n", ["-1", "-2", "99999999999"])
def test_a_run_ends_with_its_context(n, model, capsys):
    assert cli.main(["run", model, "-p", "ab", "--ignore-eos", "-n", n]) == 0
    assert f"generation {CONTEXT - 3} tokens" in capsys.readouterr().err.splitlines()[-1]


def test_a_prompt_that_is_no_text(model, tmp_path, capsys):
    (tmp_path / "bad.txt").write_bytes(b"ab\xffcd")
    (tmp_path / "long.txt").write_text("the cat " * 100)
    refused(capsys, ["run", model, "-f", str(tmp_path / "bad.txt")], "byte 0xff at offset 2")
    refused(capsys, ["run", model, "-f", str(tmp_path / "long.txt")], f"does not fit into the context of {CONTEXT}")
    refused(capsys, ["run", model, "-f", str(tmp_path / "missing.txt")], "missing.txt: No such file")
    assert cli.main(["run", model, "-p", "", "-n", "2"]) == 0


@pytest.mark.parametrize(("redirect", "status"), [("<&-", 0), (">&-", 0), ("2>&-", 0), ("| true", 141), (">/dev/full", 1)])
@pytest.mark.parametrize("command", ["run", "info", "--help"])
def test_standard_streams_that_are_closed(command, redirect, status, model):
    argv = [command] if command == "--help" else arguments(command, model, "")
    call = " ".join(f"'{a}'" for a in [sys.executable, "-m", "pyggml", *argv])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {call} {redirect}"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert ("No space left" in done.stderr) == (status == 1)
