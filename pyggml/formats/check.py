"""What is wrong, odd or missing in a model file, as a list of findings.

Opening a file already proves its structure (gguf.py). On top of that a finding belongs to a level, at which it is an error; below it
is a warning: `parse` (structure), `validate` (every number), `load` (whether a program can make sense of it).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml.formats import keys, numbers, render, show
from pyggml.formats.tensorfile import PIECE, OpaqueType, Tensor, TensorFile
from pyggml.formats.values import StringArray, printable

LEVELS = ("parse", "validate", "load")
NOTE = "note"               # never an error


@dataclass(frozen=True)
class Finding:
    level: str              # from which level on this is an error; "note": it never is
    text: str

    def is_error(self, level: str) -> bool:
        return self.level != NOTE and LEVELS.index(self.level) <= LEVELS.index(level)


def check(file: TensorFile, level: str = "validate") -> list[Finding]:
    """Findings in a file that opened, up to what `level` looks at."""
    rules = [structure, space, texts, metadata, tokenizer, template, layers, shapes]
    if level != "parse":
        rules.append(values)
    return [finding for rule in rules for finding in rule(file)]


_NAMED = re.compile(r'(key|tensor) "([^"]*)"')


def placer(file: TensorFile) -> Callable[[str], str]:
    """A function that puts before a sentence about a key or tensor of a GGUF file its place; for a missing one, that is where the keys end."""
    if not file.format.startswith("GGUF"):
        return lambda text: text
    keys_at = {printable(key): file.kv.entry(key).start for key in file.kv}
    tensors_at = {printable(t.name): t.offset for t in file.tensors.values()}
    end = max((file.kv.entry(key).end for key in file.kv), default=0)

    def placed(text: str) -> str:
        if text.startswith("offset "):
            return text
        match = _NAMED.search(text)
        if match:
            at = (tensors_at if match[1] == "tensor" else keys_at).get(match[2], end)
            return f"offset 0x{at:x}: {text}"
        named = max((key for key in keys_at if key in text), key=len, default=None)
        return text if named is None else f"offset 0x{keys_at[named]:x}: {text}"

    return placed


def structure(file: TensorFile) -> Iterator[Finding]:
    for t in file.tensors.values():
        if isinstance(t.type, OpaqueType):
            yield Finding("parse", f"offset 0x{t.type.at:x}: tensor \"{printable(t.name)}\": {t.type.why()}")
    for warning in file.warnings:
        if not warning.startswith("tensor "):
            yield Finding(NOTE, warning)


def space(file: TensorFile) -> Iterator[Finding]:
    """Bytes that belong to nothing; only GGUF says where its tensors lie."""
    for source in file.sources if file.format.startswith("GGUF") else ():
        tensors = sorted((t for t in file.tensors.values() if t.source is source), key=lambda t: t.offset)
        if not tensors:
            continue
        end = file.data_offset if source is file.sources[0] else tensors[0].offset
        for t in tensors:
            gap = t.offset - end
            if gap >= file.alignment:
                yield Finding(NOTE, f'offset 0x{end:x}: {gap} unused bytes before tensor "{printable(t.name)}"')
            end = t.offset + t.nbytes
        left = source.size - end
        if left >= file.alignment:
            yield Finding(NOTE, f"offset 0x{end:x}: {left} bytes follow the last tensor")
        elif end % file.alignment and not left:
            yield Finding(NOTE, f"offset 0x{end:x}: the last tensor is not padded to the alignment {file.alignment}")


def texts(file: TensorFile) -> Iterator[Finding]:
    """Text that is not UTF-8."""
    for key in file.kv:
        if file.kv.type(key) not in ("str", "str[]"):
            continue
        value = file.kv[key]
        runs = [value] if isinstance(value, str) else ("".join(run) for run in value.runs()) if isinstance(value, StringArray) else map(str, value)
        if not all(map(_is_text, runs)):
            yield Finding(NOTE, f'key "{printable(key)}": text that is not UTF-8; other programs may show it wrongly')


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def metadata(file: TensorFile) -> Iterator[Finding]:
    """Known keys with a wrong type or a value that makes no sense; what every program needs and is not there."""
    for key in file.kv:
        if keys.known(key) and (problem := keys.problem(key, file.kv.typed_value(key))):
            yield Finding("load", problem)
    arch = _text(file, "general.architecture")
    if not arch and file.tensors:
        yield Finding("load", 'key "general.architecture" is missing; no program can tell what the tensors are for')
    if arch and f"{arch}.block_count" in file.kv:
        for name in ("context_length", "embedding_length", "attention.head_count"):
            if f"{arch}.{name}" not in file.kv:
                yield Finding(NOTE, f'key "{printable(arch)}.{name}" is missing')
    used, experts = (_number(file, f"{arch}.{name}") for name in ("expert_used_count", "expert_count"))
    if used is not None and used > (experts or 0):
        yield Finding("load", f'key "{printable(arch)}.expert_used_count" is {used}, there are {experts or 0} experts')
    heads, kv_heads = (_number(file, f"{arch}.attention.{name}") for name in ("head_count", "head_count_kv"))
    recurrent = any(key.startswith((f"{arch}.ssm.", f"{arch}.wkv.")) for key in file.kv)      # such files may say that they have no heads
    if (0 in (heads, kv_heads) and not recurrent) or (heads and kv_heads and heads % kv_heads):
        yield Finding("load", f'key "{printable(arch)}.attention.head_count_kv": {heads} attention heads cannot share {kv_heads} key-value heads')


def _text(file: TensorFile, key: str) -> str:
    value = file.kv.get(key)
    return value if isinstance(value, str) else ""


def _number(file: TensorFile, key: str) -> int | None:
    value = file.kv.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


TOKENS = "tokenizer.ggml.tokens"
NO_TOKENIZER = ("none", "no_vocab")
TOKENIZERS = ("llama", "gpt2", "bert", "t5", "gemma4", "rwkv", "plamo2", "hybriddna", "whitespace", "test")       # those of llama.cpp
MOST_TOKENS = 1 << 20
BYTE_TYPE = 6
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


def tokenizer(file: TensorFile) -> Iterator[Finding]:
    kv, model = file.kv, _text(file, "tokenizer.ggml.model")
    embedding = file.tensors.get("token_embd.weight")
    if "tokenizer.ggml.model" not in kv and embedding is not None:
        yield Finding(NOTE, 'key "tokenizer.ggml.model" is missing: the file has no tokenizer')
    if not isinstance(kv.get("tokenizer.ggml.model"), str) or model in NO_TOKENIZER:
        return
    if model not in TOKENIZERS:
        yield Finding("load", f'key "tokenizer.ggml.model" is "{show.text(model)}"; known are {", ".join(TOKENIZERS)} and {NO_TOKENIZER[0]}')
        return
    tokens = kv.get(TOKENS)
    if not isinstance(tokens, StringArray | list) or kv.type(TOKENS) != "str[]" or not len(tokens):
        yield Finding("load", f'key "{TOKENS}" is missing or empty; the tokenizer "{printable(model)}" needs it')
        return
    if len(tokens) > MOST_TOKENS:
        yield Finding("load", f'key "{TOKENS}" has {len(tokens)} elements; no vocabulary has more than {MOST_TOKENS}')
        return
    for name in ("scores", "token_type"):
        values = kv.get(f"tokenizer.ggml.{name}")
        if isinstance(values, np.ndarray) and len(values) != len(tokens):
            yield Finding("load", f'key "tokenizer.ggml.{name}" has {len(values)} elements for {len(tokens)} tokens')
    if model == "llama" and "tokenizer.ggml.scores" not in kv:
        yield Finding("load", 'key "tokenizer.ggml.scores" is missing; the tokenizer "llama" needs it')
    if model == "gpt2" and "tokenizer.ggml.merges" not in kv:
        yield Finding("load", 'key "tokenizer.ggml.merges" is missing; the tokenizer "gpt2" needs it')
    for key in kv:
        number = _number(file, key)
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and number is not None and number >= len(tokens):
            yield Finding("load", f'key "{printable(key)}" is {number}, there are {len(tokens)} tokens')
    words = list(tokens)
    kinds = kv.get("tokenizer.ggml.token_type")
    if model == "llama" and isinstance(kinds, np.ndarray):
        bad = [i for i in (kinds == BYTE_TYPE).nonzero()[0] if i < len(words) and not _BYTE_TOKEN.fullmatch(words[i])]
        if bad:
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            yield Finding("load", f'key "{TOKENS}": byte token {bad[0]} is "{printable(words[bad[0]])[:40]}"{more}; it must be like <0x0A>')
    if len(set(words)) < len(words):
        yield Finding(NOTE, f'key "{TOKENS}": {len(words) - len(set(words))} tokens appear more than once')
    if embedding is not None and len(embedding.shape) == 2:
        if embedding.shape[0] < len(tokens):
            yield Finding("load", f'tensor "token_embd.weight" has {embedding.shape[0]} rows for {len(tokens)} tokens')
        size_key = f"{_text(file, 'general.architecture')}.vocab_size"
        size = _number(file, size_key)
        if size not in (None, embedding.shape[0]):
            yield Finding(NOTE, f'key "{printable(size_key)}" is {size}, tensor "token_embd.weight" has {embedding.shape[0]} rows')


def template(file: TensorFile) -> Iterator[Finding]:
    named = [key for key in file.kv if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template.")]
    templates = {key: file.kv[key] for key in named if file.kv.type(key) == "str"}
    for key, problem in zip(templates, render.problems(list(templates.values())) if templates else [], strict=True):
        if problem:
            yield Finding("load", f'key "{printable(key)}": the template does not render: {printable(problem)}')


_LAYER = re.compile(r"blk\.(\d{1,9})\.")


def layers(file: TensorFile) -> Iterator[Finding]:
    """The layers that are declared are the layers that are there."""
    arch = _text(file, "general.architecture")
    declared = _number(file, f"{arch}.block_count")
    found = {int(m[1]) for name in file.tensors if (m := _LAYER.match(name))}
    if declared is None or not found:
        return
    missing = next((i for i in range(min(declared, max(found) + 2)) if i not in found), None)
    if max(found) >= declared or missing is not None:
        detail = f"layer {missing} has no tensors" if missing is not None else f"there are tensors of layer {max(found)}"
        yield Finding("load", f'key "{printable(arch)}.block_count" declares {declared} layers, but {detail}')


# Shapes of a plain decoder, rows first. Names are sizes: E embedding, F feed-forward, G twice that,
# Q and K and V rows of the projections, A of all three, H a head, M heads, X experts, N and S feed-forward of
# an expert and of the shared one
SHAPES = {
    "attn_norm.weight": "E", "ffn_norm.weight": "E", "post_attention_norm.weight": "E", "post_ffw_norm.weight": "E",
    "attn_q_norm.weight": "H", "attn_k_norm.weight": "H", "attn_q.weight": "QE", "attn_k.weight": "KE", "attn_v.weight": "VE",
    "attn_output.weight": "EO", "attn_qkv.weight": "AE", "attn_q.bias": "Q", "attn_k.bias": "K", "attn_v.bias": "V",
    "ffn_gate.weight": "FE", "ffn_up.weight": "FE", "ffn_down.weight": "EF", "ffn_gate_inp.weight": "XE",
    "ffn_gate_exps.weight": "XFE", "ffn_up_exps.weight": "XFE", "ffn_down_exps.weight": "XEF",
    "ffn_gate_shexp.weight": "SE", "ffn_up_shexp.weight": "SE", "ffn_down_shexp.weight": "ES", "ffn_gate_inp_shexp.weight": "E",
}
EXPERTS = {**SHAPES, "ffn_gate_exps.weight": "XNE", "ffn_up_exps.weight": "XNE", "ffn_down_exps.weight": "XEN"}
BIASES = {"attn_output.bias": "E", "ffn_gate_inp.bias": "X", "ffn_gate_exps.bias": "XN", "ffn_up_exps.bias": "XN", "ffn_down_exps.bias": "XE"}
PLAIN = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "granite", "granitemoe", "minicpm", "smollm3", "exaone4")
DECODERS = {**dict.fromkeys(PLAIN, SHAPES), **dict.fromkeys(("qwen2moe", "qwen3moe"), EXPERTS), "phi3": {**SHAPES, "ffn_up.weight": "GE"},
            "gpt-oss": {**EXPERTS, **BIASES, "attn_sinks.weight": "M"},
            "olmo2": {**SHAPES, "attn_q_norm.weight": "Q", "attn_k_norm.weight": "K"}}


def shapes(file: TensorFile) -> Iterator[Finding]:
    """Tensor shapes against what the metadata declares, for architectures whose shapes are plain."""
    arch = _text(file, "general.architecture")
    if arch not in DECODERS:
        return
    embedding, heads = _number(file, f"{arch}.embedding_length"), _number(file, f"{arch}.attention.head_count")
    if not embedding or not heads:
        return
    kv_heads = _number(file, f"{arch}.attention.head_count_kv") or heads
    key = _number(file, f"{arch}.attention.key_length") or embedding // heads
    value = _number(file, f"{arch}.attention.value_length") or embedding // heads
    feed = _number(file, f"{arch}.feed_forward_length")
    sizes = {"E": embedding, "Q": heads * key, "K": kv_heads * key, "V": kv_heads * value, "O": heads * value, "H": key, "M": heads,
             "A": (heads + kv_heads) * key + kv_heads * value, "F": feed, "G": feed and 2 * feed, "X": _number(file, f"{arch}.expert_count"),
             "N": _number(file, f"{arch}.expert_feed_forward_length"), "S": _number(file, f"{arch}.expert_shared_feed_forward_length")}
    for t in file.tensors.values():
        pattern = DECODERS[arch].get(_LAYER.sub("", t.name)) if _LAYER.match(t.name) else {"output_norm.weight": "E"}.get(t.name)
        if t.name in ("token_embd.weight", "output.weight") and t.shape[-1:] != (embedding,):
            yield Finding("load", _shape_text(t, ("tokens", embedding)))
        if pattern:
            expected = tuple(sizes[c] for c in pattern)
            if len(t.shape) != len(expected) or any(e is not None and e != n for e, n in zip(expected, t.shape, strict=True)):
                yield Finding("load", _shape_text(t, expected))


def _shape_text(t: Tensor, expected: tuple[Any, ...]) -> str:
    by = " x ".join("any" if n is None else str(n) for n in expected)
    return f'offset 0x{t.offset:x}: tensor "{printable(t.name)}" is {show.shape(t)}; the metadata asks for {by}'


def values(file: TensorFile) -> Iterator[Finding]:
    """NaN and infinity among weights and scales: the first of each tensor. Large tensors are read side by side, small ones many at once."""
    runs = list(numbers.runs(file.tensors.values()))
    found, large = {}, iter([run[0] for run in runs if run[0].nbytes > PIECE])

    def take(_: int) -> None:
        for t in large:
            if (bad := numbers.first_bad(t)) is not None:
                found[t.name] = bad

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        try:
            list(pool.map(take, range(threads)))
        finally:
            list(large)                 # an error or Ctrl-C leaves nothing for the other threads
    for run in runs:                    # in this thread: the others would only wait for the interpreter
        if run[0].nbytes <= PIECE:
            found.update((t.name, bad) for t, bad in numbers.bad_ones(run))
    for t in file.tensors.values():
        if (bad := found.get(t.name)) is None or isinstance(t.type, OpaqueType):
            continue
        row_blocks = max(1, t.shape[-1] // t.type.block if t.shape else 1)
        row, block = divmod(bad.block, row_blocks)
        what = f"block {block}: {bad.field}" if bad.field else f"weight {block}"
        yield Finding("validate", f'offset 0x{t.offset + bad.block * t.type.bytes:x}: tensor "{printable(t.name)}": '
                                  f"row {row}, {what} is {bad.value}")
