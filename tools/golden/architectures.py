"""Writes tests/golden/models/ARCHITECTURE.TYPE.gguf, tiny models with seeded random weights, and llama.cpp's logits for them.

    python tools/golden/architectures.py LOGITS LOGITS_EXACT [NAME...]

LOGITS is tools/golden/logits.c, built with llama.cpp. LOGITS_EXACT is the same program with a llama.cpp whose GELU is computed in floats:
ggml-cpu's vec.h without the line that defines GGML_GELU_FP16, which looks the values up in a table of halves.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyggml import formats, quants
from pyggml.formats import Typed

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "bench"))

from random_model import vocabulary  # noqa: E402

FOLDER = ROOT / "tests" / "golden" / "models"
N_TOKENS, VOCAB, DIM, FF = 48, 272, 32, 64
ROUTER = "ffn_gate_inp"                     # stays in floats, as llama-quantize leaves it
PRE_NORMS, POST_NORMS, HEAD_NORMS = ("attn_norm", "ffn_norm"), ("post_attention_norm", "post_ffw_norm"), ("attn_q_norm", "attn_k_norm")
QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Tiny:
    """A model: its architecture, the type of its matrices, and what its keys and layers have beyond the common."""

    arch: str
    type: str
    layers: int = 2
    keys: dict[str, Any] = field(default_factory=dict)
    norms: tuple[str, ...] = PRE_NORMS
    wide_norms: bool = False                           # those of heads are of all of them together
    continuation: int = 32
    heads: tuple[int, int, int] = (3, 1, 32)           # of queries, of keys and values; size
    merged: bool = False                               # q, k and v are one matrix, gate and up another
    experts: int = 0                                   # two of them are used; in place of the feed-forward
    shared: int = 0                                    # feed-forward of an expert that every token takes
    biases: tuple[str, ...] = ()
    sinks: bool = False
    output: bool = False                               # the output is a matrix of its own
    factors: int = 0                                   # numbers that divide so many frequencies, for short and for long contexts


MODELS = {
    "gemma.f16": Tiny("gemma", "F16"),
    # a window that the text outgrows; caps that are felt
    "gemma2.q8_0": Tiny("gemma2", "Q8_0", 3, {"attention.sliding_window": 16, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0},
                        PRE_NORMS + POST_NORMS, continuation=16),
    # a window that the continuation outgrows; two bases, and a factor that only the sixth layer has
    "gemma3.q4_0": Tiny("gemma3", "Q4_0", 7, {"attention.sliding_window": 52, "rope.freq_base": 1e6, "rope.scaling.type": "linear",
                                              "rope.scaling.factor": 8.0}, PRE_NORMS + POST_NORMS + HEAD_NORMS, continuation=16),
    # part of a head turns, slowed by the factors for a context beyond the original one
    "phi3.q4_1": Tiny("phi3", "Q4_1", 2, {"rope.dimension_count": 12, "rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.2},
                      heads=(2, 1, 16), merged=True, factors=6),
    "smollm3.iq4_nl": Tiny("smollm3", "IQ4_NL", 4, heads=(2, 1, 16), continuation=16),
    "granite.q8_0": Tiny("granite", "Q8_0", 2, {"embedding_scale": 3.0, "residual_scale": 0.5, "attention.scale": 0.15, "logit_scale": 1.2},
                         heads=(2, 1, 16), continuation=16),
    # one layer with a window, and one that YaRN is for
    "olmo2.bf16": Tiny("olmo2", "BF16", 2, {"attention.sliding_window": 16, "attention.sliding_window_pattern": 2, "rope.scaling.type": "yarn",
                                            "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
                       POST_NORMS + HEAD_NORMS, wide_norms=True, heads=(2, 1, 16), output=True),
    "qwen2moe.q5_0": Tiny("qwen2moe", "Q5_0", 2, {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 96}, heads=(2, 1, 16),
                          experts=4, shared=96, biases=QKV, output=True, continuation=16),
    "gpt-oss.mxfp4": Tiny("gpt-oss", "MXFP4", 2, {"expert_feed_forward_length": 32, "attention.sliding_window": 16, "rope.scaling.type": "yarn",
                                                  "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
                          ("attn_norm", "post_attention_norm"), experts=5, sinks=True, output=True, continuation=16,
                          biases=(*QKV, "attn_output", ROUTER, "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")),
    "qwen3moe.q5_1": Tiny("qwen3moe", "Q5_1", 2, {"expert_feed_forward_length": 32}, PRE_NORMS + HEAD_NORMS, experts=6, continuation=16),
}


def tensors(name: str, m: Tiny) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight as floats: norms around 1, scores and logits with a standard deviation of about 3."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))

    def matrix(rows: int, columns: int, gain: float = 1.0, experts: int = 1) -> np.ndarray:
        values = gain * columns**-0.5 * rng.standard_normal((experts, rows, columns), dtype=np.float32)
        return values if experts > 1 else values[0]

    def norm(size: int | tuple[int, ...], around: float = 1.0) -> np.ndarray:
        return (around + 0.3 * rng.standard_normal(size)).astype(np.float32)

    yield "token_embd.weight", matrix(VOCAB, DIM, 3.0)
    yield "output_norm.weight", norm(DIM)
    for length in ("short", "long") if m.factors else ():
        yield f"rope_factors_{length}.weight", rng.uniform(1, 4, m.factors).astype(np.float32)
    heads, kv_heads, size = m.heads
    shapes: dict[str, tuple] = {"attn_q": (heads * size, DIM, 1.7), "attn_k": (kv_heads * size, DIM, 1.7), "attn_v": (kv_heads * size, DIM),
              "attn_output": (DIM, heads * size)}
    if m.experts:
        shapes |= {"ffn_gate_exps": (FF // 2, DIM, 1.0, m.experts), "ffn_up_exps": (FF // 2, DIM, 1.0, m.experts),
                   "ffn_down_exps": (DIM, FF // 2, 1.0, m.experts)}
    else:
        shapes |= {"ffn_gate": (FF, DIM), "ffn_up": (FF, DIM), "ffn_down": (DIM, FF)}
    if m.shared:
        shapes |= {"ffn_gate_shexp": (m.shared, DIM), "ffn_up_shexp": (m.shared, DIM), "ffn_down_shexp": (DIM, m.shared)}
    for layer in range(m.layers):
        for part in m.norms:
            width = shapes[part.removesuffix("_norm")][0] if m.wide_norms and part in HEAD_NORMS else size
            yield f"blk.{layer}.{part}.weight", norm(width, 1.7) if part in HEAD_NORMS else norm(DIM)
        for part in m.biases:
            of_experts = (m.experts,) if part.endswith("_exps") else ()
            rows = m.experts if part == ROUTER else shapes[part][0]
            yield f"blk.{layer}.{part}.bias", norm((*of_experts, rows), 0.0)
        if m.sinks:
            yield f"blk.{layer}.attn_sinks.weight", norm(heads, 1.0)
        if m.experts:
            yield f"blk.{layer}.{ROUTER}.weight", matrix(m.experts, DIM, 2.0)
        if m.shared:
            yield f"blk.{layer}.ffn_gate_inp_shexp.weight", norm(DIM, 0.0)
        made = {part: matrix(*shape) for part, shape in shapes.items()}
        if m.merged:
            made["attn_qkv"] = np.concatenate([made.pop(part) for part in QKV])
            made["ffn_up"] = np.concatenate([made.pop("ffn_gate"), made["ffn_up"]])
        for part, weight in made.items():
            yield f"blk.{layer}.{part}.weight", weight
    if m.output:
        yield "output.weight", matrix(VOCAB, DIM, 3.0)


def metadata(m: Tiny) -> dict[str, Any]:
    heads, kv_heads, size = m.heads
    sizes = {"context_length": 1024, "embedding_length": DIM, "block_count": m.layers, "feed_forward_length": FF, "attention.head_count": heads,
             "attention.head_count_kv": kv_heads, "attention.key_length": size, "attention.value_length": size}
    if m.experts:
        sizes |= {"expert_count": m.experts, "expert_used_count": 2}
    own = {"attention.layer_norm_rms_epsilon": 1e-6, **m.keys}
    kinds = {int: "u32", float: "f32", str: "str", bool: "bool"}
    return {"general.architecture": Typed("str", m.arch), **{f"{m.arch}.{k}": Typed("u32", v) for k, v in sizes.items()},
            **{f"{m.arch}.{k}": Typed(kinds[type(v)], v) for k, v in own.items()}, **vocabulary(VOCAB)}


def write(path: Path, name: str, m: Tiny, kind: str) -> None:
    """The model with its matrices in `kind`, a type that keeps what m.type has left of them."""
    made = []
    for tensor, values in tensors(name, m):
        if values.ndim == 1 or tensor.endswith((f"{ROUTER}.weight", ".bias")):
            made.append(formats.new_tensor(tensor, values))
            continue
        blocks = quants.quantize(values, m.type)
        if kind != m.type:
            blocks = quants.quantize(quants.dequantize(blocks, m.type), kind)
        made.append(formats.new_tensor(tensor, blocks, kind, values.shape))
    formats.write(path, metadata(m), made)


def logits(program: Path, model: Path, tokens: np.ndarray, continuation: int, cache: str) -> np.ndarray:
    """llama.cpp's logits (len(tokens) + continuation - 1, VOCAB)."""
    with tempfile.NamedTemporaryFile() as file:
        tokens.astype(np.int32).tofile(file.name)
        done = subprocess.run([program, model, file.name, str(continuation), cache], stdout=subprocess.PIPE, check=True)
    return np.frombuffer(done.stdout, np.float32).reshape(-1, VOCAB)


