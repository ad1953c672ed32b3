"""`pyggml check`: each rule finds what it is for, on a file that is otherwise sound; and a sound file passes at every level."""

import argparse
import json

import numpy as np
import pytest
from calls import count

from pyggml import formats
from pyggml.cli import check
from pyggml.formats import Typed, new_tensor, numbers, render
from pyggml.formats.tensorfile import TensorFile
from pyggml.types import BY_NAME, TYPES

E, HEADS, KV, F, TOKENS = 64, 4, 2, 96, 40


TEMPLATE = "tokenizer.chat_template"


def sound_kv():
    return {"general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 128, "llama.embedding_length": E,
            "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV, "llama.feed_forward_length": F,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [f"t{i}" for i in range(TOKENS - 1)] + ["<0x0A>"],
            "tokenizer.ggml.scores": Typed("f32[]", [0.0] * TOKENS), "tokenizer.ggml.token_type": [1] * (TOKENS - 1) + [6],
            "tokenizer.ggml.bos_token_id": 1}


def sound_tensors():
    head = E // HEADS
    shapes = {"token_embd.weight": (TOKENS, E), "output_norm.weight": (E,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_norm.weight": (E,), "attn_q.weight": (E, E), "attn_k.weight": (KV * head, E), "attn_v.weight": (KV * head, E),
            "attn_output.weight": (E, E), "ffn_norm.weight": (E,), "ffn_gate.weight": (F, E), "ffn_up.weight": (F, E),
            "ffn_down.weight": (E, F)}.items()}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def run(path, *flags):
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    return check.run(parser.parse_args([str(path), *flags]))


def problems(tmp_path, capsys, kv, tensors, level="load"):
    """Exit status and lines of errors and of the rest."""
    path = tmp_path / "m.gguf"
    formats.write(path, kv, tensors)
    status = run(path, "--level", level)
    out = capsys.readouterr()
    return status, out.err.splitlines(), out.out.splitlines()


@pytest.mark.parametrize("level", check.LEVELS)
def test_sound(tmp_path, capsys, level):
    status, errors, rest = problems(
        tmp_path, capsys, sound_kv() | {TEMPLATE: "{% for m in messages %}{{ m['content'] }}{% endfor %}"}, sound_tensors(), level)
    assert status == 0 and not errors and len(rest) == 1 and "sound (GGUF v3, 14 keys, 20 tensors" in rest[0]


WITHOUT = object()
METADATA = [
    ("general.architecture", WITHOUT, '"general.architecture" is missing'),
    ("general.name", 5, "its type is u32; it must be str"),
    ("llama.block_count", 0, "it is 0; it must be from 1 to 4096"),
    ("llama.block_count", 100_000, "it is 100000"),
    ("llama.block_count", 3, "declares 3 layers, but layer 2 has no tensors"),
    ("llama.block_count", 1, "declares 1 layers, but there are tensors of layer 1"),
    ("llama.block_count", Typed("u64", 2), "its type is u64; it must be u32"),
    ("llama.attention.head_count", 0, "0 attention heads"),
    ("llama.attention.head_count_kv", 3, "cannot share 3 key-value heads"),
    ("llama.embedding_length", 32, 'tensor "token_embd.weight" is 40 x 64; the metadata asks for tokens x 32'),
    ("llama.feed_forward_length", 97, 'tensor "blk.0.ffn_gate.weight" is 96 x 64; the metadata asks for 97 x 64'),
    ("llama.attention.layer_norm_rms_epsilon", float("nan"), "it is nan"),
    ("tokenizer.ggml.tokens", WITHOUT, '"tokenizer.ggml.tokens" is missing or empty'),
    ("tokenizer.ggml.tokens", [1, 2], "its type is i32[]; it must be str[]"),
    ("tokenizer.ggml.tokens", [f"t{i}" for i in range(TOKENS)], 'byte token 39 is "t39"'),
    ("tokenizer.ggml.tokens", [f"t{i}" for i in range(TOKENS - 1)] + ["<0x-1>"], 'byte token 39 is "<0x-1>"'),
    ("tokenizer.ggml.tokens", [f"t{i}" for i in range(TOKENS + 1)], "has 40 rows for 41 tokens"),
    ("tokenizer.ggml.scores", [0.0], "has 1 elements for 40 tokens"),
    ("tokenizer.ggml.scores", Typed("i8[]", [0] * TOKENS), "its type is i8[]; it must be f32[] or i32[]"),
    ("tokenizer.ggml.scores", WITHOUT, '"tokenizer.ggml.scores" is missing'),
    ("tokenizer.ggml.token_type", [1], "has 1 elements for 40 tokens"),
    ("tokenizer.ggml.token_type", [1] * (TOKENS - 1) + [7], "element 39 is 7; it must be from 0 to 6"),
    ("tokenizer.ggml.bos_token_id", 40, "is 40, there are 40 tokens"),
    ("tokenizer.ggml.model", "", 'is ""; known are llama, gpt2'),
    ("tokenizer.ggml.model", ["llama", "gpt2"], "its type is str[]; it must be str"),
    ("tokenizer.ggml.model", [1, 2], "its type is i32[]; it must be str"),
    ("tokenizer.ggml.model", "lama", 'is "lama"; known are llama, gpt2'),
    ("llama.vocab_size", [TOKENS, TOKENS], "its type is i32[]; it must be u32"),
    ("llama.expert_used_count", 2, "is 2, there are 0 experts"),
    ("tokenizer.ggml.model", "gpt2", '"tokenizer.ggml.merges" is missing'),
    (TEMPLATE, "{% for %}", "does not render: TemplateSyntaxError in line 1"),
    (TEMPLATE, "{{ messages[0].__class__.__mro__ }}", "does not render: SecurityError"),
    (TEMPLATE, 7, "its type is u32"),
]


