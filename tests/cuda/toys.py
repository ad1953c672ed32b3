"""Models so small that the simulator runs them: one or two layers of 32 numbers, with random weights."""

from pathlib import Path

import numpy as np

from pyggml import formats, quants

DIM, HEAD, VOCAB, EXPERTS = 32, 16, 40, 4


def write(path: Path, arch: str = "llama", *, layers: int = 1, experts: bool = False, kind: str = "Q8_0", tied: bool = False) -> Path:
    """A model file; `kind` is the type of its matrices. Qwen 2 has biases on q, k and v, Gemma 3 more norms, a window and a cap on logits."""
    rng = np.random.default_rng(5)
    tensors = []

    def matrix(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, dtype=np.float32) * 2 / np.sqrt(shape[-1])
        tensors.append(formats.new_tensor(name, quants.quantize(values, kind), kind, shape))

    def numbers(name: str, size: int, around: float) -> None:
        tensors.append(formats.new_tensor(name, (around + 0.3 * rng.standard_normal(size)).astype(np.float32)))

    matrix("token_embd.weight", VOCAB, DIM)
    if not tied:
        matrix("output.weight", VOCAB, DIM)
    numbers("output_norm.weight", DIM, 1)
    for layer in range(layers):
        p = f"blk.{layer}."
        for name, rows in (("attn_q", DIM), ("attn_k", HEAD), ("attn_v", HEAD), ("attn_output", DIM)):
            matrix(f"{p}{name}.weight", rows, DIM)
            if arch == "qwen2" and name != "attn_output":
                numbers(f"{p}{name}.bias", rows, 0)
        if arch == "gemma3":
            for name, size in (("attn_q_norm", HEAD), ("attn_k_norm", HEAD), ("post_attention_norm", DIM), ("post_ffw_norm", DIM)):
                numbers(f"{p}{name}.weight", size, 1)
        numbers(f"{p}attn_norm.weight", DIM, 1)
        numbers(f"{p}ffn_norm.weight", DIM, 1)
        if experts:
            matrix(f"{p}ffn_gate_inp.weight", EXPERTS, DIM)
        for name in ("gate", "up", "down"):
            matrix(f"{p}ffn_{name}{'_exps' if experts else ''}.weight", *([EXPERTS] if experts else []), DIM, DIM)
    kv = {"general.architecture": arch, f"{arch}.block_count": layers, f"{arch}.context_length": 64, f"{arch}.embedding_length": DIM,
          f"{arch}.feed_forward_length": DIM, f"{arch}.attention.head_count": DIM // HEAD, f"{arch}.attention.head_count_kv": 1,
          f"{arch}.attention.layer_norm_rms_epsilon": 1e-5}
    if arch == "gemma3":
        kv |= {f"{arch}.attention.sliding_window": 3, f"{arch}.final_logit_softcapping": 1.0, f"{arch}.attention.key_length": HEAD,
               f"{arch}.attention.value_length": HEAD}
    if experts:
        kv |= {f"{arch}.expert_count": EXPERTS, f"{arch}.expert_used_count": 2}
    formats.write(path, kv, tensors)
    return path