def answers(rows: np.ndarray, suffix: str) -> dict[str, np.ndarray]:
    """Arrays of a golden file from logits of the text and of its continuation."""
    best = np.sort(rows[N_TOKENS - 1:], axis=-1)
    return {f"logits{suffix}": rows[:N_TOKENS], f"gen_ids{suffix}": rows[N_TOKENS - 1:].argmax(-1).astype(np.int32),
            f"gen_margin{suffix}": best[:, -1] - best[:, -2]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logits", type=Path)
    parser.add_argument("logits_exact", type=Path)
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME")
    options = parser.parse_args()
    for name in options.names:
        m, path = MODELS[name], FOLDER / f"{name}.gguf"
        tokens = np.random.default_rng(0).integers(3, VOCAB, N_TOKENS).astype(np.int32)
        with tempfile.TemporaryDirectory() as folder:
            exact = Path(folder) / "exact.gguf"
            write(path, name, m, m.type)
            write(exact, name, m, "F32")
            found = {"tokens": tokens, **answers(logits(options.logits, path, tokens, m.continuation, "f16"), ""),
                     **answers(logits(options.logits_exact, exact, tokens, m.continuation, "f32"), "_f32")}
        np.savez_compressed(path.with_suffix(".npz"), **found)
        spread = found["logits_f32"].std()
        print(f"{name}: {path.stat().st_size} bytes, {path.with_suffix('.npz').stat().st_size} of logits, whose deviation is {spread:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
