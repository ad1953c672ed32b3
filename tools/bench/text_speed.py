"""Speed of `pyggml perplexity` and `pyggml imatrix` beside llama.cpp's programs: whole processes over the same chunks, in pairs.

    python tools/bench/text_speed.py perplexity MODEL.gguf TEXT --rival PATH/llama-perplexity [-c 256] [--chunks 200] [-t 2] [--pairs 6]
    python tools/bench/text_speed.py imatrix    MODEL.gguf TEXT --rival PATH/llama-imatrix

Prints tokens per second of each run, and the median of the pairs' ratios with its interval.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

from pairing import compare, running_order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=("perplexity", "imatrix"))
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--rival", required=True)
    parser.add_argument("-c", "--ctx-size", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=6)
    args = parser.parse_args()
    programs = {"pyggml": [sys.executable, "-m", "pyggml", args.tool], "llama.cpp": [args.rival]}
    rates: dict[str, list[float]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-m", args.model, "-f", args.text, "-c", str(args.ctx_size), "--chunks", str(args.chunks), "-t", str(args.threads)]
        if args.tool == "imatrix":
            flags += ["-o", os.path.join(folder, "imatrix.gguf")]
        for turn in range(args.pairs):
            for name in running_order(list(programs), turn):
                start = time.perf_counter()
                done = subprocess.run([*programs[name], *flags], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{name}: {done.stderr[-500:]}")
                rates[name].append(args.chunks * args.ctx_size / (time.perf_counter() - start))
                print(f"{name:<10} {rates[name][-1]:10.0f} tokens/s", flush=True)
    found = compare(rates["pyggml"], rates["llama.cpp"])
    print(f"pyggml / llama.cpp: {found.ratio:.2f} ({found.low:.2f} to {found.high:.2f}, {found.pairs} pairs): {found.verdict}")


if __name__ == "__main__":
    main()
