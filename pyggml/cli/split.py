"""`pyggml split IN OUT`: cut a model into parts, with gguf-split's flags."""

from __future__ import annotations

import argparse
import re

from pyggml import formats
from pyggml.errors import PyggmlError
from pyggml.formats import show
from pyggml.formats.split import plan, split
from pyggml.formats.values import printable

HELP = "cut a model into parts NAME-00001-of-0000N.gguf"
DEFAULT_TENSORS = 128
_UNITS = {"K": 1000, "M": 1000 ** 2, "G": 1000 ** 3}


def size(text: str) -> int:
    """Bytes of "500M" or "2G"."""
    match = re.fullmatch(r"([1-9]\d{0,11})([KMG])", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M or 2G")
    return int(match[1]) * _UNITS[match[2]]


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tensors from 1 upwards")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a GGUF file")
    parser.add_argument("output", help="path and name of the parts, without the number and .gguf")
    parser.add_argument("--split-max-tensors", type=count, metavar="N", help=f"tensors in a part (default {DEFAULT_TENSORS})")
    parser.add_argument("--split-max-size", type=size, metavar="N(M|G)", help="bytes of tensors in a part, in units of 1000")
    parser.add_argument("--no-tensor-first-split", action="store_true", help="put no tensor into the first part, only metadata")
    parser.add_argument("--split", action="store_true", help="as gguf-split says it: cut (default)")
    parser.add_argument("--merge", action="store_true", help="as gguf-split says it: join FILE and its other parts; see `pyggml merge`")
    parser.add_argument("--dry-run", action="store_true", help="show the parts, write nothing")


def run(args: argparse.Namespace) -> int:
    if args.merge:
        from pyggml.cli import merge
        return merge.run(argparse.Namespace(file=args.file, output=args.output, delete_splits=False, force=False))
    if args.split_max_size and args.split_max_tensors:
        raise PyggmlError("give --split-max-size or --split-max-tensors, not both")
    file = formats.open(args.file, use_mmap=False)
    max_tensors = args.split_max_tensors or (0 if args.split_max_size else DEFAULT_TENSORS)
    parts = plan(file, max_tensors, args.split_max_size or 0, args.no_tensor_first_split)
    stem = args.output.removesuffix(".gguf")
    paths = [formats.shards.part_path(stem, i + 1, len(parts)) for i in range(len(parts))] if args.dry_run else split(file, stem, parts)
    for path, tensors in zip(paths, parts, strict=True):
        print(f"{printable(path)}: {len(tensors)} tensors, {show.amount(sum(t.nbytes for t in tensors))}")
    return 0
