"""Which processors work: how many cores there are, masks and ranges as llama.cpp's flags give them, and workers spread over NUMA nodes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from pyggml.errors import ParameterError

SYSTEM = Path("/sys/devices/system")
NUMA = ("distribute", "isolate", "numactl")


def usable() -> set[int]:
    """Processors that this thread may run on."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Physical cores this thread may use (hyper-threads of one core count once)."""
    cores = set()
    for cpu in usable():
        siblings = SYSTEM / f"cpu/cpu{cpu}/topology/thread_siblings_list"
        cores.add(siblings.read_text().strip() if siblings.exists() else cpu)
    return max(1, len(cores))


def processors(text: str) -> set[int]:
    """"0,2-4" -> {0, 2, 3, 4}, as Linux writes lists of processors."""
    spans = [part.partition("-") for part in text.strip().split(",") if part]
    return {cpu for first, _, last in spans for cpu in range(int(first), int(last or first) + 1)}


def nodes() -> list[set[int]]:
    """The usable processors of each NUMA node that has any; one node where the system tells of none."""
    lists = (path.read_text() for path in sorted(SYSTEM.glob("node/node[0-9]*/cpulist")))
    return [cpus for text in lists if (cpus := processors(text) & usable())] or [usable()]


def wanted(mask: str | None, span: str | None) -> set[int] | None:
    """Processors of -C MASK (hexadecimal) and -Cr FIRST-LAST together; None when neither is given. ParameterError for what cannot be."""
    if mask is None and span is None:
        return None
    cpus: set[int] = set()
    if mask is not None:
        if not re.fullmatch(r"(0[xX])?[0-9a-fA-F]+", mask):
            raise ParameterError(f"--cpu-mask {mask!r} is not a hexadecimal number; 3 stands for the first two processors")
        bits = int(mask, 16)
        cpus |= {i for i in range(bits.bit_length()) if bits >> i & 1}
    if span is not None:
        found = re.fullmatch(r"(\d*)-(\d*)", span)
        if not found or (last := int(found[2] or max(usable()))) < (first := int(found[1] or 0)):
            raise ParameterError(f"--cpu-range {span!r} is not a range; write FIRST-LAST, such as 0-3")
        cpus |= set(range(first, min(last, max(usable())) + 1))
    if not cpus & usable():
        raise ParameterError(f"none of the processors asked for is usable here; usable are {', '.join(map(str, sorted(usable())))}")
    return cpus & usable()


def confine(cpus: set[int]) -> None:
    """Run this thread, and those it starts from now on, on `cpus` alone."""
    if not hasattr(os, "sched_setaffinity"):
        raise ParameterError("this system lets no program choose its processors; leave out --cpu-mask, --cpu-range and --numa")
    os.sched_setaffinity(0, cpus)


def here() -> set[int]:
    """Processors of the node that this thread runs on now."""
    stat = Path("/proc/thread-self/stat").read_text()
    cpu = int(stat[stat.rindex(")"):].split()[37])         # field 39 of proc(5), counted from the third, which follows the name
    return next((node for node in nodes() if cpu in node), usable())


# Places of workers: functions from a number of workers to the processors of each. They hold what was usable when they were made, for
# the first worker is the calling thread, which is confined itself.
Place = Callable[[int], list[set[int]]]


def one_each() -> Place:
    """A processor of its own for each worker, in order, as long as there are enough."""
    cpus = sorted(usable())
    return lambda n_threads: [{cpus[i % len(cpus)]} for i in range(n_threads)]


def over_nodes() -> Place:
    """The node of each worker: neighbours work on the same node, and every node gets as many."""
    parts = nodes()
    return lambda n_threads: [parts[i * len(parts) // n_threads] for i in range(n_threads)]
