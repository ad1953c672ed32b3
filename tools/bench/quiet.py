"""Is the machine quiet enough to measure on? Reads what Linux tells about it and judges a run by what happened around it.

A run is disturbed when the hypervisor took time away (steal), when other programs computed, or when a fixed piece of work
took another time after it than before it (the clock or the memory bandwidth moved). Limits are in `LIMITS`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

LIMITS = {
    "steal": 0.005,      # share of processor time that the hypervisor gave to others
    "foreign": 0.02,     # share of processor time that other programs used
    "core": 0.02,        # relative move of the time of fixed work in registers and first-level cache
    "memory": 0.08,      # relative move of the time of a fixed read from memory, which repeats to 2 to 4% by itself
}
TICK = 1 / os.sysconf("SC_CLK_TCK")          # seconds
_CALIBRATION_BYTES = 64 << 20
_calibration_array = np.ones(_CALIBRATION_BYTES // 8, np.int64)
_calibration_text = bytes(16 << 10)


@dataclass(frozen=True)
class Ticks:
    """Seconds since boot, over all processors: computing, taken by the hypervisor, and in all; `own`: used by us and our children."""

    busy: float
    steal: float
    total: float
    own: float


def read_ticks(stat: str | None = None) -> Ticks:
    """The state of /proc/stat (or of the text given)."""
    text = Path("/proc/stat").read_text() if stat is None else stat
    user, nice, system, idle, iowait, irq, softirq, steal = (int(word) * TICK for word in text.split()[1:9])
    busy = user + nice + system + irq + softirq
    return Ticks(busy, steal, busy + idle + iowait + steal, sum(os.times()[:4]))


def shares(before: Ticks, after: Ticks) -> dict[str, float]:
    """Shares of all processor time between two readings that were stolen, and that programs other than ours used.

    Both sides of the second are counted in ticks; two ticks of it are taken for rounding.
    """
    total = max(after.total - before.total, 1e-9)
    foreign = (after.busy - before.busy) - (after.own - before.own) - 2 * TICK
    return {"steal": (after.steal - before.steal) / total, "foreign": max(0.0, foreign / total)}


def _times(work, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def calibrate() -> dict[str, float]:
    """Seconds of two fixed pieces of work: hashing a text that stays in cache, and summing 64 MB from memory. About 50 ms."""
    return {"core": min(_times(lambda: [hashlib.sha256(_calibration_text) for _ in range(50)], 10)),
            "memory": median(_times(_calibration_array.sum, 20))}


def moved(readings: Sequence[dict[str, float]]) -> dict[str, float]:
    """How far each calibration figure moved over several readings, relative to its smallest value."""
    return {name: max(r[name] for r in readings) / min(r[name] for r in readings) - 1 for name in readings[0]}


def disturbances(figures: dict[str, float]) -> list[str]:
    """The figures beyond their limits, as words: ["steal 1.2% > 0.5%"]."""
    return [f"{name} {figures[name]:.1%} > {limit:.1%}" for name, limit in LIMITS.items() if figures.get(name, 0) > limit]


def wait_until_quiet(patience: float, window: float = 0.5) -> bool:
    """Wait until other programs leave the processors alone for `window` seconds, at most `patience` seconds. True when quiet."""
    deadline = time.monotonic() + patience
    while True:
        before = read_ticks()
        time.sleep(window)
        if shares(before, read_ticks())["foreign"] <= LIMITS["foreign"]:
            return True
        if time.monotonic() >= deadline:
            return False


@dataclass
class Run:
    """One watched process."""

    command: list[str]
    output: str                                                    # standard output, then standard error
    status: int
    wall: float                                                    # seconds
    load: float                                                    # 1-minute load average before the run
    figures: dict[str, float] = field(default_factory=dict)        # steal, foreign, core, memory: compare with LIMITS


def run_watched(command: Sequence[str], timeout: float) -> Run:
    """Run a program to its end between two calibrations."""
    load, calibration, ticks, start = os.getloadavg()[0], calibrate(), read_ticks(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    figures = shares(ticks, read_ticks()) | moved([calibration, calibrate()])
    return Run(list(command), done.stdout + done.stderr, done.returncode, wall, load, figures)


def machine() -> dict[str, str]:
    """What a reader needs to place the figures: processor, kernel, huge-page mode, memory."""
    def first(path: str, key: str = "") -> str:
        if not Path(path).exists():
            return "unknown"
        lines = Path(path).read_text().splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "unknown") if key else lines[0]

    return {"processor": first("/proc/cpuinfo", "model name"), "processors": str(os.cpu_count()),
            "siblings of 0": first("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list"),
            "memory": first("/proc/meminfo", "MemTotal"), "huge pages": first("/sys/kernel/mm/transparent_hugepage/enabled"),
            "kernel": os.uname().release}
