"""Speed of the file tools and codecs, beside the gguf package, ggml's own C and coreutils.

    python tools/bench/files.py [--size GB] [--folder DIR] [--ggml FOLDER] [--only SECTION] [--rows N] [--types NAME,...]

Times are the smallest of several runs with the file in the page cache; `cp` of the same file is the yardstick for a rewrite. A hash of one
piece of data is one thread. Codecs run on one thread into an array that is there, and as a user calls them: a new array, all threads. Beside
them stand ggml's C and the gguf package's numpy, which have one thread; copying the floats is what memory allows. --ggml names the folder of
libggml-base.so and libggml-cpu.so (the llama_cpp package has them in lib/). What is not installed is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pyggml import formats
from pyggml.formats import numbers, values
from pyggml.formats.edit import Edits, edit
from pyggml.formats.hashing import ALGORITHMS, hashes
from pyggml.quants import dequantize, quantize
from pyggml.types import TYPES, TensorType

try:
    import gguf
except ImportError:
    gguf = None

TOKENS, TEMPLATE = 150_000, "tokenizer.chat_template"
COLUMNS = 4096                      # of the matrix that codecs take
SLOW = 0.5                          # seconds after which something is timed once only
TURNS = 25                          # of each codec

Work = Callable[[], Any]


def smallest(runs: int, work: Callable[[int], object]) -> float:
    """Seconds of the fastest of `runs` calls; work gets the number of the run. One call is enough for what takes long."""
    times: list[float] = []
    for i in range(runs):
        start = time.perf_counter()
        work(i)
        times.append(time.perf_counter() - start)
        if times[0] > SLOW:
            break
    return min(times)


def show(what: str, seconds: float, nbytes: int = 0, than: float = 0) -> None:
    rate = f"{nbytes / seconds / 1e9:>8.2f} GB/s" if nbytes else ""
    print(f"{what:<58}{seconds * 1e3:>10.1f} ms{rate}{f'{than / seconds:>9.1f} x' if than else ''}", flush=True)


def write_model(path: Path, gigabytes: float) -> None:
    """A vocabulary of TOKENS tokens and merges, and Q4_0 weights."""
    words = [f"\u0120token{i}" for i in range(TOKENS)]
    kv = {"general.architecture": "llama", "tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": [1] * TOKENS,
          "tokenizer.ggml.merges": [f"{w[:4]} {w[4:]}" for w in words], TEMPLATE: "{{ messages }}" * 20}
    rows = quantize(np.random.default_rng(0).standard_normal((1024, 4096)).astype(np.float32), "Q4_0")
    count = max(1, round(gigabytes * 1e9 / rows.nbytes))
    formats.write(path, kv, [formats.new_tensor(f"blk.{i}.w", rows, "Q4_0") for i in range(count)])


# ---- files ------------------------------------------------------------------------------------------------------------------------

def measure_files(path: Path, gigabytes: float) -> None:
    write_model(path, gigabytes)
    print(f"{path.stat().st_size / 1e9:.2f} GB, {TOKENS} tokens")
    theirs = smallest(1, lambda i: gguf.GGUFReader(path)) if gguf is not None else 0
    show("open", smallest(9, lambda i: formats.open(path)), than=theirs)
    native, values.lib = values.lib, None
    show("open, without the compiled extension", smallest(3, lambda i: formats.open(path)), than=theirs)
    values.lib = native
    if theirs:
        show("open, gguf package", theirs)
    show("all tokens as text", smallest(5, lambda i: formats.open(path).kv["tokenizer.ggml.tokens"].tolist()))
    show("pyggml info, start to finish", smallest(5, lambda i: subprocess.run([sys.executable, "-m", "pyggml", "info", path], stdout=-3)))
    if gguf is not None:
        dump = [sys.executable, "-m", "gguf.scripts.gguf_dump", path]
        show("gguf-dump, start to finish", smallest(1, lambda i: subprocess.run(dump, stdout=-3)))
    edit(path, Edits({TEMPLATE: "x" * 8000}))
    show("edit the chat template, room is there", smallest(9, lambda i: edit(path, Edits({TEMPLATE: f"{i:08}" * 1000}))))
    long, copy = iter(range(1, 100)), path.with_name("copy.gguf")

    def longer() -> str:
        """Edit the template to one that does not fit; how that was done."""
        return edit(path, Edits({TEMPLATE: "y" * 80_000 * next(long)})).method

    def with_sync(command: str) -> float:
        os.sync()                                   # what else waits to be written would be waited for
        return smallest(1, lambda i: subprocess.run(command, shell=True, check=True))
    grown: list[str] = []
    show("edit the chat template, no room", smallest(5, lambda i: grown.append(longer())))
    print(f"    ({', '.join(sorted(set(grown)))})")
    rewrites, fresh, over = [], [], []
    for _ in range(3):                              # a disk has its moods: all in turn, the best of each
        os.sync()
        with open(path, "rb"):                      # somebody else has it open: no edit in place
            rewrites.append(smallest(1, lambda i: longer()))
        fresh.append(with_sync(f"cp '{path}' '{copy}.new' && sync '{copy}.new' && mv '{copy}.new' '{copy}' && sync '{copy.parent}'"))
        over.append(with_sync(f"cp '{path}' '{copy}' && sync '{copy}'"))
    show("edit by rewriting, flushed to disk", min(rewrites))
    show("cp to a new file, flushed, renamed (the same guarantees)", min(fresh))
    show("cp over an old file, flushed (half a file if cut off)", min(over))
    if gguf is not None:
        new = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--force", "--chat-template", "z" * 80_000, path, copy]
        show("gguf-new-metadata", smallest(1, lambda i: subprocess.run(new, stdout=-3, stderr=-3, check=True)))
    copy.unlink()


def measure_data(path: Path, gigabytes: float) -> None:
    """Reading all of the tensors."""
    if not path.exists():
        write_model(path, gigabytes)
    file = formats.open(path, use_mmap=False)
    total = sum(t.nbytes for t in file.tensors.values())
    for name in ALGORITHMS:
        show(f"hash --{name} --no-layer", smallest(2, lambda i, name=name: list(hashes(file, [name], per_tensor=False))), total)
        show(f"hash --{name}", smallest(2, lambda i, name=name: list(hashes(file, [name]))), total)
    show("sha256sum", smallest(2, lambda i: subprocess.run(["sha256sum", path], stdout=-3)), total)
    show("check: every scale, one thread", smallest(3, lambda i: [numbers.first_bad(t) for t in file.tensors.values()]), total)
    check = [sys.executable, "-m", "pyggml", "check", path]
    show("pyggml check, start to finish", smallest(2, lambda i: subprocess.run(check, stdout=-3)), total)


# ---- codecs -----------------------------------------------------------------------------------------------------------------------

class Traits(ctypes.Structure):
    """The start of ggml_type_traits."""

    _fields_ = [("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleave", ctypes.c_int64), ("size", ctypes.c_size_t),
                ("quantized", ctypes.c_bool), ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
                ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64))]


class Ggml:
    """ggml's codecs: decoding by its base library, encoding by the faster of that and what its CPU backend uses."""

    def __init__(self, folder: Path) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        self.cpu.ggml_cpu_init()
        self.base.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
        self.cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64))

    def decode(self, row: TensorType, blocks: np.ndarray, out: np.ndarray) -> list[Work]:
        return self._calls([self.base.ggml_get_type_traits(row.id).contents.to_float], blocks, out, out.size)

    def encode(self, row: TensorType, x: np.ndarray, out: np.ndarray) -> list[Work]:
        self.base.ggml_quantize_init(row.id)
        return self._calls([self.base.ggml_get_type_traits(row.id).contents.from_float, self.cpu.ggml_get_type_traits_cpu(row.id)[0]], x, out, x.size)

    @staticmethod
    def _calls(functions: list[Any], src: np.ndarray, dst: np.ndarray, n: int) -> list[Work]:
        return [lambda f=f: f(src.ctypes.data, dst.ctypes.data, n) for f in functions if f]