@pytest.mark.parametrize("key, value, says", METADATA, ids=lambda v: v if isinstance(v, str) else None)
def test_metadata_problems_fail_a_load_and_warn_before(tmp_path, capsys, key, value, says):
    kv = sound_kv()
    kv.pop(key, None)
    if value is not WITHOUT:
        kv[key] = value
    status, errors, _ = problems(tmp_path, capsys, kv, sound_tensors())
    assert status == 1 and any(says in line for line in errors)
    status, errors, rest = problems(tmp_path, capsys, kv, sound_tensors(), "validate")
    assert status == 0 and not errors and any(says in line and line.endswith("(warning)") for line in rest)


def test_the_engine_has_the_last_word(tmp_path, capsys):
    tensors = sound_tensors()
    del tensors["blk.1.ffn_up.weight"]
    status, errors, _ = problems(tmp_path, capsys, sound_kv(), tensors)
    assert status == 1 and len(errors) == 1 and "blk.1.ffn_up.weight" in errors[0]
    status, _, rest = problems(tmp_path, capsys, {"general.architecture": "other", "other.block_count": 2}, sound_tensors())
    assert status == 0 and any('does not run the architecture "other"' in line for line in rest)


def test_experts(tmp_path, capsys):
    kv = sound_kv() | {"llama.expert_count": 2, "llama.expert_used_count": 3}
    assert any("is 3, there are 2 experts" in line for line in problems(tmp_path, capsys, kv, sound_tensors())[1])


def test_what_other_programs_can_run_is_no_error(tmp_path, capsys):
    def others(**changes):
        status, errors, rest = problems(tmp_path, capsys, sound_kv() | changes, sound_tensors())
        assert status == 0 and not errors
        return rest[:-1]

    assert others(**{"tokenizer.ggml.scores": Typed("i32[]", [0] * TOKENS)}) == []
    assert others(**{"tokenizer.ggml.model": "no_vocab"}) == []
    assert 'does not run the tokenizer "rwkv"' in others(**{"tokenizer.ggml.model": "rwkv"})[0]


@pytest.mark.parametrize("arch, key", [("mamba", "ssm.conv_kernel"), ("rwkv7", "wkv.head_size")])
def test_recurrent_models_have_no_heads(tmp_path, capsys, arch, key):
    kv = {"general.architecture": arch, f"{arch}.attention.head_count": 0}
    assert any("0 attention heads" in line for line in problems(tmp_path, capsys, kv, sound_tensors())[1])
    assert not problems(tmp_path, capsys, kv | {f"{arch}.{key}": 4}, sound_tensors())[1]


FLOATS = [row for row in TYPES if numbers.scales(row) or row.name == "IQ1_M"]


