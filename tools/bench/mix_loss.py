"""What `pyggml quantize --target-size` gains: a mix made for MODEL against each fixed recipe, at the size of the recipe's file.

    python tools/bench/mix_loss.py MODEL.gguf TEXT --calibration TEXT2 [--recipes Q4_K_M ...] [--imatrix FILE] [-c 256] [--chunks 60]

The mix is chosen by TEXT2 alone; `pyggml.measure.compare` holds both files against MODEL over TEXT. Prints a Markdown table: sizes
of the files, both divergences, and the paired difference with its standard error.
"""

import argparse
import tempfile
import time
from pathlib import Path

from pyggml.measure.compare import compare
from pyggml.measure.scores import mean
from pyggml.quantize import quantize_file
from pyggml.quantize.allocate import allocate

RECIPES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--imatrix")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("-c", "--ctx-size", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=60)
    parser.add_argument("-t", "--threads", type=int, default=2)
    args = parser.parse_args()
    text, calibration = Path(args.text).read_text(), Path(args.calibration).read_text()
    print("| recipe | its file | the mix | KLD of the recipe | KLD of the mix | difference | | seconds |\n|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.recipes:
            fixed, mixed = (Path(folder) / f"{who}.gguf" for who in ("recipe", "mix"))
            quantize_file(args.model, fixed, name, imatrix=args.imatrix, n_threads=args.threads)
            start = time.perf_counter()
            found = allocate(args.model, calibration, size=fixed.stat().st_size, imatrix=args.imatrix, n_threads=args.threads)
            seconds = time.perf_counter() - start
            quantize_file(args.model, mixed, found.recipe, imatrix=args.imatrix, n_threads=args.threads)
            files = compare(args.model, [fixed, mixed], text, n_ctx=args.ctx_size, n_chunks=args.chunks, n_threads=args.threads).files
            recipe, mix = (f.tokens.kld for f in files)
            (a, a_error), (b, b_error), (change, error) = map(mean, (recipe, mix, mix - recipe))
            print(f"| {name} | {fixed.stat().st_size} | {mixed.stat().st_size} | {a:.6f} ± {a_error:.6f} | {b:.6f} ± {b_error:.6f} | "
                  f"{change:+.6f} ± {error:.6f} | {100 * change / a:+.1f}% | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
