"""Programs that answer to llama-bench's flags, and how each is asked for one test.

pyggml, llama.cpp's llama-bench, ik_llama.cpp's llama-bench and llama_cpp_bench.py share one command line. What differs is read
from each program's own `--help`: a flag is used only where it is listed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

LLAMA_CPP_BENCH = Path(__file__).with_name("llama_cpp_bench.py")

# Settings that decide a rival's speed, with the values to try. Every combination of those a program lists is swept.
SPEED_FLAGS = {"-fa": ("0", "1"), "--repack": ("0", "1"), "-rtr": ("0", "1"), "-mqkv": ("0", "1")}
# ... and those that decide most of it, for a quick look.
QUICK_FLAGS = {"-fa": ("1",), "--repack": ("0", "1"), "-rtr": ("0", "1")}
# The same settings as llama-sweep-bench spells them.
SWEEP_BENCH_FLAGS = {"-fa": {"0": ["-fa", "off"], "1": ["-fa", "on"]}, "-rtr": {"0": [], "1": ["-rtr"]}, "-mqkv": {"0": [], "1": ["-mqkv"]}}


class BenchError(Exception):
    """A contestant cannot run a test; the message says which and why."""


@dataclass(frozen=True)
class Test:
    """One measurement: a prompt of n_prompt tokens or the generation of n_gen (of each of n_parallel sequences), after n_depth tokens."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0
    n_parallel: int = 1

    @property
    def name(self) -> str:
        """llama-bench's row name: pp512, tg128, pp512 @ d4096, tg64 x4."""
        what = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        what += f" x{self.n_parallel}" if self.n_parallel > 1 else ""
        return f"{what} @ d{self.n_depth}" if self.n_depth else what

    @staticmethod
    def parse(text: str) -> Test:
        """From a name, with or without its spaces: pp512, tg128@4096, tg64x4."""
        found = re.fullmatch(r"(pp|tg)(\d+)(?:x(\d+))?(?:@d?(\d+))?", text.replace(" ", ""))
        if not found or not int(found[2]) or (found[1] == "pp" and found[3]):
            raise ValueError(f"{text!r} is not a test; write pp512, tg128, pp512@4096 or tg64x4")
        n, parallel, depth = int(found[2]), int(found[3] or 1), int(found[4] or 0)
        return Test(n, 0, depth) if found[1] == "pp" else Test(0, n, depth, parallel)


def flag_sets(help_text: str, flags: dict[str, tuple[str, ...]] = SPEED_FLAGS) -> list[list[str]]:
    """Every combination of the speed flags that a help text lists: [["-fa", "0", "--repack", "0"], ...]."""
    words = set(help_text.replace(",", " ").split())
    options = [[(flag, value) for value in values] for flag, values in flags.items() if flag in words]
    return [[word for pair in choice for word in pair] for choice in product(*options)]


def json_rows(text: str) -> list[dict]:
    """The array that `-o json` prints, wherever it stands among other output."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() in ("[", "[]") or line.startswith("[{")), None)
    if start is None:
        raise BenchError(f"no JSON rows in the output: {text[-300:]!r}")
    rows, _ = json.JSONDecoder().raw_decode("\n".join(lines[start:]))
    return rows


def json_lines(text: str) -> list[dict]:
    """The objects among lines of other output, one a line."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def rate(rows: list[dict], test: Test) -> float:
    """Tokens per second of a test among llama-bench's rows.

    Rows without `n_depth` come from ik_llama.cpp, where a generation at a depth is a row with both lengths, timed for the second.
    """
    for row in rows:
        if row.get("n_parallel", 1) != test.n_parallel:
            continue
        depth = row.get("n_depth", row["n_prompt"] if row["n_gen"] else 0)
        n_prompt = row["n_prompt"] if not row["n_gen"] else 0
        if (n_prompt, row["n_gen"], depth) == (test.n_prompt, test.n_gen, test.n_depth):
            return float(row["avg_ts"])
    raise BenchError(f"no row for {test.name} among {[(r['n_prompt'], r['n_gen']) for r in rows]}")


