"""Running contestants: one watched process at a time, each rival at its best flags, rounds until enough of them were undisturbed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from contestants import QUICK_FLAGS, SPEED_FLAGS, BenchError, Contestant, Test, flag_sets
from pairing import running_order
from quiet import disturbances, run_watched, wait_until_quiet


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_json(path: Path, value: object) -> None:
    """Beside, then renamed, so that a killed run leaves the last whole file."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


@dataclass(frozen=True)
class Setting:
    """How a contestant runs one test."""

    threads: int
    flags: list[str]

    def __str__(self) -> str:
        return " ".join([*self.flags, "-t", str(self.threads)])


@dataclass(frozen=True)
class Bench:
    """How anything is run: `prefix` pins a command to processors; seconds to wait for quiet and for a run; whether quiet is required;
    measurements in one process; whether a quick look will do: a sweep tries fewer flags, once, for prompts and for generations."""

    prefix: list[str]
    patience: float
    timeout: float
    strict: bool
    repetitions: int
    quick: bool = False

    def run(self, contestant: Contestant, test: Test, model: Path, setting: Setting) -> dict:
        """One fresh process: its rate (tokens per second) with everything that tells whether to believe it."""
        quiet = wait_until_quiet(self.patience)
        command = contestant.arguments(test, model, setting.threads, setting.flags, self.repetitions)
        run = run_watched([*self.prefix, *command], self.timeout)
        if run.status:
            raise BenchError(f"{' '.join(run.command)} ends with status {run.status}: {run.output.strip()[-500:]}")
        return {"rate": contestant.read_rate(test, run.output), "wall": run.wall, "load": run.load, "quiet before": quiet, **run.figures}

    def retried(self, contestant: Contestant, test: Test, model: Path, setting: Setting) -> tuple[dict, list[str]]:
        """A run, again while it was disturbed, at most three; the last one and what disturbed it."""
        for _ in range(3):
            run = self.run(contestant, test, model, setting)
            why = disturbances(run) if self.strict else []
            if not why:
                break
        return run, why


@dataclass
class FlagBook:
    """The best setting of each rival per model and test, found once and kept in a file (a disturbed sweep only serves this session)."""

    path: Path
    entries: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.entries = json.loads(self.path.read_text())

    def best(self, bench: Bench, contestant: Contestant, test: Test, model: Path, thread_counts: Sequence[int]) -> Setting:
        """The rival's fastest setting, from the file or from a sweep over its flags and these thread counts."""
        size = model.stat().st_size
        if bench.quick:
            test = Test(128, 0) if contestant.in_lockstep(test).n_prompt else Test(0, 32)
        key = f"{contestant.name} ({contestant.identity}): {test.name}, {model.name} ({size} bytes), threads {list(thread_counts)}"
        key += ", quick" if bench.quick else ""
        if key not in self.entries:
            say(f"sweep of {key}")
            self.entries[key] = self._sweep(bench, contestant, test, model, thread_counts)
            kept = {name: entry for name, entry in self.entries.items() if not entry["disturbed"]}
            write_json(self.path, kept)
        return Setting(**self.entries[key]["best"])

    @staticmethod
    def _sweep(bench: Bench, contestant: Contestant, test: Test, model: Path, thread_counts: Sequence[int]) -> dict:
        choices = flag_sets(contestant.help_text, QUICK_FLAGS if bench.quick else SPEED_FLAGS)
        settings = [Setting(threads, flags) for threads in thread_counts for flags in choices]
        rates, disturbed = dict.fromkeys(map(str, settings), 0.0), []
        again = [] if bench.quick else list(reversed(settings))
        for setting in [*settings, *again]:                           # the better of two runs: noise only ever slows down
            run, why = bench.retried(contestant, test, model, setting)
            rates[str(setting)] = max(rates[str(setting)], run["rate"])
            disturbed += [f"{setting}: {reason}" for reason in why]
            say(f"  {setting}: {run['rate']:.2f} t/s  {'; '.join(why)}")
        return {"best": asdict(max(settings, key=lambda setting: rates[str(setting)])), "tried": rates, "disturbed": disturbed}


def measure_rounds(bench: Bench, settings: dict[Contestant, Setting], test: Test, model: Path, pairs: int) -> list[dict]:
    """Rounds until `pairs` of them count, at most twice as many. A round: {"runs": {name: run}, "disturbed": [why]}."""
    contestants = {c.name: c for c in settings}
    rounds: list[dict] = []
    while sum(counts(r, bench.strict) for r in rounds) < pairs and len(rounds) < 2 * pairs:
        runs = {}
        for name in running_order(list(contestants), len(rounds)):
            runs[name] = bench.run(contestants[name], test, model, settings[contestants[name]])
        disturbed = [f"{name}: {why}" for name, run in runs.items() for why in disturbances(run)]
        rounds.append({"runs": runs, "disturbed": disturbed})
        rates = ", ".join(f"{name} {run['rate']:.2f}" for name, run in runs.items())
        say(f"  round {len(rounds)}: {rates}  {'; '.join(disturbed)}")
    return rounds


def counts(round_: dict, strict: bool) -> bool:
    return not (strict and round_["disturbed"])
