"""pyggml doctor: what this machine offers and what pyggml makes of it."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

HELP = "show what this machine offers: instruction sets, GPUs, compiler, threads, memory, extras"

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    for name, text in report():
        print(f"{name:<14}{text}")
    return 0


def report() -> list[tuple[str, str]]:
    """(what, how it is here) in the order to print."""
    import numpy

    from pyggml import __version__, native

    available = native.isa_names()
    return [
        ("pyggml", f"{__version__} in {Path(native.__file__).parent}"),
        ("python", f"{platform.python_version()}, numpy {numpy.__version__}, {platform.system()} {platform.machine()}"),
        ("extension", "loaded" if native.lib is not None else f"MISSING, so that everything runs on numpy, slowly: {native.why_missing}"),
        ("isa", f"{native.isa}; " + (", ".join(f"{isa} {'yes' if ok else 'no'}" for isa, ok in available.items()) or "no native kernels")
         + (" (PYGGML_ISA)" if os.environ.get("PYGGML_ISA") else "")),
        ("cpu", cpu_name()),
        ("gpu", gpus()),
        ("threads", threads()),
        ("compiler", compiler()),
        ("huge pages", huge_pages()),
        ("extras", extras()),
    ]


def cpu_name() -> str:
    """The processor's name as the kernel tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def gpus() -> str:
    """Every GPU, and what keeps it from being used."""
    from pyggml.backends.cuda.device import gpus, why_not

    described = [str(gpu) + (f" (not used: {reason})" if (reason := why_not(gpu.index)) else "") for gpu in gpus()]
    return "; ".join(described) or f"none: {why_not()}"


def threads() -> str:
    from pyggml.backends.cpu import physical_cores

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{physical_cores()} by default (physical cores); {usable} logical here, {os.cpu_count()} in the machine"


def compiler() -> str:
    """The C compiler that an installation from source would use."""
    name = (os.environ.get("CC") or "cc").split()[0]
    path = shutil.which(name)
    if path is None:
        return f"none ({name} is not found): pyggml can be installed from a wheel only; to build it, install gcc or clang"
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return f"{path}: {answer.splitlines()[0]}" if answer else path


def huge_pages() -> str:
    """The mode of transparent huge pages; madvise is enough, as pyggml asks for them where they help."""
    if not _HUGE_PAGES.exists():
        return "not offered by this system"
    mode = re.search(r"\[(\w+)\]", _HUGE_PAGES.read_text())
    choice = mode[1] if mode else "unknown"
    return choice if choice != "never" else f"never; large models run faster with: echo madvise > {_HUGE_PAGES} (as root)"


def extras() -> str:
    """The optional groups of requirements of the installed package, and whether each is complete."""
    from importlib import metadata

    try:
        requirements = metadata.requires("pyggml") or []
    except metadata.PackageNotFoundError:
        return f"unknown: this is a checkout that is not installed; {sys.executable} -m pip install -e . makes it known"
    wanted: dict[str, list[str]] = {}
    for requirement in requirements:
        found = re.match(r"([\w.-]+)[^;]*;.*extra == ['\"]([\w-]+)['\"]", requirement)
        if found:
            wanted.setdefault(found[2], []).append(found[1])
    return ", ".join(f"{extra} {state(names)}" for extra, names in sorted(wanted.items())) or "none"


def state(names: list[str]) -> str:
    """Whether all of these distributions are installed."""
    from importlib import metadata

    missing = []
    for name in names:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    return "yes" if not missing else f"no (without {', '.join(missing)})"
