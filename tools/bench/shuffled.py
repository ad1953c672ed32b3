"""The same model with its channels in another order: every logit stays what it was, but other weights share a block.

What quantization loses depends on where single weights fall, in a small model by several percent from one order to the next, and alike for
all tokens of a text, so that a standard error over tokens does not see it. Over several orders it can be seen.
"""

import sys
from pathlib import Path

import numpy as np

from pyggml import formats
from pyggml.quantize.imatrix import Entry, Imatrix

# Role of a tensor of a llama model -> which channels run along which of its axes. Heads keep their order, for rotation pairs their parts.
STREAM, HIDDEN = "stream", "hidden"
AXES = {"token_embd": {1: STREAM}, "output": {1: STREAM}, "output_norm": {0: STREAM}, "attn_norm": {0: STREAM}, "ffn_norm": {0: STREAM},
        "attn_q": {1: STREAM}, "attn_k": {1: STREAM}, "attn_v": {1: STREAM}, "attn_output": {0: STREAM},
        "ffn_gate": {0: HIDDEN, 1: STREAM}, "ffn_up": {0: HIDDEN, 1: STREAM}, "ffn_down": {0: STREAM, 1: HIDDEN}, "rope_freqs": {}}


def shuffle(model: str | Path, imatrix: str | None, seed: int, folder: Path) -> tuple[str, str | None]:
    """Paths of the model and of its importance matrix in the order `seed`, written into `folder`; order 0 is their own."""
    if seed == 0:
        return str(model), imatrix
    file, rng = formats.open(model), np.random.default_rng(seed)
    stream = rng.permutation(file["token_embd.weight"].shape[1])
    hidden = {layer: rng.permutation(file[f"blk.{layer}.ffn_up.weight"].shape[0]) for layer in range(file.kv["llama.block_count"])}

    def order(name: str, kind: str) -> np.ndarray:
        return stream if kind == STREAM else hidden[int(name.split(".")[1])]

    def axes(name: str) -> dict[int, str]:
        role = name.removesuffix(".weight").split(".")[-1]
        if role not in AXES:
            sys.exit(f'{model}: how the channels of "{name}" lie is not known here; use --orders 1')
        return AXES[role]

    tensors = {}
    for name, tensor in file.tensors.items():
        weights = tensor.dequantize()
        for axis, kind in axes(name).items():
            weights = weights.take(order(name, kind), axis)
        tensors[name] = weights.astype(np.float32)
    shuffled = folder / f"order-{seed}.gguf"
    formats.write(shuffled, file.kv, tensors)
    if imatrix is None:
        return str(shuffled), None
    known, path = Imatrix.load(imatrix), folder / f"order-{seed}.imatrix.gguf"
    entries = {name: Entry(entry.counts, {key: v[:, order(name, axes(name)[1])] if 1 in axes(name) else v for key, v in entry.stats.items()})
               for name, entry in known.entries.items()}
    Imatrix(entries, known.datasets, known.n_chunks, known.chunk_size).save(path)
    return str(shuffled), str(path)
