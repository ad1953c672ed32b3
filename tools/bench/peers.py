"""pyggml beside its rivals on one machine: fresh processes in alternating order, medians of per-pair ratios with their intervals.

    python tools/bench/peers.py -m model.gguf --rival llama_cpp --rival ik=path/to/llama-bench --agreement --cold 5 -o report.json
    python tools/bench/peers.py -m model.gguf --rival ik=path/to/llama-bench --tests pp512,tg128@4096,tg64x4 --quick

Each rival first runs every test with each combination of its speed flags; the best are kept in a JSON file (`--flags`) and used
from then on, until the program changes. A round is one run of every contestant; a round during which the machine was disturbed
(see quiet.py) is recorded, left out, and run again. Results go to standard output, and as JSON to a file (`-o`); with `--resume`
what that file holds of the same commit and models is not measured again.

How rivals without a test's flag are asked: a generation at a depth is ik_llama.cpp's `-gp depth,n`, a prompt at a depth its
llama-sweep-bench, and a generation of N sequences at once is a prompt in batches of N tokens (`-b N -ub N`), which reads the weights
as often and computes logits only at the end.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from agreement import agreement
from contestants import BenchError, Contestant, Test, ourselves, rival
from pairing import compare
from quiet import LIMITS, machine
from report import markdown
from runs import Bench, FlagBook, Setting, counts, measure_rounds, say, write_json
from startup import measure_starts

EVERYTHING = "pp512,pp128,tg128,pp512@4096,tg32@4096,tg64x2,tg64x4,tg64x8"


@contextmanager
def only_one() -> Iterator[None]:
    """One benchmark at a time on this machine."""
    with open(Path(tempfile.gettempdir()) / "pyggml-bench.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BenchError("another benchmark is running on this machine; wait for it") from None
        yield


@contextmanager
def neighbours(count: int) -> Iterator[list[subprocess.Popen]]:
    """So many processes that compute without end beside what is measured, on the same processors."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield burners
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def summarise(rounds: Sequence[dict], ours: str, strict: bool) -> dict:
    """Median rates, and for each rival the comparison over the rounds that count (all of them unless `strict`)."""
    counted = [r["runs"] for r in rounds if counts(r, strict)]
    rates = {name: [runs[name]["rate"] for runs in counted] for name in rounds[0]["runs"]}
    summary: dict = {"rounds": len(rounds), "counted": len(counted)}
    if counted:
        summary["rates"] = {name: median(values) for name, values in rates.items()}
        summary["against"] = {name: compare(rates[ours], values).as_dict() for name, values in rates.items() if name != ours}
    return summary


def measure_test(bench: Bench, book: FlagBook, ours: Contestant, rivals: Sequence[Contestant], test: Test, model: Path,
                 options: argparse.Namespace) -> dict:
    """One test of one model; a rival that cannot run it sits it out, with the reason recorded."""
    settings, absent = {ours: Setting(options.threads, [])}, {}
    for contestant in rivals:
        try:
            settings[contestant] = book.best(bench, contestant, test, model, options.rival_threads or [options.threads])
        except BenchError as error:
            absent[contestant.name] = str(error)
            say(f"{test.name} without {contestant.name}: {error}")
    say(f"{model.name}, {test.name}")
    with neighbours(options.neighbours):
        rounds = measure_rounds(bench, settings, test, model, options.pairs)
    chosen = {contestant.name: {"threads": s.threads, "flags": " ".join(s.flags)} for contestant, s in settings.items()}
    return summarise(rounds, ours.name, bench.strict) | {"settings": chosen, "absent": absent, "runs": rounds}