@dataclass(frozen=True)
class Contestant:
    """A program that answers to llama-bench's flags."""

    name: str
    command: tuple[str, ...]

    @cached_property
    def help_text(self) -> str:
        done = subprocess.run([*self.command, "--help"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise BenchError(f"{self.name}: {' '.join(self.command)} --help fails: {(done.stderr or done.stdout).strip()[-300:]}")
        return done.stdout + done.stderr

    @cached_property
    def identity(self) -> str:
        """Changes when a rival does: the digest of a binary, or what llama_cpp_bench.py says of its package."""
        if self.is_llama_cpp:
            return subprocess.run([*self.command, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        return "sha256 " + hashlib.sha256(Path(self.command[0]).read_bytes()).hexdigest()[:16]

    @property
    def is_llama_cpp(self) -> bool:
        """It is the llama_cpp package behind llama_cpp_bench.py, not a binary."""
        return self.command[-1] == str(LLAMA_CPP_BENCH)

    @property
    def has_depth(self) -> bool:
        return "--n-depth" in self.help_text

    def in_lockstep(self, test: Test) -> Test:
        """What stands for parallel sequences in a program that has none: a prompt that is computed as many tokens at a time."""
        alone = test.n_parallel == 1 or "--n-parallel" in self.help_text
        return test if alone else Test(test.n_gen * test.n_parallel, 0, test.n_depth)

    @property
    def sweep_bench(self) -> Path:
        """ik_llama.cpp's program for prompts at a depth, expected beside its llama-bench."""
        return Path(self.command[0]).with_name("llama-sweep-bench")

    def needs_sweep_bench(self, test: Test) -> bool:
        return bool(test.n_depth and test.n_prompt and not self.has_depth)

    def arguments(self, test: Test, model: Path, threads: int, flags: list[str], repetitions: int) -> list[str]:
        """The command that runs one test."""
        if test.n_parallel > 1:
            if (same := self.in_lockstep(test)) is not test:
                batch = str(test.n_parallel)
                return [*self.arguments(same, model, threads, flags, repetitions), "-b", batch, "-ub", batch]
            flags = [*flags, "-npl", str(test.n_parallel)]
        if self.needs_sweep_bench(test):
            return self._sweep_bench_arguments(test, model, threads, flags)
        lengths = ["-p", str(test.n_prompt), "-n", str(test.n_gen)]
        if test.n_depth and self.has_depth:
            lengths += ["-d", str(test.n_depth)]
        elif test.n_depth:
            lengths = ["-p", "0", "-n", "0", "-gp", f"{test.n_depth},{test.n_gen}"]
        return [*self.command, "-m", str(model), "-t", str(threads), *lengths, "-r", str(repetitions), "-o", "json", *flags]

    def _sweep_bench_arguments(self, test: Test, model: Path, threads: int, flags: list[str]) -> list[str]:
        if test.n_depth % test.n_prompt or not self.sweep_bench.exists():
            raise BenchError(f"{self.name} measures {test.name} only with {self.sweep_bench}, at a depth that is a multiple of the prompt")
        batch, context, stride = str(test.n_prompt), str(test.n_depth + test.n_prompt), str(test.n_depth // test.n_prompt)
        spelled = [word for flag, value in zip(flags[::2], flags[1::2], strict=True) for word in SWEEP_BENCH_FLAGS[flag][value]]
        return [str(self.sweep_bench), "-m", str(model), "-t", str(threads), "-c", context, "-b", batch, "-ub", batch,
                "--sweep-stride", stride, "--output-format", "jsonl", "--log-file", os.devnull, *spelled]

    def read_rate(self, test: Test, output: str) -> float:
        """Tokens per second from what the command of `arguments` printed."""
        test = self.in_lockstep(test)
        if not self.needs_sweep_bench(test):
            return rate(json_rows(output), test)
        found = [row["speed_pp"] for row in json_lines(output) if row["n_kv"] == test.n_depth]
        if not found:
            raise BenchError(f"{self.sweep_bench} printed no row at depth {test.n_depth}: {output[-300:]!r}")
        return float(found[0])


def ourselves(python: str = sys.executable) -> Contestant:
    return Contestant("pyggml", (python, "-m", "pyggml", "bench"))


def rival(argument: str) -> Contestant:
    """A rival from NAME=PATH (a llama-bench binary), `llama_cpp` (the package, this Python) or llama_cpp=PATH (that Python's package)."""
    name, _, path = argument.partition("=")
    if name == "llama_cpp":
        return Contestant(name, (path or sys.executable, str(LLAMA_CPP_BENCH)))
    if not Path(path).is_file():
        raise BenchError(f"--rival {argument}: give NAME=PATH of a llama-bench binary, or llama_cpp")
    return Contestant(name, (path,))
