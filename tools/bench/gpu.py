"""Everything that pyggml claims about a GPU, measured on one: a short table comes last.

    python tools/bench/gpu.py --oracle FOLDER --shapes tinyllama-1.1b,llama3-8b --types Q4_0,Q4_K_M,Q8_0,F16 --results gpu.json

    machine     the GPU, the bytes it copies a second, the FP16 products it makes a second (cuBLAS, where there is one)
    goldens     logits of llama.cpp (FOLDER/models, FOLDER/golden): every model within the bounds of tools/golden.py
    greedy      512 tokens of each model, equal to the CPU backend's up to the first near-tie
    speed       per shape and type: upload, memory against the forecast, decode, prefill, depths, batches
    rival       llama-bench (--llama-bench PATH) on the same models
    leak        1,000 contexts, and the memory that is free before and after them
    sanitizer   compute-sanitizer over a golden model, where it is installed

A section is steps, each with a budget in seconds: a step that fails, or is not done in time, is reported and the next one runs. With --results
every figure is kept in a file, and a later call goes on where this one ended; --dry-run lists the steps, their budgets and what is done.
Models are random (random_model.py), made in --folder when a step needs them and deleted after the last that does.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import gpu_measures as measures  # noqa: E402
from random_model import MIXES, SHAPES, write_random_model  # noqa: E402

from pyggml.backends.cuda.device import open_device, why_not  # noqa: E402
from pyggml.context import Context  # noqa: E402
from pyggml.errors import PyggmlError  # noqa: E402
from pyggml.model import Model  # noqa: E402

# seconds that a step of a section, or of a part of one, may take
BUDGETS = {"machine": 120, "goldens": 90, "greedy": 300, "loading": 180, "decoding": 180, "prefilling": 240, "depths": 240, "batches": 240,
           "rival": 300, "leak": 600, "sanitizer": 900}
SPEED = ("loading", "decoding", "prefilling", "depths", "batches")
SECTIONS = ("machine", "goldens", "greedy", "speed", "rival", "leak", "sanitizer")
OF_MODELS = ("greedy", "speed", "rival")


class Results:
    """Figures by (section, what), and when each step began and ended; kept in a file where one is named."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        kept = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.rows: dict[str, dict[str, str]] = kept.get("rows", {})
        self.steps: dict[str, dict[str, str]] = kept.get("steps", {})

    def add(self, section: str, what: str, figure: str, goal: str = "", met: bool | None = None) -> None:
        verdict = "" if met is None else "yes" if met else "NO"
        self.rows[f"{section}|{what}"] = {"figure": figure, "goal": goal, "met": verdict, "date": now()}
        print(f"{section:<10} {what:<44} {figure:<34} {goal:<22} {verdict}", flush=True)
        self.keep()

    def keep(self) -> None:
        if self.path is not None:
            beside = self.path.with_suffix(".tmp")
            beside.write_text(json.dumps({"rows": self.rows, "steps": self.steps}, indent=1))
            beside.replace(self.path)

    def number(self, section: str, what: str) -> float:
        """A figure from before, as its leading number; 0 where it is not known."""
        row = self.rows.get(f"{section}|{what}")
        return float(row["figure"].split()[0]) if row else 0.0

    def state(self, step: Step) -> str:
        """How far a step came in this call or an earlier one: to do, done, failed, never ended."""
        known = self.steps.get(step.key)
        return "to do" if known is None else known["state"]

    def mark(self, step: Step, state: str) -> None:
        self.steps[step.key] = {"state": state, "date": now()}
        self.keep()

    def table(self) -> str:
        lines = ["| section | what | figure | goal | met |", "|---|---|---|---|---|"]
        for key, row in self.rows.items():
            section, what = key.split("|")
            lines.append(f"| {section} | {what} | {row['figure']} | {row['goal']} | {row['met']} |")
        return "\n".join(lines)


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")


@dataclass(frozen=True)
class Source:
    """A model to measure: a file, or a shape and type of which one is made there."""

    path: Path
    shape: str = ""
    kind: str = ""

    @property
    def name(self) -> str:
        return f"{self.shape} {self.kind}" if self.shape else self.path.stem


class Step(NamedTuple):
    """One thing to measure."""

    section: str
    name: str
    seconds: float
    work: Callable[[Run], None]
    source: Source | None = None

    @property
    def key(self) -> str:
        return f"{self.section} {self.name}".strip()