@pytest.mark.parametrize("row", FLOATS, ids=str)
@pytest.mark.parametrize("order", "<>")
def test_every_scale_of_every_type_is_looked_at(tmp_path, capsys, row, order):
    blocks = np.zeros((3, 2 * row.bytes), np.uint8)
    shape = (3, 2 * row.block)
    path = tmp_path / "m.gguf"
    for scale in numbers.scales(row) or [numbers.Scale("scales", "spread", 0, 1)]:
        damaged = blocks.copy()
        if scale.kind == "spread":
            damaged[1, row.bytes:].view(row.layout)["scales"][0].view(np.uint16)[:] = [0, 0, 0xC000, 0x7000]
        else:
            size = {"f16": 2, "bf16": 2, "float": 4, "double": 8, "e8m0": 1}[scale.kind]
            start = row.bytes + scale.offset
            damaged[1, start:start + size] = 0xFF
            if scale.kind != "e8m0":
                damaged[1, start + size - 1] = 0x7F
        formats.write(path, {}, [new_tensor("ok", blocks, row, shape), new_tensor("w", damaged, row, shape)], order=order)
        assert run(path, "--level", "parse") == 0
        capsys.readouterr()
        assert run(path) == 1
        error = capsys.readouterr().err
        field = f"block 1: {scale.name}" if scale.name else "weight 1"
        kind = "infinity" if scale.kind == "spread" else "NaN"
        assert f'tensor "w": row 1, {field} is {kind}' in error and error.count("\n") == 1
        offset = int(error.split("offset 0x")[1].split(":")[0], 16)
        assert offset == formats.open(path)["w"].offset + 3 * row.bytes


def test_infinity_is_told_from_nan(tmp_path, capsys):
    path = tmp_path / "m.gguf"
    formats.write(path, {}, {"w": np.array([[1, 2], [-np.inf, np.nan]], np.float32)})
    assert run(path) == 1
    assert "row 1, weight 0 is infinity" in capsys.readouterr().err