def package(row: TensorType, codec: str, array: np.ndarray) -> list[Work]:
    """The gguf package's `quantize` or `dequantize` of an array; nothing where it has none."""
    kind = gguf.GGMLQuantizationType._value2member_map_.get(row.id) if gguf is not None else None
    if kind is None:
        return []
    work = partial(getattr(gguf.quants, codec), array, kind)
    try:
        work()
    except (NotImplementedError, KeyError, AttributeError):
        return []
    return [work]


def in_turn(contestants: list[list[Work]]) -> list[float]:
    """Seconds of the fastest call of each contestant (0: it has none), all in turn, because the speed of memory changes by the second, and
    in changing order, because what the one before leaves in the caches matters."""
    best, order = [math.inf if works else 0 for works in contestants], random.Random(0)
    entries = list(enumerate(contestants))
    for turn in range(TURNS):
        order.shuffle(entries)
        for i, works in entries:
            if turn < 3 or best[i] < SLOW / TURNS:
                best[i] = min([best[i], *(smallest(1, lambda _, work=work: work()) for work in works)])
        if max(best) > SLOW:
            break
    return best


def measure_codecs(folder: Path | None, rows: int, names: list[str]) -> None:
    """Millions of weights a second, and how many times those of ggml's C and of the gguf package; of the types named, or of all."""
    x = np.random.default_rng(0).standard_normal((rows, COLUMNS), np.float32)
    ggml = Ggml(folder) if folder else None
    copied = np.zeros_like(x)
    once = smallest(TURNS, lambda i: np.copyto(copied, x))
    print(f"millions of weights a second, times ggml's C, times gguf's numpy (one thread each); copying floats: {x.size / once / 1e6:.0f}")
    print(f"{'':<8}{''.join(f'{codec + how:>24}' for codec in ('decode', 'encode') for how in (', one thread', ', default call'))}")
    for row in TYPES:
        if not row.activation or row.name == "F32" or (names and row.name not in names):
            continue
        blocks, cells = quantize(x, row), []
        for codec, array, out in ((dequantize, blocks, np.zeros_like(x)), (quantize, x, np.zeros_like(blocks))):
            ours = [[partial(codec, array, row, out=out, threads=1)], [partial(codec, array, row.name)]]
            rival = (ggml.decode if codec is dequantize else ggml.encode)(row, array, out) if ggml else []
            *times, c, python = in_turn([*ours, rival, package(row, codec.__name__, array)])
            for seconds in times:
                ratios = [f"{theirs / seconds:.2f}" if theirs else "-" for theirs in (c, python)]
                cells.append(f"{x.size / seconds / 1e6:>8.0f}{ratios[0]:>8}{ratios[1]:>8}")
        print(f"{row.name:<8}{''.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=float, default=2.0, metavar="GB")
    parser.add_argument("--folder", help="where to write the model (default: the folder for temporary files)")
    parser.add_argument("--ggml", type=Path, metavar="FOLDER", help="where ggml's shared libraries are")
    parser.add_argument("--only", choices=("files", "data", "codecs"))
    parser.add_argument("--rows", type=int, default=4096, metavar="N", help=f"rows of {COLUMNS} weights that codecs take (default: %(default)s)")
    parser.add_argument("--types", type=lambda text: text.upper().split(","), default=[], metavar="NAME,...", help="codecs to measure (default: all)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        if args.only in (None, "files"):
            measure_files(folder / "model.gguf", args.size)
        if args.only in (None, "data"):
            measure_data(folder / "model.gguf", args.size)
        if args.only in (None, "codecs"):
            measure_codecs(args.ggml, args.rows, args.types)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
