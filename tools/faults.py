#!/usr/bin/env python3
"""Faults that a test cannot make in its own process.

    python tools/faults.py kill [--folder DIR]      kills `edit` at every system call it makes (needs strace), in each way it can change a file
    python tools/faults.py mount                    runs the tests of writing on xfs and btrfs, which share and insert blocks (needs root and mkfs)
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pyggml import formats  # noqa: E402
from pyggml.formats.edit import PADDING, Edits, edit  # noqa: E402

MARK = "/begin-of-the-edit"
PROGRAM = (f"import os, sys; from pyggml.formats.edit import Edits, edit; import json; os.path.exists({MARK!r}); "
           "edit(sys.argv[1], Edits(json.loads(sys.argv[2])))")
BASE = {"general.architecture": "llama", "general.name": "model"}
WAYS = {            # what is changed, and whether somebody else has the file open
    "in place": ({"general.name": "MODEL"}, False), "grown": ({"tokenizer.chat_template": "x" * 9000}, False),
    "rewritten": ({"general.name": "MODEL"}, True), "grown and rewritten": ({"tokenizer.chat_template": "x" * 9000}, True)}
CALL = re.compile(r"(?:\d+ +)?(\w+)\(")


def contents(path: Path) -> tuple[dict[str, object], dict[str, bytes]]:
    file = formats.open(path, use_mmap=False)
    return {k: file.kv[k] for k in file.kv if k != PADDING}, {name: t.stored.tobytes() for name, t in file.tensors.items()}


def traced(path: Path, values: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["strace", "-f", *options, sys.executable, "-c", PROGRAM, str(path), values]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def kill(folder: Path) -> int:
    """0 when the file was the old or the new one after every kill."""
    import json

    path, log = folder / "m.gguf", folder.parent / "strace.log"
    formats.write(path, BASE, {"a": np.arange(3000, dtype=np.float32)})
    original, old, bad = path.read_bytes(), contents(path), 0
    for way, (values, shared) in WAYS.items():
        text = json.dumps(values)
        with ExitStack() as stack:
            def reset(stack: ExitStack = stack, shared: bool = shared) -> None:
                stack.close()
                path.write_bytes(original)
                if shared:
                    stack.enter_context(open(path, "rb"))
            reset()
            traced(path, text, "-o", str(log))
            new = contents(path)
            assert new != old, way
            before: Counter[str] = Counter()
            points, begun = [], False
            for line in log.read_text().splitlines():
                begun = begun or MARK in line
                match = CALL.match(line)
                if match:
                    before[match[1]] += 1
                    if begun and match[1] not in ("exit_group", "execve"):
                        points.append((match[1], before[match[1]]))
            died = 0
            for name, n in points:
                reset()
                done = traced(path, text, "-o", "/dev/null", "-e", f"inject={name}:signal=SIGKILL:when={n}")
                died += done.returncode != 0
                found = contents(path)
                stack.close()
                edit(path, Edits({"n": 1}))                        # the next writer cleans up
                edit(path, Edits(remove=["n"]))
                left = [p.name for p in folder.iterdir() if p.name != path.name]
                if found not in (old, new) or contents(path) != found or left:
                    bad += 1
                    print(f"{way}: killed at {name} number {n}: the file is neither old nor new, or {left} is left")
            print(f"{way}: killed at {died} of {len(points)} system calls, {bad} times to the file's harm", flush=True)
    return int(bool(bad))


TESTS = ("test_atomic.py", "test_edit.py", "test_file_tools.py", "test_quantize_pipeline.py")


def mount(folder: Path) -> int:
    """The tests of writing with their files on other file systems; 0 when all pass."""
    status = 0
    for name, force in (("xfs", "-f"), ("btrfs", "-f")):
        if not shutil.which(f"mkfs.{name}"):
            print(f"left out: {name}, which needs mkfs.{name}")
            continue
        image, point = folder / f"{name}.img", folder / name
        with open(image, "wb") as f:
            f.truncate(2 << 30)
        point.mkdir()
        subprocess.run([f"mkfs.{name}", "-q", force, image], check=True)
        subprocess.run(["mount", "-o", "loop", image, point], check=True)
        try:
            tests = [str(ROOT / "tests" / "unit" / test) for test in TESTS]
            status |= subprocess.run([sys.executable, "-m", "pytest", "-q", f"--basetemp={point}/tests", *tests], cwd=ROOT).returncode
            status |= share(point)
        finally:
            subprocess.run(["umount", point], check=True)
    return status


def share(folder: Path) -> int:
    """A rewrite takes no room for the tensors; 0 when that is so."""
    path = folder / "m.gguf"
    formats.write(path, BASE, {"a": np.random.default_rng(0).random(16 << 20, np.float32)})
    os.sync()
    free = os.statvfs(folder).f_bfree
    with open(path, "rb"):
        result = edit(path, Edits({"tokenizer.chat_template": "x" * 9000}), output=folder / "copy.gguf")
    os.sync()
    taken = (free - os.statvfs(folder).f_bfree) * os.statvfs(folder).f_frsize
    same = contents(folder / "copy.gguf")[1] == contents(path)[1]
    print(f"{folder.name}: a copy of {path.stat().st_size} bytes, {result.method}, took {taken} bytes of room")
    return int(taken > 8 << 20 or not same)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("kill", "mount"))
    parser.add_argument("--folder", help="where to work (default: the folder for temporary files)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    (folder / "work").mkdir()
    try:
        return kill(folder / "work") if args.what == "kill" else mount(folder / "work")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