def test_the_first_of_many_pieces_is_named(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    data = np.zeros((100, 32), np.float32)
    data[70, 3] = data[90, 1] = np.nan
    formats.write(path, {}, {"w": data})
    tensor = formats.open(path)["w"]
    monkeypatch.setattr(type(tensor), "pieces", lambda self: (tensor.raw.reshape(-1)[i:i + 256] for i in range(0, 12800, 256)))
    assert numbers.first_bad(tensor) == numbers.Bad(70 * 32 + 3, "", "NaN")


@pytest.mark.parametrize("order", ["<", ">"])
def test_small_tensors_are_looked_at_together_and_named_apart(tmp_path, capsys, order):
    """One NaN of many tensors is found in its own; bytes between two tensors are nobody's numbers."""
    path, n = tmp_path / "m.gguf", 40
    sound = {f"t{i}": np.ones(5, np.float16 if i % 4 == 3 else np.float32) for i in range(n)} | {"empty": np.ones((0, 4), np.float32)}
    formats.write(path, {}, sound, order=order)
    file = formats.open(path)
    assert 1 < max(map(len, numbers.runs(file.tensors.values()))) < 4
    assert sum(map(len, numbers.runs(file.tensors.values()))) == n + 1
    places, data = {t.name: t.offset for t in file.tensors.values()}, path.read_bytes()
    between = bytearray(data)
    for at in places.values():
        between[at + 20:at + 32] = b"\xff" * 12
    path.write_bytes(between[:len(data)])
    assert run(path) == 0 and not capsys.readouterr().err
    for i in range(0, n, 3):
        at = places[f"t{i}"]
        path.write_bytes(data[:at] + b"\xff" * 4 + data[at + 4:])
        assert run(path) == 1
        assert f'offset 0x{at:x}: tensor "t{i}": row 0, weight 0 is NaN' in capsys.readouterr().err


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K", "IQ1_M"])
def test_equal_tensors_are_one_array(tmp_path, name, order):
    """Which of them are damaged, and in which block, is what each of them alone says."""
    row, n = BY_NAME[name], 9

    def written(blocks):
        path = tmp_path / "m.gguf"
        formats.write(path, {}, [new_tensor(f"t{i}", b, row, (1, 3 * row.block)) for i, b in enumerate(blocks)], order=order)
        return list(formats.open(path).tensors.values())

    blocks = np.random.default_rng(0).integers(0, 256, (n, 1, 3 * row.bytes), np.uint8)
    blocks[2, 0, row.bytes:] = blocks[5, 0, -row.bytes:] = blocks[8] = 0xFF
    tensors = written(blocks)
    assert {"t2", "t5", "t8"} <= {t.name for t, _ in numbers.bad_ones(tensors)}
    for first in range(n):
        assert [len(run) for run in numbers.runs(tensors[first:])] == [n - first]
        found = list(numbers.bad_ones(tensors[first:]))
        assert found == [(t, bad) for t in tensors[first:] if (bad := numbers.first_bad(t)) is not None]
    assert not list(numbers.bad_ones(written(np.zeros((n, 1, 3 * row.bytes), np.uint8))))


def test_many_findings_are_no_more_work_than_many_keys(tmp_path, capsys):
    """Ten times as many findings are ten times the work: each is placed without looking through all keys again."""
    def work(n):
        formats.write(tmp_path / "m.gguf", {f"key.{i}": Typed("str", b"\xff") for i in range(n)}, {})
        calls = count(lambda: run(tmp_path / "m.gguf", "--json"))
        assert len(json.loads(capsys.readouterr().out)["files"][0]["notes"]) == n
        return calls

    work(1)                                             # what is imported and compiled once
    assert work(1000) < 15 * work(100)


def test_space_and_text_are_notes(tmp_path, capsys):
    path = tmp_path / "m.gguf"
    formats.write(path, {"bad": Typed("str", b"\xff")}, {"a": np.zeros(8, np.float32)})
    path.write_bytes(path.read_bytes() + bytes(100))
    assert run(path, "--strict", "--level", "load") == 1      # no architecture
    assert run(path, "--strict", "--level", "parse") == 1
    out = capsys.readouterr().out
    assert "100 bytes follow the last tensor (note)" in out and "not UTF-8" in out
    assert run(path) == 0


def test_unknown_type_is_an_error(tmp_path, capsys):
    path = tmp_path / "m.gguf"
    formats.write(path, {}, {"a": np.zeros(8, np.float32)})
    data = bytearray(path.read_bytes())
    at = data.index(b"\1\0\0\0\x08" + bytes(7)) + 12
    for number, says in ((99, "type 99 is unknown"), (4, r"type 4 (Q4_2) was removed")):
        data[at] = number
        path.write_bytes(data)
        assert run(path, "--level", "parse") == 1
        assert says in capsys.readouterr().err


def test_json_and_many_files(tmp_path, capsys):
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    formats.write(good, {}, {})
    bad.write_bytes(good.read_bytes()[:10])
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    assert check.run(parser.parse_args([str(good), str(bad), str(tmp_path / "none"), "--json"])) == 1
    reports = json.loads(capsys.readouterr().out)["files"]
    assert [bool(r["errors"]) for r in reports] == [False, True, True]
    assert "offset 0x8" in reports[1]["errors"][0] and "No such file" in reports[2]["errors"][0]


HOSTILE = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "work": "{% for a in range(9999) %}{{ range(99999)|sum }}{% endfor %}",
    "memory": "{{ 'a' * 10**10 }}",
    "output": "{% for a in range(99999) %}{{ 'aaaaaaaaaa' * 100 }}{% endfor %}",
    "class": "{{ ''.__class__.__base__.__subclasses__() }}",
    "import": "{% import 'os' as os %}{{ os.system('true') }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "attr": "{{ ''|attr('format')('{0.__class__}') }}{{ undefined_thing.x.y }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "long": "x" * (1 << 20) + "y",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused_in_time(name):
    assert render.problem(HOSTILE[name])


def test_templates_are_tried_together():
    found = render.problems(["fine", "{{ x.y.z }}", "x" * (1 << 21), HOSTILE["work"], "fine too"])
    assert found[0] == "" and "UndefinedError" in found[1] and "limit" in found[2] and "does not finish" in found[3] and "not tried" in found[4]


def test_a_template_that_refuses_a_conversation_is_fine():
    assert render.problem("{{ raise_exception('system first') }}") == ""
    assert render.problem("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}") == ""


@pytest.mark.parametrize("template", ["{% generation %}{{ messages[1].content }}{% endgeneration %}",
                                      "{{ messages|tojson(ensure_ascii=false, indent=4) }}", "{{ strftime_now('%d %b %Y') }}"])
def test_templates_are_tried_as_the_chat_renders_them(template):
    from pyggml.chat import ChatTemplate
    assert render.problem(template) == "" and ChatTemplate(template).render(render.CONVERSATION)


def test_sound_numbers_of_every_layout_pass(tmp_path):
    path = tmp_path / "m.gguf"
    formats.write(path, {}, [new_tensor(name, np.zeros((1024, 1024 // BY_NAME[name].block * BY_NAME[name].bytes * 8), np.uint8), name)
                             for name in ("F32", "F16", "Q4_0", "Q4_K", "Q6_K")])
    file: TensorFile = formats.open(path, use_mmap=False)
    for tensor in file.tensors.values():
        assert numbers.first_bad(tensor) is None