class Run:
    """One call of this script: its options, its results, and how long it may go on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.results, self.end = args, Results(args.results), time.monotonic() + args.limit

    @cached_property
    def device(self) -> Any:
        return open_device(self.args.main_gpu)

    def context(self, model: Model, **options: Any) -> Context:
        return Context(model, n_gpu_layers="all", main_gpu=self.args.main_gpu, **options)

    def go(self, steps: list[Step]) -> None:
        """All steps that are to do, and those that failed before."""
        made: set[Path] = set()
        for n, step in enumerate(steps):
            state = self.results.state(step)
            if state == "never ended" and not self.args.again:
                self.results.add("failed", step.key, "an earlier call ended in it; --again tries once more", "", False)
            elif state == "done" and not self.args.again:
                print(f"kept from an earlier call: {step.key}")
            elif time.monotonic() > self.end:
                print(f"left out, as {self.args.limit:.0f} s are over: {step.key}")
            else:
                print(f"---- {step.key}", flush=True)
                self.one(step, made)
            path = step.source.path if step.source is not None else None
            if path in made and not self.args.keep and all(s.source is None or s.source.path != path for s in steps[n + 1:]):
                path.unlink()       # type: ignore[union-attr]

    def one(self, step: Step, made: set[Path]) -> None:
        """One step; what fails is told and counted."""
        self.results.mark(step, "never ended")
        said = ""
        try:
            if step.source is not None and step.source.shape and not step.source.path.exists():
                write_random_model(step.source.path, step.source.shape, step.source.kind)
                made.add(step.source.path)
            with within(step.seconds * self.args.patience):
                step.work(self)
        except (PyggmlError, TimeoutError) as error:
            said = str(error)
        except KeyboardInterrupt:
            self.results.mark(step, "to do")
            raise
        except Exception as error:      # noqa: BLE001  a kernel that does not compile must not hide what the others do
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
        self.results.rows.pop(f"failed|{step.key}", None)       # of an earlier call
        if said:
            self.results.add("failed", step.key, said.replace("|", "/").replace("\n", " ")[:200], "", False)
        self.results.mark(step, "failed" if said else "done")


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """TimeoutError after so long; what does not even return from a call into the driver ends the process some time later."""
    def too_late(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.4g} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(2 * seconds + 60, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


# ---- the steps ----------------------------------------------------------------------------------------------------------------

def sources(args: argparse.Namespace) -> list[Source]:
    """The models asked for; the bundled one where there are none."""
    pairs = product(filter(None, args.shapes.split(",")), args.types.split(","))
    made = [Source(args.folder / f"{shape}-{kind}.gguf", shape, kind) for shape, kind in pairs]
    return [*(Source(path) for path in args.models), *made] or [Source(measures.BUNDLED)]


def steps(args: argparse.Namespace) -> list[Step]:
    """Everything asked for, in order; what concerns one model stands together."""
    out: list[Step] = []
    wanted = args.sections.split(",")
    if "machine" in wanted:
        out.append(Step("machine", "", BUDGETS["machine"], measures.machine))
    if "goldens" in wanted:
        out += goldens(args)
    for source in sources(args):
        for section in (s for s in OF_MODELS if s in wanted):
            for name in SPEED if section == "speed" else (section,):
                work = getattr(measures, name)
                out.append(Step(section, f"{source.name} {name}" if section == "speed" else source.name, BUDGETS[name], partial(work, source=source),
                                source))
    out += [Step(name, "", BUDGETS[name], getattr(measures, name)) for name in ("leak", "sanitizer") if name in wanted]
    return out


def goldens(args: argparse.Namespace) -> list[Step]:
    """A step for each golden file, or one that fails for want of any."""
    paths = measures.golden_files(args.oracle, args.only) or [None]
    return [Step("goldens", path.stem if path else "", BUDGETS["goldens"], partial(measures.golden, path=path)) for path in paths]


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--oracle", type=Path, metavar="FOLDER")
    parser.add_argument("--only", help="golden files whose name contains this")
    parser.add_argument("--shapes", default="", help=f"of random models: {', '.join(SHAPES)}")
    parser.add_argument("--types", default="Q4_0,Q4_K_M,Q8_0,F16", help=f"of them: {', '.join(MIXES)} (default: %(default)s)")
    parser.add_argument("--models", type=Path, nargs="*", default=[], metavar="FILE", help="models of your own")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where random models are made (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave them there")
    parser.add_argument("--n-gen", type=int, default=128)
    parser.add_argument("--n-prompt", type=numbers, default=[512, 2048])
    parser.add_argument("--depths", type=numbers, default=[0, 4096, 32768])
    parser.add_argument("--batches", type=numbers, default=[1, 4, 16, 64])
    parser.add_argument("--greedy", type=int, default=512, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=1000, help="contexts of the leak section (default: %(default)s)")
    parser.add_argument("--llama-bench", type=Path, metavar="PATH")
    parser.add_argument("--main-gpu", type=int, default=0, metavar="N")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="start nothing new after so long")
    parser.add_argument("--patience", type=float, default=1, metavar="FACTOR", help="of every step's budget (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="FILE")
    parser.add_argument("--again", action="store_true", help="measure anew what the results file has")
    parser.add_argument("--dry-run", action="store_true", help="list the steps; measure nothing")
    args = parser.parse_args(argv)
    if unknown := set(args.sections.split(",")) - set(SECTIONS):
        parser.error(f"no section {sorted(unknown)[0]!r}; there are {', '.join(SECTIONS)}")
    run, todo = Run(args), steps(args)
    if args.dry_run:
        for step in todo:
            print(f"{step.key:<60} {step.seconds * args.patience:>6.0f} s  {run.results.state(step)}")
        print(f"{len(todo)} steps, {sum(s.seconds for s in todo) * args.patience:.0f} s at the most")
    if reason := why_not(args.main_gpu):
        print(f"gpu.py: nothing can be measured: {reason}", file=sys.stderr)
        return int(not args.dry_run)
    if args.dry_run:
        return 0
    run.go(todo)
    print("\n" + run.results.table())
    return int(any(row["met"] == "NO" for row in run.results.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