def measure(options: argparse.Namespace) -> dict:
    """The whole comparison; the JSON file is brought up to date after every test."""
    cpus = options.cpus or ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.sched_setaffinity(0, processors(cpus))              # the calibrations must run where the contestants do
    bench = Bench(["taskset", "-c", cpus], options.patience, options.timeout, not options.keep_disturbed, options.repetitions,
                  options.quick)
    ours, rivals, book = ourselves(options.python), [rival(text) for text in options.rival], FlagBook(options.flags)
    models: list[dict] = []
    report = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit(), "machine": machine(),
              "threads": options.threads, "processors": cpus, "neighbours": options.neighbours, "limits": LIMITS,
              "rivals": {c.name: {"command": c.command, "identity": c.identity} for c in rivals}, "models": models}
    known = earlier(options, report)
    for path in options.model:
        model = {"model": path.name, "bytes": path.stat().st_size, "tests": {}}
        model |= known.get((model["model"], model["bytes"]), {})
        models.append(model)
        for test in options.tests:
            if test.name in model["tests"]:
                say(f"{path.name}, {test.name}: measured before")
                continue
            model["tests"][test.name] = measure_test(bench, book, ours, rivals, test, path, options)
            if options.output:
                write_json(options.output, report)
        if options.agreement and "agreement" not in model:
            model["agreement"] = agreement(options.python, options.agreement, path, options.threads)
        if options.cold and "start" not in model:
            model["start"] = measure_starts([ours, *rivals], path, options.threads, bench.prefix, options.cold)
        if options.output:
            write_json(options.output, report)
    return report


def earlier(options: argparse.Namespace, report: dict) -> dict[tuple[str, int], dict]:
    """What an interrupted measurement of the same thing left in the output file, by model and size."""
    if not (options.resume and options.output and options.output.exists()):
        return {}
    before = json.loads(options.output.read_text())
    same = all(before.get(key) == report[key] for key in ("commit", "threads", "processors", "neighbours", "rivals"))
    if not same:
        raise BenchError(f"{options.output} is of another commit, setting or rival; leave out --resume, or write to another file (-o)")
    return {(m["model"], m["bytes"]): m for m in before["models"]}


def commit() -> str:
    """The commit measured, with a + when files differ from it."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True).stdout.strip()
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def processors(text: str) -> list[int]:
    """"0,2-4" -> [0, 2, 3, 4]."""
    spans = [part.partition("-") for part in text.split(",")]
    return [cpu for first, _, last in spans for cpu in range(int(first), int(last or first) + 1)]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    def ints(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("-m", "--model", type=Path, action="append", required=True, help="model file; may be given again")
    add("--rival", action="append", default=[], metavar="NAME=PATH", help="a llama-bench binary, or llama_cpp[=PYTHON]; may be given again")
    add("--python", default=sys.executable, help="the Python that runs pyggml")
    add("--tests", type=lambda text: [Test.parse(name) for name in text.split(",")], metavar="NAMES",
        help=f"what to measure, by llama-bench's names (default: {EVERYTHING})")
    add("--quick", action="store_true", help="two rounds of each test, disturbed or not, and few flags of each rival tried once: a look, not a claim")
    add("--resume", action="store_true", help="go on with what the output file holds")
    add("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--rival-threads", type=ints, default=[], help="thread counts that a rival may choose from (default: -t)")
    add("--cpus", help="processors to pin to, as taskset writes them (default: those allowed now)")
    add("-r", "--repetitions", type=int, default=1, help="measurements in each process; more for tests of less than a second")
    add("--pairs", type=int, default=11, help="undisturbed rounds wanted")
    add("--flags", type=Path, default=Path("peers-flags.json"), help="where the best flags of rivals are kept")
    add("--agreement", metavar="PYTHON", nargs="?", const=sys.executable, help="compare logits with the llama_cpp of PYTHON (this one)")
    add("--cold", type=int, default=0, metavar="ROUNDS", help="also measure start to first token and memory, this many rounds")
    add("--neighbours", type=int, default=0, metavar="N", help="keep N processors busy with other work during the rounds, which then all count")
    add("--keep-disturbed", action="store_true", help="count disturbed rounds too (they stay marked)")
    add("--patience", type=float, default=60, help="seconds to wait for a quiet machine before a run")
    add("--timeout", type=float, default=1800, help="seconds a run may take")
    add("-o", "--output", type=Path, help="write everything measured to this JSON file")
    options = parser.parse_args(argv)
    options.tests = options.tests or [Test.parse(name) for name in EVERYTHING.split(",")]
    if options.neighbours:
        options.keep_disturbed, options.patience = True, 0
    if options.quick:
        options.pairs, options.keep_disturbed, options.patience, options.cold = 2, True, 0, min(options.cold, 2)
    return options


def main() -> int:
    options = arguments()
    try:
        with only_one():
            print(markdown(measure(options)), end="")
    except BenchError as error:
        say(f"peers.py: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
