"""The files of 2023 before GGUF, as llama.cpp wrote them for llama models, read into the same TensorFile.

    magic      "lmgg" (ggml) | "fmgg" (ggmf), u32 version 1 | "tjgg" (ggjt), u32 version 1 to 3
    sizes      u32 n_vocab, n_embd, n_mult, n_head, n_layer, n_rot, file type
    tokens     n_vocab times: u32 length, bytes, f32 score (ggml files have no scores)
    tensors    to the end of the file: u32 n_dims, name length, type; u32 dims[] (innermost first); name; (ggjt: zeros up to a
               multiple of 32;) data

Always little-endian. What such a file does not say (context length, norm epsilon) gets the value that all its kind had.
Files up to ggjt 1 kept weights 2i and 2i+1 of a block in one byte, later ones i and i+16; up to ggjt 2 the scales of Q4_0, Q4_1 and
Q8_0 were f32. Both are brought into today's blocks here; the scales are rounded to f16, which a warning says. The ggml files of the
format's first day kept the scales of a row apart from its weights and look no different: they come out as noise.
Models of more than 7 billion weights were several files before ggjt, NAME, NAME.1, NAME.2 ...: each with the whole header and its part
of every matrix, some rows of it or some columns. They are opened together.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pyggml.errors import GGUFError
from pyggml.formats import show
from pyggml.formats.source import Source, is_address
from pyggml.formats.tensorfile import OpaqueType, Tensor, TensorFile, metadata
from pyggml.formats.values import Typed, printable
from pyggml.types import BY_ID, TensorType

MAGICS = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt"}
VERSIONS = {"ggml": (0,), "ggmf": (1,), "ggjt": (1, 2, 3)}
DATA_ALIGNMENT = 32                     # in ggjt files
CONTEXT, EPSILON = 2048, 5e-6           # not in the file: LLaMA's context; its epsilons were 1e-6 and (second version) 1e-5
MOST = {"n_vocab": 1 << 18, "n_embd": 1 << 20, "n_mult": 1 << 20, "n_head": 1 << 12, "n_layer": 1 << 10, "n_rot": 1 << 16}
_TOKEN, _NAME, _WINDOW = 4096, 256, 1 << 18
_VOCABULARY = 16 << 20                  # bytes of a file up to the end of its tokens

NAMES = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "output.weight": "output.weight"}
LAYER_NAMES = {"attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
               "attention_norm": "attn_norm", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
               "ffn_norm": "ffn_norm"}
SPLIT_BY_COLUMNS = ("token_embd", "attn_output", "ffn_down")       # of a model in several files; other matrices are split by rows
_LAYER = re.compile(r"layers\.(\d{1,4})\.(.+)\.weight")


def gguf_name(name: str) -> str | None:
    """Today's name of a tensor, "" for one that is not stored any more, None for one that no llama model has."""
    match = _LAYER.fullmatch(name)
    if match and match[2] in LAYER_NAMES:
        return f"blk.{int(match[1])}.{LAYER_NAMES[match[2]]}.weight"
    return "" if name.endswith("rope.freqs") else NAMES.get(name)


# ---- old blocks -----------------------------------------------------------------------------------------------------------------

def _f16_scales(count: int):
    """Blocks that begin with `count` f32 scales, with f16 scales."""
    def convert(blocks: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):            # a scale beyond f16 becomes infinite, which `check` reports
            scales = blocks[:, :4 * count].copy().view("<f4").astype("<f2")
        return np.concatenate([scales.view(np.uint8), blocks[:, 4 * count:]], 1)
    return convert


def _halves(start: int):
    """Blocks whose 16 bytes of nibbles from `start` hold weights 2i and 2i+1, with i and i+16 instead."""
    def convert(blocks: np.ndarray) -> np.ndarray:
        pairs = blocks[:, start:start + 16]
        weights = np.stack([pairs & 15, pairs >> 4], 2).reshape(len(blocks), 32)
        return np.concatenate([blocks[:, :start], weights[:, :16] | weights[:, 16:] << 4, blocks[:, start + 16:]], 1)
    return convert


