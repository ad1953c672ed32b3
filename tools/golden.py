"""Distances of pyggml's logits from golden ones: python tools/golden.py FOLDER_WITH_MODELS [FOLDER_WITH_NPZ] [--isa all]

Prints a row per model, path and instruction set; exits with 1 when one is out of bounds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "golden"))

from distances import BOUNDS, distances, first_difference, misses, native_bound  # noqa: E402

from pyggml import native  # noqa: E402
from pyggml.context import Context  # noqa: E402
from pyggml.model import Model  # noqa: E402


def hold_against(path: Path, models: Path, *, strict: bool = False, **options) -> tuple[dict[str, float], list[str]]:
    """Run the model of a golden file with these options of Context: (distances, what is out of bounds in words)."""
    golden, name, suffix = np.load(path), path.stem, "_f32" if strict else ""
    context = Context(Model.load(models / f"{name}.gguf"), n_ctx=256, **options)
    logits = context.eval(golden["tokens"], "all").copy()
    found = distances(golden[f"logits{suffix}"], logits)
    wrong = misses(found, BOUNDS["strict" if strict else native_bound(name)])
    ids = [int(logits[-1].argmax())]
    while len(ids) < len(golden[f"gen_ids{suffix}"]):
        ids.append(int(context.eval(ids[-1:])[0].argmax()))
    error = 2 * float(np.abs(golden[f"logits{suffix}"] - logits).max())
    if said := first_difference(ids, golden[f"gen_margin{suffix}"], golden[f"gen_ids{suffix}"], error):
        wrong.append(said)
    return found, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("golden", type=Path, nargs="?")
    parser.add_argument("--isa", default=native.isa, help="one instruction set, or all")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-ngl", "--n-gpu-layers", help="so many layers on a GPU, or all")
    args = parser.parse_args()
    paths = {("strict", True): {"exact": True, "type_k": "F32", "type_v": "F32"}, ("packed", False): {}, ("raw", False): {"repack": False}}
    if args.n_gpu_layers:
        paths = {("gpu", False): {"n_gpu_layers": args.n_gpu_layers}}
    isas = [n for n, ok in native.isa_names().items() if ok] if args.isa == "all" else [args.isa]
    failures = 0
    for path in sorted((args.golden or args.models).glob("*.npz")):
        for isa in isas:
            native.select_isa(isa)
            for (label, strict), options in paths.items():
                found, wrong = hold_against(path, args.models, strict=strict, n_threads=args.threads, **options)
                failures += bool(wrong)
                numbers = "  ".join(f"{k} {v:.2g}" for k, v in found.items())
                print(f"{path.stem:28} {isa:11} {label:7} {numbers}  {'; '.join(wrong) or 'ok'}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
