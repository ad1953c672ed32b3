"""Writes a model of a given shape with random weights: speed does not care what the weights are.

    python tools/bench/random_model.py tinyllama-1.1b Q4_K_M /tmp/tinyllama-q4_k_m.gguf

Blocks are random bytes under scales that give every matrix row the norm of a trained one, so that activations and logits stay
finite. The tensor types are those llama-quantize chooses; the vocabulary is a working SPM one. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, islice, product
from pathlib import Path
from string import ascii_lowercase, punctuation

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.formats import NewTensor, Typed, new_tensor, write
from pyggml.quants import dequantize
from pyggml.types import TensorType, tensor_type

CHUNK = 8 << 20                # bytes made at a time


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. Gemma's output is its token table; `keys` are what an architecture has beside the sizes."""

    layers: int
    dim: int
    ff: int
    heads: int
    kv_heads: int
    vocab: int
    context: int = 4096
    rope_base: float = 10000.0
    arch: str = "llama"
    head: int = 0              # 0: dim / heads
    keys: tuple[tuple[str, int | float], ...] = ()

    @property
    def head_dim(self) -> int:
        return self.head or self.dim // self.heads


POST_NORMS, HEAD_NORMS = ("post_attention_norm", "post_ffw_norm"), ("attn_q_norm", "attn_k_norm")
NORMS = {"gemma2": POST_NORMS, "gemma3": (*POST_NORMS, *HEAD_NORMS)}           # beside those before attention and feed-forward
SHAPES = {
    "tiny": Shape(2, 256, 512, 4, 2, 512),
    "small-110m": Shape(12, 768, 2048, 12, 12, 32000),
    "tinyllama-1.1b": Shape(22, 2048, 5632, 32, 4, 32000, context=8192),
    "llama2-7b": Shape(32, 4096, 11008, 32, 32, 32000),
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, 128256, context=8192, rope_base=500000.0),
    "gemma2-2b": Shape(26, 2304, 9216, 8, 4, 256000, context=8192, arch="gemma2", head=256,
                       keys=(("attention.sliding_window", 4096), ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))),
    "gemma3-4b": Shape(34, 2560, 10240, 8, 4, 262144, context=131072, rope_base=1e6, arch="gemma3", head=256,
                       keys=(("attention.sliding_window", 1024), ("rope.scaling.factor", 8.0))),
}


@dataclass(frozen=True)
class Mix:
    """Tensor types of a file as llama-quantize chooses them. `better` takes the place of `base` in attn_v and ffn_down of some layers."""

    file_type: int             # general.file_type
    base: str
    output: str
    better: str = ""


MIXES = {
    "F16": Mix(1, "F16", "F16"),
    "Q4_0": Mix(2, "Q4_0", "Q6_K"),
    "Q4_1": Mix(3, "Q4_1", "Q6_K"),
    "Q8_0": Mix(7, "Q8_0", "Q8_0"),
    "Q5_0": Mix(8, "Q5_0", "Q6_K"),
    "Q5_1": Mix(9, "Q5_1", "Q6_K"),
    "Q4_K_M": Mix(15, "Q4_K", "Q6_K", "Q6_K"),
    "Q5_K_M": Mix(17, "Q5_K", "Q6_K", "Q6_K"),
    "Q6_K": Mix(18, "Q6_K", "Q6_K"),
    "BF16": Mix(32, "BF16", "BF16"),
}


