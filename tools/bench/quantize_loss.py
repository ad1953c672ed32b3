"""What quantization loses: pyggml's files against llama.cpp's, type by type, at equal bytes, measured by one evaluator.

    python tools/bench/quantize_loss.py MODEL.gguf TEXT --llama-quantize PATH [--imatrix FILE] [-c 256] [--chunks 120] [--orders 1] [--work FOLDER]

For every type both programs quantize MODEL without and with the importance matrix; `pyggml.measure.compare` holds all of them
against MODEL over TEXT. Prints a Markdown table: bytes, both divergences, and the paired difference with its standard error: over
tokens, or with --orders over that many orders of the model's channels (shuffled.py), which sees chance in the rounding too.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from shuffled import shuffle

from pyggml.measure.compare import Measured, compare
from pyggml.measure.scores import Mean, mean
from pyggml.quantize import quantize_file

TYPES = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_XS", "IQ3_S", "IQ2_S", "MXFP4")
NEEDS_IMATRIX = ("IQ2_S",)


def recipe(kind: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """(recipe, types of some tensors): MXFP4 has no recipe for a dense model, so its layers are asked for."""
    return ("Q8_0", (("blk", "mxfp4"),)) if kind == "MXFP4" else (kind, ())


def llama_quantize(program: str, model: str, target: Path, kind: str, imatrix: str | None) -> None:
    name, tensors = recipe(kind)
    flags = [*(["--imatrix", imatrix] if imatrix else []), *(f for p, t in tensors for f in ("--tensor-type", f"{p}={t}"))]
    done = subprocess.run([program, *flags, model, str(target), name], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{program} {kind}: {done.stderr[-500:]}")


def over_orders(x: np.ndarray) -> Mean:
    return Mean(float(x.mean()), float(x.std() / np.sqrt(len(x) - 1)))


def losses(args: argparse.Namespace, kind: str, model: str, imatrix: str | None, text: str) -> Sequence[Measured]:
    """llama.cpp's file and pyggml's, measured and removed."""
    theirs, ours = (args.work / f"{who}-{kind}{'-imatrix' if imatrix else ''}.gguf" for who in ("llama", "pyggml"))
    llama_quantize(args.llama_quantize, model, theirs, kind, imatrix)
    name, tensors = recipe(kind)
    quantize_file(model, ours, name, imatrix=imatrix, tensor_types=tensors)
    found = compare(model, [theirs, ours], text, n_ctx=args.ctx_size, n_chunks=args.chunks).files
    for path in (theirs, ours):
        os.unlink(path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--llama-quantize", required=True)
    parser.add_argument("--imatrix")
    parser.add_argument("-c", "--ctx-size", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=120)
    parser.add_argument("--orders", type=int, default=1, help="orders of the model's channels to average over, its own first")
    parser.add_argument("--work", type=Path, default=Path("."))
    parser.add_argument("--types", nargs="+", default=TYPES)
    args = parser.parse_args()
    text = Path(args.text).read_text()
    sources = [shuffle(args.model, args.imatrix, seed, args.work) for seed in range(args.orders)]
    print("| type | imatrix | bytes | llama.cpp | pyggml | difference | |\n|---|---|---|---|---|---|---|")
    for kind in args.types:
        without = () if kind in NEEDS_IMATRIX else (False,)
        for weighted in (*without, *([True] if args.imatrix else [])):
            found = [losses(args, kind, model, imatrix if weighted else None, text) for model, imatrix in sources]
            a, b = found[0]
            same = "" if a.nbytes == b.nbytes else f" (pyggml {b.nbytes})"
            theirs, ours = ([one[i].tokens.kld for one in found] for i in (0, 1))
            average = mean
            if args.orders > 1:
                theirs, ours = ([np.array([kld.mean() for kld in klds])] for klds in (theirs, ours))
                average = over_orders
            change, theirs_kld, ours_kld = average(ours[0] - theirs[0]), average(theirs[0]), average(ours[0])
            print(f"| {kind} | {'yes' if weighted else 'no'} | {a.nbytes}{same} | {theirs_kld.value:.6f} ± {theirs_kld.error:.6f} | "
                  f"{ours_kld.value:.6f} ± {ours_kld.error:.6f} | {change.value:+.6f} ± {change.error:.6f} | "
                  f"{100 * change.value / theirs_kld.value:+.1f}% |", flush=True)


if __name__ == "__main__":
    main()
