"""How tools/bench/gpu.py runs its steps: each in a process of its own, as one that touches memory which is not its own leaves a GPU's
context of no more use to anybody in its process. Figures and what is done are kept in a file, where one is named.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from random_model import write_random_model

from pyggml.backends.cuda.device import open_device
from pyggml.context import Context
from pyggml.errors import PyggmlError
from pyggml.model import Model

SCRIPT = Path(__file__).with_name("gpu.py")
GRACE = 60              # seconds in which a process whose time is over has to end


class Results:
    """Figures by (section, what), and how each step ended; kept in a file where one is named."""

    def __init__(self, path: Path | None) -> None:
        self.path, self._lock = path, threading.Lock()
        kept = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.rows: dict[str, dict[str, str]] = kept.get("rows", {})
        self.steps: dict[str, dict[str, str]] = kept.get("steps", {})

    def add(self, section: str, what: str, figure: str, goal: str = "", met: bool | None = None) -> None:
        verdict = "" if met is None else "yes" if met else "NO"
        print(f"{section:<10} {what:<44} {figure:<34} {goal:<22} {verdict}", flush=True)
        self.take({f"{section}|{what}": {"figure": figure, "goal": goal, "met": verdict, "date": now()}}, {})

    def take(self, rows: dict[str, dict[str, str]], steps: dict[str, dict[str, str]]) -> None:
        """Keep these too."""
        with self._lock:
            self.rows |= rows
            self.steps |= steps
            self._write()

    def begin(self, step: Step) -> None:
        """Forget how the step ended in an earlier call."""
        with self._lock:
            self.rows.pop(f"failed|{step.key}", None)
            self.steps.pop(step.key, None)

    def mark(self, step: Step, failed: str) -> None:
        """The step ended, with a sentence about what went wrong, if anything."""
        if failed:
            self.add("failed", step.key, failed.replace("|", "/").replace("\n", " ")[:200], "", False)
        self.take({}, {step.key: {"state": "failed" if failed else "done", "date": now()}})

    def _write(self) -> None:
        if self.path is not None:
            beside = self.path.with_suffix(".tmp")
            beside.write_text(json.dumps({"rows": self.rows, "steps": self.steps}, indent=1))
            beside.replace(self.path)

    def number(self, section: str, what: str) -> float:
        """A figure from before, as its leading number; 0 where it is not known."""
        row = self.rows.get(f"{section}|{what}")
        return float(row["figure"].split()[0]) if row else 0.0

    def state(self, step: Step) -> str:
        """How a step ended in this call or an earlier one: to do, done, failed."""
        known = self.steps.get(step.key)
        return "to do" if known is None else known["state"]

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
    """One thing to measure, in so many seconds; `beside`: speed is not what it measures, so that others may run at the same time."""

    section: str
    name: str
    seconds: float
    work: Callable[[Run], None]
    source: Source | None = None
    beside: bool = False

    @property
    def key(self) -> str:
        return f"{self.section} {self.name}".strip()


class Run:
    """One call of the script: its options, its results, and how long it may go on. `given`: its command line."""

    def __init__(self, args: argparse.Namespace, given: list[str]) -> None:
        self.args, self.given, self.results, self.end = args, given, Results(args.results), time.monotonic() + args.limit
        self._needed: Counter[Path] = Counter()
        self._made: set[Path] = set()

    @cached_property
    def device(self) -> Any:
        return open_device(self.args.main_gpu)

    def context(self, model: Model, **options: Any) -> Context:
        return Context(model, n_gpu_layers="all", main_gpu=self.args.main_gpu, **options)

    def go(self, steps: list[Step]) -> None:
        """All steps that are to do, and those that failed before."""
        self._needed = Counter(step.source.path for step in steps if step.source is not None)
        for beside, group in groupby(steps, lambda step: step.beside and not self.args.in_process):
            if beside:
                with ThreadPoolExecutor(self.args.jobs) as pool:
                    list(pool.map(self.turn, group))
            else:
                for step in group:
                    self.turn(step)

    def turn(self, step: Step) -> None:
        if self.results.state(step) == "done" and not self.args.again:
            print(f"kept from an earlier call: {step.key}")
        elif time.monotonic() > self.end:
            print(f"left out, as {self.args.limit:.0f} s are over: {step.key}")
        else:
            print(f"---- {step.key}", flush=True)
            self.results.begin(step)
            try:
                self.make(step.source)
            except (OSError, PyggmlError) as error:
                self.results.mark(step, f"{step.source.name if step.source else ''} cannot be made: {error}")
            else:
                (self.here if self.args.in_process else self.apart)(step)
        if step.source is not None:
            self._needed[path := step.source.path] -= 1
            if path in self._made and not self._needed[path] and not self.args.keep:
                path.unlink()

    def make(self, source: Source | None) -> None:
        """The model of a shape and type, where it is not there yet."""
        if source is not None and source.shape and not source.path.exists():
            write_random_model(source.path, source.shape, source.kind)
            self._made.add(source.path)

    def seconds(self, step: Step) -> float:
        """What a step may take of the time that is left."""
        return max(1, min(step.seconds * self.args.patience, self.end - time.monotonic()))

    def here(self, step: Step) -> None:
        """One step in this process; what fails is told and counted."""
        failed = ""
        try:
            with within(self.seconds(step)):
                step.work(self)
        except (PyggmlError, TimeoutError) as error:
            failed = str(error)
        except Exception as error:      # noqa: BLE001  a kernel that does not compile must not hide what the others do
            traceback.print_exc()
            failed = f"{type(error).__name__}: {error}"
        self.results.mark(step, failed)

    def apart(self, step: Step) -> None:
        """One step in a process of its own, which knows the figures so far and leaves its own in a file."""
        seconds, given = self.seconds(step), dict(self.results.rows)
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) / "results.json"
            kept.write_text(json.dumps({"rows": given}))
            command = [sys.executable, str(SCRIPT), *self.given, "--in-process", "--step", step.key, "--results", str(kept), "--limit", str(seconds)]
            try:
                ended = f"its process ended with {subprocess.run(command, check=False, timeout=seconds + 2 * GRACE).returncode}"
            except subprocess.TimeoutExpired:
                ended = f"its process was not done after {seconds + 2 * GRACE:.0f} s"
            found = Results(kept)
        self.results.take({key: row for key, row in found.rows.items() if row != given.get(key)}, found.steps)
        if step.key not in found.steps:
            self.results.mark(step, ended)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """TimeoutError after so long; what does not even return from a call into the driver ends the process some time later."""
    def too_late(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.4g} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