def gets_better_type(layer: int, layers: int) -> bool:
    """The layers whose attn_v and ffn_down have more bits in an _M mix: the first and last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True)
class Matrix:
    """A weight: numpy shape (rows, columns), tensor type name, standard deviation of an entry."""

    name: str
    shape: tuple[int, int]
    type: str
    std: float


def matrices(shape: Shape, mix: Mix) -> Iterator[Matrix]:
    """Every matrix of the model in file order. Entries scale with 1/sqrt(columns), so that outputs are about as large as inputs."""
    q, kv = shape.head_dim * shape.heads, shape.head_dim * shape.kv_heads
    of_output = mix.output, 3 * shape.dim**-0.5                 # 3: logits spread as a trained model's
    if shape.arch == "llama":
        yield Matrix("output.weight", (shape.vocab, shape.dim), *of_output)
        yield Matrix("token_embd.weight", (shape.vocab, shape.dim), mix.base, 1.0)
    else:
        yield Matrix("token_embd.weight", (shape.vocab, shape.dim), *of_output)
    parts = {"attn_q": (q, shape.dim), "attn_k": (kv, shape.dim), "attn_v": (kv, shape.dim), "attn_output": (shape.dim, q),
             "ffn_gate": (shape.ff, shape.dim), "ffn_up": (shape.ff, shape.dim), "ffn_down": (shape.dim, shape.ff)}
    for layer in range(shape.layers):
        better = mix.better and gets_better_type(layer, shape.layers)
        for part, (rows, columns) in parts.items():
            type = mix.better if better and part in ("attn_v", "ffn_down") else mix.base
            yield Matrix(f"blk.{layer}.{part}.weight", (rows, columns), type, columns**-0.5)


def norms(shape: Shape) -> Iterator[tuple[str, np.ndarray]]:
    for layer in range(shape.layers):
        for part in ("attn_norm", "ffn_norm", *NORMS.get(shape.arch, ())):
            yield f"blk.{layer}.{part}.weight", np.ones(shape.head_dim if part in HEAD_NORMS else shape.dim, np.float32)
    yield "output_norm.weight", np.ones(shape.dim, np.float32)


def random_floats(row: TensorType, n: int, std: float, rng: np.random.Generator) -> np.ndarray:
    """n numbers of an unblocked type, uniform around 0."""
    numbers = np.frombuffer(rng.bytes(2 * n), np.int16).astype(np.float32) * np.float32(std * 3**0.5 / 2**15)
    if row.name == "BF16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return numbers.astype(row.layout)


def scale_fields(row: TensorType) -> tuple[str, str | None]:
    """The fields of a block that hold its scale and its offset (None where there is none)."""
    fields = row.layout.names or ()
    if "d" not in fields:
        raise PyggmlError(f"random blocks of {row} would have random scales; choose one of {', '.join(MIXES)}")
    return "d", next((f for f in ("dmin", "m") if f in fields), None)


@cache
def unit_scales(row: TensorType) -> tuple[float, float]:
    """(scale, offset) under which blocks of random bytes decode to numbers of mean 0 and standard deviation 1; offset is 0 without one."""
    d, offset = scale_fields(row)
    blocks = np.frombuffer(np.random.default_rng(0).bytes(512 * row.bytes), row.layout).copy()

    def decoded(scale: float, shift: float) -> np.ndarray:
        blocks[d] = scale
        if offset:
            blocks[offset] = shift
        return dequantize(blocks.view(np.uint8).reshape(1, -1), row.name)

    shift = -decoded(1, 0).mean() / decoded(0, 1).mean() if offset else 0.0
    scale = 1 / decoded(1, shift).std()
    return float(scale), float(scale * shift)


def random_blocks(row: TensorType, n: int, std: float, rng: np.random.Generator) -> np.ndarray:
    """n weights of a block type. Scales vary by half around their mean; where there is no offset their sign varies too."""
    d, offset = scale_fields(row)
    scale, shift = unit_scales(row)
    blocks = np.frombuffer(bytearray(rng.bytes(n // row.block * row.bytes)), row.layout)
    sizes = std * rng.uniform(0.5, 1.5, len(blocks))
    if offset:
        blocks[offset] = sizes * shift
    else:
        sizes *= rng.choice((-1, 1), len(blocks))
    blocks[d] = sizes * scale
    return blocks


def random_tensor(matrix: Matrix, seed: int) -> NewTensor:
    """The tensor of a matrix, made piece by piece while it is written."""
    row, (rows, columns) = tensor_type(matrix.type), matrix.shape
    make: Callable = random_blocks if row.quantized else random_floats
    step = max(1, CHUNK // row.row_bytes(columns))

    def pieces() -> Iterator[np.ndarray]:
        rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(matrix.name.encode())]))
        for start in range(0, rows, step):
            yield make(row, min(step, rows - start) * columns, matrix.std, rng).view(np.uint8)

    return new_tensor(matrix.name, pieces, matrix.type, matrix.shape)


def pieces_of_text() -> Iterator[str]:
    """Endless distinct vocabulary pieces: signs and digits, then all words of one letter, two letters, ..., each also after a space."""
    yield from ("▁", *punctuation, *"0123456789", *ascii_lowercase.upper())
    for length in count(1):
        for letters in product(ascii_lowercase, repeat=length):
            yield "".join(letters)
            yield "▁" + "".join(letters)


def vocabulary(size: int) -> dict[str, Typed]:
    """Metadata of an SPM vocabulary: unknown, begin and end, the 256 bytes, pieces of text with falling scores."""
    normal, unknown, control, byte = 1, 2, 3, 6
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [unknown, control, control] + [byte] * 256
    n_text = size - len(tokens)
    tokens += islice(pieces_of_text(), n_text)
    return {"tokenizer.ggml.model": Typed("str", "llama"), "tokenizer.ggml.pre": Typed("str", "default"),
            "tokenizer.ggml.tokens": Typed("str[]", tokens),
            "tokenizer.ggml.scores": Typed("f32[]", np.r_[np.zeros(len(types)), -np.arange(n_text)].astype(np.float32)),
            "tokenizer.ggml.token_type": Typed("i32[]", np.array(types + [normal] * n_text, np.int32)),
            "tokenizer.ggml.bos_token_id": Typed("u32", 1), "tokenizer.ggml.eos_token_id": Typed("u32", 2),
            "tokenizer.ggml.unknown_token_id": Typed("u32", 0), "tokenizer.ggml.add_bos_token": Typed("bool", True),
            "tokenizer.ggml.add_eos_token": Typed("bool", False)}


def metadata(shape: Shape, mix: Mix, name: str) -> dict[str, Typed]:
    numbers = {"context_length": shape.context, "embedding_length": shape.dim, "block_count": shape.layers, "feed_forward_length": shape.ff,
               "attention.head_count": shape.heads, "attention.head_count_kv": shape.kv_heads,
               "rope.dimension_count": shape.head_dim, "vocab_size": shape.vocab}
    if shape.head:
        numbers |= {"attention.key_length": shape.head, "attention.value_length": shape.head}
    own = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": shape.rope_base, **dict(shape.keys)}
    return {"general.architecture": Typed("str", shape.arch), "general.name": Typed("str", name),
            "general.file_type": Typed("u32", mix.file_type), "general.quantization_version": Typed("u32", 2),
            **{f"{shape.arch}.{key}": Typed("u32", value) for key, value in numbers.items()},
            **{f"{shape.arch}.{key}": Typed("f32" if isinstance(value, float) else "u32", value) for key, value in own.items()},
            **vocabulary(shape.vocab)}


def write_random_model(path: str | Path, shape: Shape | str, mix: Mix | str, seed: int = 0) -> None:
    """Write a random model; `shape` and `mix` by value or by name."""
    name = f"random {shape} {mix}" if isinstance(shape, str) else "random"
    shape, mix = SHAPES[shape] if isinstance(shape, str) else shape, MIXES[mix] if isinstance(mix, str) else mix
    tensors = [*(random_tensor(m, seed) for m in matrices(shape, mix)), *(new_tensor(n, values) for n, values in norms(shape))]
    write(path, metadata(shape, mix, name), tensors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("mix", choices=MIXES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    write_random_model(options.out, options.shape, options.mix, options.seed)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
