"""Small models for tests: the golden ones as F16 files that can be quantized, and text that their vocabularies can read."""

from pathlib import Path

import numpy as np

from pyggml import formats

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "the", "dog", "that", "ran", "after", "it", "over", "hill")
TEXT = " ".join(f"{word} {i % 17}" for i, word in enumerate(WORDS * 60))


def as_f16(path: Path, name: str = "llama_quant.q8_0") -> Path:
    """Write a golden model of one layer as one of two, with its matrices in F16; rows are a multiple of 256. Returns `path`."""
    file = formats.open(GOLDEN / f"{name}.gguf")
    tensors = {n: t.dequantize().astype(np.float16 if len(t.shape) > 1 else np.float32) for n, t in file.tensors.items()}
    tensors |= {n.replace("blk.0.", "blk.1."): x[..., ::-1].copy() for n, x in tensors.items() if n.startswith("blk.0.")}
    kv = {k: v for k, v in file.kv.typed().items() if k not in ("general.file_type", "general.quantization_version")}
    formats.write(path, kv | {f"{file.kv['general.architecture']}.block_count": formats.Typed("u32", 2)}, tensors)
    return path
