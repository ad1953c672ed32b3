"""Writes tests/golden/codec/more.npz: what ggml's own C says about the types that the other files in that folder do not cover.

    python tools/golden/codec_vectors.py path/to/libggml-base.so

For each type: `TYPE_blocks` random bytes (one block all ones, one all zeros) and `TYPE_floats`, their decoding; `TYPE_bytes`, the
encoding of input.npz (formula types only); `TYPE_plain_bytes` and `TYPE_imat_bytes`, that of the codebook types without and with the
importance matrix; `TYPE_plain_error` and `TYPE_imat_error`, the (importance-weighted) squared error of each row
of input.npz after ggml's encoder, without and with the importance matrix (types whose encoder demands one get ones for "without").
"""

import ctypes
import sys
from pathlib import Path

import numpy as np

from pyggml.types import TensorType, tensor_type

FOLDER = Path(__file__).parents[2] / "tests" / "golden" / "codec"
FORMULA = ["TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0"]
SEARCHED = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M"]
COVERED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]            # decoded elsewhere in the folder
NEED_IMPORTANCE = {"IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"}


def encode(ggml: ctypes.CDLL, row: TensorType, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    out = np.zeros((len(x), row.row_bytes(x.shape[1])), np.uint8)
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    ggml.ggml_quantize_init(row.id)
    ggml.ggml_quantize_chunk(row.id, x.ctypes.data, out.ctypes.data, 0, *x.shape, None if w is None else w.ctypes.data)
    return out


def decode(ggml: ctypes.CDLL, row: TensorType, blocks: np.ndarray) -> np.ndarray:
    out = np.zeros((len(blocks), blocks.shape[1] // row.bytes * row.block), np.float32)
    function = ggml["dequantize_row_" + row.name.lower().replace("_k", "_K")]
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    blocks = np.ascontiguousarray(blocks)
    function(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


def main(path: str) -> None:
    ggml = ctypes.CDLL(path)
    given = np.load(FOLDER / "input.npz")
    x, imatrix = np.ascontiguousarray(given["X"]), np.ascontiguousarray(given["imatrix"])
    rng = np.random.default_rng(1)
    result = {}
    for name in [*FORMULA, *SEARCHED, *COVERED]:
        row = tensor_type(name)
        if name not in COVERED:
            blocks = rng.integers(0, 256, (10, row.bytes), np.uint8)
            blocks[0], blocks[1] = 255, 0
            result[f"{name}_blocks"], result[f"{name}_floats"] = blocks, decode(ggml, row, blocks)
        if name in FORMULA:
            result[f"{name}_bytes"] = encode(ggml, row, x, None)
            continue
        for kind, w in (("plain", None), ("imat", imatrix)):
            demanded = np.ones_like(imatrix) if name in NEED_IMPORTANCE else None
            blocks = encode(ggml, row, x, demanded if w is None else w)
            if name in SEARCHED:
                result[f"{name}_{kind}_bytes"] = blocks
            y = decode(ggml, row, blocks).astype(np.float64)
            result[f"{name}_{kind}_error"] = ((y - x) ** 2 * (1 if w is None else w)).sum(axis=1)
    np.savez_compressed(FOLDER / "more.npz", **result)


if __name__ == "__main__":
    main(sys.argv[1])
