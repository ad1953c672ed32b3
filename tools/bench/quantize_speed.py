"""Speed and memory of quantizing a whole file: `pyggml quantize` with its search, and llama-quantize, in alternating pairs.

    python tools/bench/quantize_speed.py MODEL.gguf --llama-quantize PATH [--types Q4_0 ...] [--layers N] [--pairs 6] [-t 2] [--prefix "chrt -f 50"]

With --layers both work on a copy of MODEL that has its first N layers alone: layers are alike, and types that llama-quantize searches
long (IQ4_XS: minutes for a model of 1.1 billion weights) come to their pairs.
One discarded run of each first brings the model into the page cache. Prints a Markdown table: medians of seconds, the ratio of speeds with
its 95% interval and verdict, and the peak resident memory of each, less the pages of the mapped model file.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from pairing import compare, running_order

from pyggml import formats
from pyggml.quantize import quantize_file

TYPES = ("Q4_0", "Q8_0", "Q4_K_M", "IQ4_XS")


def anonymous(pid: int) -> int:
    """Bytes of a process's resident memory that no file backs; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith(("RssAnon", "RssShmem")))


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak anonymous memory of one process."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output: list[bytes] = []
    reader = threading.Thread(target=lambda: output.append(process.stdout.read()))      # type: ignore[union-attr]
    reader.start()
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    reader.join()
    if process.returncode:
        sys.exit(f"{shlex.join(command)} ends with status {process.returncode}: {output[0].decode(errors='replace')[-500:]}")
    return seconds, peak


def first_layers(model: str, n: int, target: str) -> str:
    """Path of a copy of the model with its first n layers, tensors as they are."""
    kv = formats.open(model).kv
    quantize_file(model, target, "COPY", prune_layers=[*range(n, kv[f"{kv['general.architecture']}.block_count"])])
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--llama-quantize", required=True)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--layers", type=int, help="of the model, its first ones (default: all)")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--prefix", default="", help="goes before both commands")
    parser.add_argument("--work", default=None, help="folder for the files that are made (default: a temporary one)")
    args = parser.parse_args()
    print("| type | llama-quantize s | pyggml s | speed ratio (95%) | pairs | verdict | llama-quantize MB | pyggml MB |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        model = first_layers(args.model, args.layers, os.path.join(folder, "model.gguf")) if args.layers else args.model
        for kind in args.types:
            target = os.path.join(folder, "out.gguf")
            commands = {"theirs": [args.llama_quantize, model, target, kind, str(args.threads)],
                        "ours": [sys.executable, "-m", "pyggml", "quantize", model, target, kind, str(args.threads)]}
            seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
            memory = dict.fromkeys(commands, 0)
            for turn in range(-1, args.pairs):
                for who in running_order(list(commands), turn):
                    taken, peak = timed([*shlex.split(args.prefix), *commands[who]])
                    os.unlink(target)
                    if turn >= 0:
                        seconds[who].append(taken)
                        memory[who] = max(memory[who], peak)
            found = compare([1 / s for s in seconds["ours"]], [1 / s for s in seconds["theirs"]])
            print(f"| {kind} | {statistics.median(seconds['theirs']):.2f} | {statistics.median(seconds['ours']):.2f} | "
                  f"{found.ratio:.2f} ({found.low:.2f} to {found.high:.2f}) | {found.pairs} | {found.verdict} | "
                  f"{memory['theirs'] / 1e6:.0f} | {memory['ours'] / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
