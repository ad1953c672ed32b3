"""`pyggml hash FILE`: hashes of the tensors, with gguf-hash's flags and lines."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pyggml import formats
from pyggml.errors import PyggmlError
from pyggml.formats import show
from pyggml.formats.hashing import ALGORITHMS, Digest, hashes
from pyggml.formats.values import printable

HELP = "hash the tensors of a model, each and all together"
DEFAULT = "xxh64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a GGUF file, or any part of a split model")
    for name in ALGORITHMS:
        parser.add_argument(f"--{name}", action="store_true", help=f"{name} (of the whole model only)" if name == "uuid" else
                            f"{name}{' (default)' if name == DEFAULT else ''}")
    parser.add_argument("--all", action="store_true", help="every hash")
    parser.add_argument("--no-layer", action="store_true", help="only the whole model, not each tensor")
    parser.add_argument("-c", "--check", metavar="MANIFEST", help="compare with the lines of an earlier run; exit status 1 if one differs")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    chosen = [name for name in ALGORITHMS if args.all or getattr(args, name)]
    expected = manifest(args.check) if args.check else {}
    if args.check and not chosen:
        chosen = [name for name in ALGORITHMS if any(algorithm == name for algorithm, _ in expected)]
    args.no_layer |= bool(expected) and not any(tensor for _, tensor in expected)      # a manifest of the whole model alone
    file = formats.open(args.file, use_mmap=False)
    found = hashes(file, chosen or [DEFAULT], not args.no_layer)
    if args.check:
        return compare(args, list(found), expected)
    if args.json:
        print(show.json_text({"path": args.file, "hashes": [d._asdict() for d in found]}))
    else:
        for digest in found:
            print(line(digest, args.file))
    return 0


def line(digest: Digest, path: str) -> str:
    where = os.path.basename(path) + (f":{digest.tensor}" if digest.tensor else "")
    return f"{digest.algorithm:<8}  {digest.value}  {printable(where)}"


def manifest(path: str) -> dict[tuple[str, str], str]:
    """Hashes of an earlier run: (algorithm, tensor name as printed) -> value."""
    entries = {}
    for number, text in enumerate(Path(path).read_text(errors="surrogateescape").splitlines(), 1):
        fields = text.split(None, 2)
        if not fields or text.startswith("#"):
            continue
        if len(fields) != 3 or fields[0] not in ALGORITHMS:
            raise PyggmlError(f"{printable(path)}: line {number}: is not a line of `pyggml hash`: {printable(text[:80])}")
        entries[fields[0], fields[2].partition(":")[2]] = fields[1]
    if not entries:
        raise PyggmlError(f"{printable(path)}: has no hashes; make it with `pyggml hash FILE > MANIFEST`")
    return entries


def compare(args: argparse.Namespace, found: list[Digest], expected: dict[tuple[str, str], str]) -> int:
    """Print each comparison; 1 if a hash differs or is missing on either side."""
    bad = 0
    for digest in found:
        key = digest.algorithm, printable(digest.tensor)
        known = expected.pop(key, None)
        state = "Ok" if known == digest.value else "Not Found" if known is None else "Mismatch"
        bad += state != "Ok"
        print(f"{line(digest, args.file)}  -  {state}")
    for (algorithm, tensor), _ in expected.items():
        if algorithm in {d.algorithm for d in found} and not (args.no_layer and tensor):
            print(f"{algorithm:<8}  {tensor or 'the whole model'}  -  Missing in the file")
            bad += 1
    return int(bool(bad))
