"""Speed of the file tools: opening a large vocabulary, editing, hashing and checking, beside the gguf package where it is installed.

    python tools/bench/files.py [--size GB] [--folder DIR]

Times are the smallest of several runs with the file in the page cache; `cp` of the same file is the yardstick for a rewrite.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pyggml import formats
from pyggml.formats import numbers, values
from pyggml.formats.edit import Edits, edit
from pyggml.formats.hashing import ALGORITHMS, hashes
from pyggml.quants import quantize

TOKENS, TEMPLATE = 150_000, "tokenizer.chat_template"


def smallest(runs: int, work: Callable[[int], object]) -> float:
    """Seconds of the fastest of `runs` calls; work gets the number of the run."""
    times = []
    for i in range(runs):
        start = time.perf_counter()
        work(i)
        times.append(time.perf_counter() - start)
    return min(times)


def write_model(path: Path, gigabytes: float) -> None:
    """A vocabulary of TOKENS tokens and merges, and Q4_0 weights."""
    words = [f"\u0120token{i}" for i in range(TOKENS)]
    kv = {"general.architecture": "llama", "tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": [1] * TOKENS,
          "tokenizer.ggml.merges": [f"{w[:4]} {w[4:]}" for w in words], TEMPLATE: "{{ messages }}" * 20}
    rows = quantize(np.random.default_rng(0).standard_normal((1024, 4096)).astype(np.float32), "Q4_0")
    count = max(1, round(gigabytes * 1e9 / rows.nbytes))
    formats.write(path, kv, [formats.new_tensor(f"blk.{i}.w", rows, "Q4_0") for i in range(count)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=float, default=2.0, metavar="GB")
    parser.add_argument("--folder", help="where to write the model (default: the folder for temporary files)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        measure(folder / "model.gguf", args.size)
    finally:
        shutil.rmtree(folder)


def measure(path: Path, gigabytes: float) -> None:
    def show(what: str, seconds: float, nbytes: int = 0) -> None:
        print(f"{what:<58}{seconds * 1e3:>10.1f} ms" + (f"{nbytes / seconds / 1e9:>8.2f} GB/s" if nbytes else ""), flush=True)

    write_model(path, gigabytes)
    print(f"{path.stat().st_size / 1e9:.2f} GB, {TOKENS} tokens")
    show("open", smallest(9, lambda i: formats.open(path)))
    native, values.lib = values.lib, None
    show("open, without the compiled extension", smallest(3, lambda i: formats.open(path)))
    values.lib = native
    show("all tokens as text", smallest(5, lambda i: formats.open(path).kv["tokenizer.ggml.tokens"].tolist()))
    try:
        import gguf
        show("open, gguf package", smallest(1, lambda i: gguf.GGUFReader(path)))
    except ImportError:
        print("the gguf package is not installed: no comparison")
    show("pyggml info, start to finish", smallest(5, lambda i: subprocess.run([sys.executable, "-m", "pyggml", "info", path], stdout=-3)))
    edit(path, Edits({TEMPLATE: "x" * 8000}))
    show("edit the chat template, room is there", smallest(9, lambda i: edit(path, Edits({TEMPLATE: f"{i:08}" * 1000}))))
    copy = path.with_name("copy.gguf")
    show("cp", smallest(1, lambda i: subprocess.run(["cp", path, copy], check=True)))
    with open(path, "rb"):                      # somebody else has it open: no edit in place
        show("edit by rewriting", smallest(1, lambda i: edit(path, Edits({TEMPLATE: "y" * 80_000}))))
    copy.unlink()
    file = formats.open(path, use_mmap=False)
    total = sum(t.nbytes for t in file.tensors.values())
    for name in ALGORITHMS:
        show(f"hash --{name} --no-layer", smallest(1, lambda i, name=name: list(hashes(file, [name], per_tensor=False))), total)
    show("check: every scale, one thread", smallest(2, lambda i: [numbers.first_bad(t) for t in file.tensors.values()]), total)


if __name__ == "__main__":
    main()
