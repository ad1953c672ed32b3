#!/usr/bin/env python3
"""Fuzzing the readers of model files: whatever the bytes, a file is read or refused with a GGUFError of one line.

    python tools/fuzz/reader.py [--seconds 60] [--runs N] [--seed S]       mutates the cases of tools/malformed.py
    python tools/fuzz/reader.py --atheris FOLDER [libFuzzer's options]     follows coverage, where the package atheris is installed
    python tools/fuzz/reader.py FILE...                                    runs single inputs

An input that breaks the rule is kept in tools/fuzz/finds, which the tests replay.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import struct
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

INTERESTING = (0, 1, 2, 4, 7, 8, 12, 13, 31, 32, 33, 64, 255, 256, 1023, 1024, 65535, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 61, 2 ** 63 - 1,
               2 ** 63, 2 ** 64 - 32, 2 ** 64 - 1)


def one_input(data: bytes) -> bool:
    """Read `data` as a model and look at all of it; True when it was accepted. Raises when the rule is broken."""
    from pyggml import formats
    from pyggml.errors import GGUFError, PyggmlError
    from pyggml.formats import show
    from pyggml.formats.source import Memory
    try:
        file = formats.open_source(Memory(data, "x"))
    except GGUFError as error:
        if "\n" in str(error) or not str(error).startswith("x: "):
            raise AssertionError(f"not one line that names the file: {error!r}") from error
        return False
    for key in file.kv:
        show.text(file.kv[key])
        file.kv.type(key)
    for t in file.tensors.values():
        if t.stored.nbytes > len(data) or t.raw.size != t.nbytes:
            raise AssertionError(f"{t} has {t.stored.nbytes} bytes in a file of {len(data)}")
    file.kv.typed()
    try:
        file["none"]
    except PyggmlError:
        return True
    return "none" in file.tensors


def seeds() -> list[bytes]:
    """Small inputs to start from: every case of tools/malformed.py, sound or not."""
    import malformed
    return [case.data for case in malformed.invalid() + malformed.legal() if 0 < len(case.data) <= 4096]


def mutate(data: bytes, pool: list[bytes], rng: random.Random) -> bytes:
    """`data` with one to four random changes: numbers that matter, flipped bits, pieces cut out, repeated or taken from another input."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(INTERESTING) if rng.random() < 0.7 else rng.getrandbits(64)
            out[at:at + width] = struct.pack(rng.choice("<>") + "Q", value)[:width]
        elif kind == 1 and out:
            out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del out[at:at + rng.randint(1, 16)]
        elif kind == 3:
            out[at:at] = out[at:at + rng.randint(1, 64)]
        elif kind == 4:
            other = rng.choice(pool)
            start = rng.randrange(len(other))
            out[at:at + rng.randrange(32)] = other[start:start + rng.randint(1, 64)]
        else:
            del out[at:]
    return bytes(out)


def keep(data: bytes) -> Path:
    path = HERE / "finds" / (hashlib.sha256(data).hexdigest()[:16] + ".bin")
    path.write_bytes(data)
    return path


def run(seconds: float, runs: int, seed: int) -> int:
    """Mutate until time or runs are used up; 1 when an input broke the rule."""
    rng, pool = random.Random(seed), seeds()
    grown: list[bytes] = []                     # accepted inputs, from which deeper ones are made
    start, done, accepted = time.monotonic(), 0, 0
    print(f"seed {seed}, {len(pool)} inputs to start from", flush=True)
    said = start
    while done < runs and time.monotonic() - start < seconds:
        if time.monotonic() - said > 60:
            said = time.monotonic()
            print(f"{done} inputs so far", flush=True)
        for _ in range(1000):
            data = mutate(rng.choice(grown if grown and rng.random() < 0.3 else pool), pool, rng)
            try:
                ok = one_input(data)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                print(f"{keep(data)}: {type(error).__name__}: {error}")
                return 1
            done += 1
            if ok:
                accepted += 1
                if len(data) <= 4096:
                    grown.append(data)
                    if len(grown) > 2000:
                        grown[rng.randrange(len(grown))] = grown.pop()
    print(f"{done} inputs in {time.monotonic() - start:.0f} s, {accepted} accepted, none broke the rule")
    return 0


def run_atheris(arguments: list[str]) -> None:
    import atheris
    with atheris.instrument_imports(include=["pyggml.formats"]):
        import pyggml.formats  # noqa: F401
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    for data in seeds():
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    atheris.Setup([sys.argv[0], *arguments], lambda data: (one_input(data), None)[1])
    atheris.Fuzz()


def main() -> int:
    if sys.argv[1:2] == ["--atheris"]:
        run_atheris(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--runs", type=int, default=1 << 62)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    args = parser.parse_args()
    for path in args.files:
        print(f"{path}: {'accepted' if one_input(path.read_bytes()) else 'refused'}")
    return 0 if args.files else run(args.seconds, args.runs, args.seed)


if __name__ == "__main__":
    sys.exit(main())