# (ggjt version, 1 for files before it; type) -> bytes of an old block, and the steps that make it a block of today
OLD_BLOCKS = {
    (1, "Q4_0"): (20, (_halves(4), _f16_scales(1))), (2, "Q4_0"): (20, (_f16_scales(1),)),
    (1, "Q4_1"): (24, (_halves(8), _f16_scales(2))), (2, "Q4_1"): (24, (_f16_scales(2),)),
    (1, "Q5_0"): (22, (_halves(6),)), (1, "Q5_1"): (24, (_halves(8),)),
    (1, "Q8_0"): (36, (_f16_scales(1),)), (2, "Q8_0"): (36, (_f16_scales(1),)),
}


class OldTensor(Tensor):
    """A tensor whose blocks in the file are of an older layout; `raw`, `part` and `pieces` give today's."""

    def __init__(self, source: Source, name: str, type: TensorType, shape: tuple[int, ...], offset: int, version: int) -> None:
        self.old_bytes, self.steps = OLD_BLOCKS[version, type.name]
        self.type_bytes = type.bytes
        blocks = int(np.prod(shape[:-1], dtype=object)) * (shape[-1] // type.block)
        super().__init__(source, name, type, shape, offset, blocks * type.bytes)

    @property
    def mapped(self) -> bool:
        return False

    @property
    def rounded(self) -> bool:
        """Its scales are f32 in the file, which makes its blocks longer than today's."""
        return self.old_bytes > self.type_bytes

    @property
    def stored(self) -> np.ndarray:
        return self.source.array(self.offset, self.nbytes // self.type_bytes * self.old_bytes)

    def part(self, start: int, n: int) -> np.ndarray:
        first, count = start // self.type_bytes, n // self.type_bytes
        blocks = self.source.array(self.offset + first * self.old_bytes, count * self.old_bytes).reshape(count, self.old_bytes)
        for step in self.steps:
            blocks = step(blocks)
        return np.ascontiguousarray(blocks).reshape(-1)


class JoinedTensor(Tensor):
    """A matrix whose parts lie in several files, one after the other by rows or side by side (`columns`)."""

    def __init__(self, parts: list[Tensor], columns: bool) -> None:
        first, self.parts, self.columns = parts[0], parts, columns
        rows, width = first.shape
        shape = (rows, width * len(parts)) if columns else (rows * len(parts), width)
        super().__init__(first.source, first.name, first.type, shape, first.offset, sum(t.nbytes for t in parts))

    @property
    def mapped(self) -> bool:
        return False

    @property
    def stored(self) -> np.ndarray:
        return np.concatenate([t.stored for t in self.parts])

    def part(self, start: int, n: int) -> np.ndarray:
        each = self.parts[0].nbytes
        if not self.columns:
            spans = ((t, max(0, start - i * each), min(each, start + n - i * each)) for i, t in enumerate(self.parts))
            return np.concatenate([t.part(a, b - a) for t, a, b in spans if a < b])
        rows = self.shape[0]
        row, width = self.nbytes // rows, each // rows              # bytes of a row, and of its part in one file
        first, last = start // row, -(-(start + n) // row)
        whole = np.concatenate([t.part(first * width, (last - first) * width).reshape(-1, width) for t in self.parts], 1)
        return whole.reshape(-1)[start - first * row:][:n]


# ---- reading --------------------------------------------------------------------------------------------------------------------

class _Walk:
    """A checked walk through a file that reads a window at a time, so that tensor data is passed over unread."""

    def __init__(self, source: Source) -> None:
        self.source, self.pos, self.where = source, 0, "header"
        self._window, self._start = b"", 0

    def fail(self, text: str, pos: int | None = None) -> GGUFError:
        return GGUFError(f"{printable(self.source.name)}: offset 0x{self.pos if pos is None else pos:x}: {self.where}: {text}")

    def take(self, n: int, what: str) -> bytes:
        left = self.source.size - self.pos
        if n > left:
            raise self.fail(f"{what} needs {n} bytes, {left} are left in the file; it is cut short or damaged")
        window, at = self.window(n)
        self.pos += n
        return window[at:at + n]

    def window(self, n: int) -> tuple[bytes, int]:
        """A part of the file that holds the `n` bytes at `pos`, or all that are left, and where in it they are."""
        left = self.source.size - self.pos
        if not self._start <= self.pos <= self.pos + min(n, left) <= self._start + len(self._window):
            self._start, self._window = self.pos, self.source.array(self.pos, min(left, max(n, _WINDOW))).tobytes()
        return self._window, self.pos - self._start

    def u32(self, what: str, least: int = 0, most: int = 2 ** 32 - 1) -> int:
        value = int.from_bytes(self.take(4, what), "little")
        if not least <= value <= most:
            raise self.fail(f"{what} is {value}; it must be from {least} to {most}", self.pos - 4)
        return value


@dataclass(frozen=True)
class _Sizes:
    n_vocab: int
    n_embd: int
    n_mult: int
    n_head: int
    n_layer: int
    n_rot: int


class _Part(NamedTuple):
    """What one file holds."""

    walk: _Walk                             # stands at its end
    origin: str                             # kind and version
    sizes_at: int                           # where they lie in the file
    sizes: _Sizes
    file_type: int
    tokens: list[tuple[bytes, float]]
    tensors: dict[str, Tensor]

    @property
    def share(self) -> int:
        """Of how many files this is one, by the width of its embeddings; 1 where that is no whole number."""
        embedding = self.tensors.get("token_embd.weight")
        width = embedding.shape[-1] if embedding is not None and len(embedding.shape) == 2 else self.sizes.n_embd
        return self.sizes.n_embd // width if self.sizes.n_embd % width == 0 else 1


def read(source: Source, open_part: Callable[[str], Source] | None = None) -> TensorFile:
    """The llama model behind `source`, with today's names and metadata. GGUFError says what is wrong, or why it cannot be read.

    open_part: opens the other files of a model in several by their names; without, a part of one is refused.
    """
    first = _read_part(source)
    parts, tensors = [first], first.tensors
    if first.share > 1 and open_part is not None:
        stem = re.sub(r"\.\d{1,2}\Z", "", source.name) if re.search(r"\.[1-9]\d?\Z", source.name) else source.name
        names = [stem, *(f"{stem}.{i}" for i in range(1, first.share))]
        missing = [printable(name) for name in names if not is_address(name) and not os.path.exists(name)]      # a server says so itself
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            n_embd, first.walk.where = first.sizes.n_embd, "header"
            raise first.walk.fail(f"n_embd is {n_embd}, the embeddings have {n_embd // first.share} values: the file is damaged, "
                                  f"or one of {first.share} that make up the model, missing: {', '.join(missing[:3])}{more}", first.sizes_at + 4)
        parts = [first if name == source.name else _read_part(open_part(name)) for name in names]
        tensors = {name: _joined(name, parts) for name in parts[0].tensors}
    first = parts[0]
    first.walk.where = "model"
    kv = _metadata(first, tensors)
    rounded = sum(isinstance(t, OldTensor) and t.rounded for t in first.tensors.values())
    warnings = [f"{rounded} tensors have scales in f32; today's blocks hold them as f16, rounded to 11 bits"] if rounded else []
    return TensorFile([p.walk.source for p in parts], metadata(kv), tensors, format=first.origin, alignment=DATA_ALIGNMENT, warnings=warnings)


def _read_part(source: Source) -> _Part:
    w = _Walk(source)
    kind = MAGICS.get(w.take(4, "magic"))
    if kind is None:
        raise w.fail("the magic of the other parts of the model is not there", 0)
    w.where = f"header of a {kind} file"
    version = 0 if kind == "ggml" else w.u32("version")
    if version not in VERSIONS[kind]:
        raise w.fail(f"{kind} version is {version}; known are {', '.join(map(str, VERSIONS[kind]))}", 4)
    sizes_at = w.pos
    sizes = _Sizes(*(w.u32(name, 1, most) for name, most in MOST.items()))
    file_type = w.u32("file type")
    if sizes.n_embd % sizes.n_head:
        raise w.fail(f"n_embd is {sizes.n_embd}, which does not divide into {sizes.n_head} heads; is this a llama model?", sizes_at + 4)
    if sizes.n_rot > sizes.n_embd:
        raise w.fail(f"n_rot is {sizes.n_rot}; it must be at most n_embd, {sizes.n_embd}", sizes_at + 20)
    tokens = _read_tokens(w, sizes.n_vocab, scores=kind != "ggml")
    tensors: dict[str, Tensor] = {}
    seen: set[str] = set()
    while w.pos < source.size:
        start, (old_name, tensor) = w.pos, _read_tensor(w, kind, version)
        if old_name in seen:
            raise w.fail("the tensor appears twice", start)
        seen.add(old_name)
        if len(seen) > 16 * (sizes.n_layer + 1):
            raise w.fail(f"{len(seen)} tensors are too many for {sizes.n_layer} layers", start)
        if tensor is not None:
            tensors[tensor.name] = tensor
    return _Part(w, f"{kind} v{version}" if version else kind, sizes_at, sizes, file_type, tokens, tensors)


def _joined(name: str, parts: list[_Part]) -> Tensor:
    """The tensor `name` of a model in several files: a vector is whole in each of them, of a matrix each has a part."""
    first = parts[0].tensors[name]
    for part in parts:
        there = part.tensors.get(name)
        if there is None or (there.type, there.shape) != (first.type, first.shape) or (part.sizes, part.origin) != (parts[0].sizes, parts[0].origin):
            part.walk.where = f'tensor "{name}"'
            raise part.walk.fail(f"it is not as in {printable(first.source.name)}; the files are not parts of one model")
    if len(first.shape) < 2:
        return first
    return JoinedTensor([part.tensors[name] for part in parts], any(f".{stem}." in f".{name}" for stem in SPLIT_BY_COLUMNS))


def _read_tokens(w: _Walk, n: int, scores: bool) -> list[tuple[bytes, float]]:
    tokens: list[tuple[bytes, float]] = []
    length_at, score_at = struct.Struct("<I").unpack_from, struct.Struct("<f").unpack_from
    longest = 4 + _TOKEN + 4
    while len(tokens) < n:
        window, at = w.window(longest)
        start = at
        for i in range(len(tokens), n):             # tokens that lie whole in the window
            text_at = at + 4
            if at + longest > len(window) or (end := text_at + length_at(window, at)[0]) > text_at + _TOKEN:
                break
            # a file without scores has LLaMA's vocabulary, whose scores fall by one from token to token
            tokens.append((window[text_at:end], score_at(window, end)[0] if scores else float(min(0, 259 - i))))
            at = end + 4 if scores else end
        w.pos += at - start
        w.where = f"token {len(tokens)} of {n}"
        if w.pos > _VOCABULARY:
            raise w.fail(f"the vocabulary reaches beyond {_VOCABULARY} bytes; it is damaged")
        if at == start:                             # one near the end of the file, or a wrong one
            text = w.take(w.u32("length", most=_TOKEN), "text")
            tokens.append((text, score_at(w.take(4, "score"))[0] if scores else float(min(0, 259 - len(tokens)))))
    return tokens


def _read_tensor(w: _Walk, kind: str, version: int) -> tuple[str, Tensor | None]:
    """Name in the file and the tensor at the walk's position, which moves behind its data; None for one that GGUF does not keep."""
    w.where = "tensor"
    n_dims, length = w.u32("n_dims", 1, 4), w.u32("length of the name", 1, _NAME)
    number, type_at = w.u32("type"), w.pos - 4
    dims = [w.u32(f"dimension {i}", 1) for i in range(n_dims)]
    name = w.take(length, "name").decode("utf-8", "replace")
    w.where = f'tensor "{show.text(name)}"'
    new_name = gguf_name(name)
    if new_name is None:
        raise w.fail("no llama model has such a tensor, and only llama models can be read from files older than GGUF")
    row = BY_ID.get(number)
    if row is None or not row.ctype:
        raise w.fail(OpaqueType(number).why(), type_at)
    if dims[0] % row.block:
        raise w.fail(f"rows of {dims[0]} weights do not divide into {row.name} blocks of {row.block}", type_at + 4)
    if kind == "ggjt":
        w.take(-w.pos % DATA_ALIGNMENT, "padding")
    shape, start = tuple(dims[::-1]), w.pos
    tensor: Tensor
    layout = version if kind == "ggjt" else 1
    if (layout, row.name) in OLD_BLOCKS:
        old = OldTensor(w.source, new_name, row, shape, start, layout)
        tensor, size = old, old.nbytes // row.bytes * old.old_bytes
    else:
        size = row.row_bytes(dims[0])
        for n in dims[1:]:
            size *= n
        tensor = Tensor(w.source, new_name, row, shape, start, size)
    if size > w.source.size - start:
        raise w.fail(f"data of {size} bytes ends {start + size - w.source.size} bytes past the end of the file; the file is incomplete or damaged")
    w.pos = start + size
    return name, tensor if tensor.name else None


def _metadata(part: _Part, tensors: dict[str, Tensor]) -> dict[str, Typed]:
    """The metadata that a GGUF file of this model has."""
    w, s, origin = part.walk, part.sizes, part.origin
    for name in ("token_embd.weight", "blk.0.ffn_gate.weight", "blk.0.attn_k.weight"):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise w.fail(f'tensor "{name}" is missing or not a matrix; only llama models can be read from {origin} files')
    if tensors["token_embd.weight"].shape[-1] != s.n_embd:
        raise w.fail(f"its embeddings have {tensors['token_embd.weight'].shape[-1]} of {s.n_embd} values: the file is damaged, or one of several "
                     "that make up the model; put them beside each other under their old names, NAME, NAME.1 and so on")
    texts, kinds = zip(*(_token(i, text) for i, (text, _) in enumerate(part.tokens)), strict=True)
    head = s.n_embd // s.n_head
    u32 = {"context_length": CONTEXT, "embedding_length": s.n_embd, "block_count": s.n_layer,
           "feed_forward_length": tensors["blk.0.ffn_gate.weight"].shape[0], "rope.dimension_count": s.n_rot,
           "attention.head_count": s.n_head, "attention.head_count_kv": max(1, tensors["blk.0.attn_k.weight"].shape[0] // head)}
    return {
        "general.architecture": Typed("str", "llama"), "general.description": Typed("str", f"converted from a {origin} file"),
        "general.file_type": Typed("u32", part.file_type), **{f"llama.{name}": Typed("u32", value) for name, value in u32.items()},
        "llama.attention.layer_norm_rms_epsilon": Typed("f32", EPSILON),
        "tokenizer.ggml.model": Typed("str", "llama"), "tokenizer.ggml.tokens": Typed("str[]", list(texts)),
        "tokenizer.ggml.scores": Typed("f32[]", np.array([score for _, score in part.tokens], "<f4")),
        "tokenizer.ggml.token_type": Typed("i32[]", np.array(kinds, "<i4")),
        **{f"tokenizer.ggml.{name}_token_id": Typed("u32", i) for i, name in enumerate(("unknown", "bos", "eos"))},
    }


_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_SPECIAL = {0: ("<unk>", _UNKNOWN), 1: ("<s>", _CONTROL), 2: ("</s>", _CONTROL)}
_BYTE_TOKENS = range(3, 259)            # LLaMA's vocabulary: the 256 bytes follow the three special tokens


def _token(i: int, text: bytes) -> tuple[str, int]:
    """Text and type of a token as GGUF has them: bytes as <0x0A>, blanks as U+2581."""
    if i in _SPECIAL:
        return _SPECIAL[i]
    if not text:
        return "", _CONTROL
    if i in _BYTE_TOKENS and len(text) == 1:
        return f"<0x{text[0]:02X}>", _BYTE
    return text.decode("utf-8", "surrogateescape").replace(" ", "\u2581"), _NORMAL
