"""`pyggml merge PART OUT`: join the parts of a split model into one file."""

from __future__ import annotations

import argparse
import os

from pyggml import formats
from pyggml.errors import PyggmlError
from pyggml.formats import show
from pyggml.formats.atomic import refuse_input
from pyggml.formats.shards import COUNT
from pyggml.formats.split import merge
from pyggml.formats.values import printable

HELP = "join the parts of a split model into one file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="any part of the model")
    parser.add_argument("output", help="the file to write")
    parser.add_argument("--delete-splits", action="store_true", help="remove the parts when the whole is written")
    parser.add_argument("--force", action="store_true", help="replace an existing output file")


def run(args: argparse.Namespace) -> int:
    file = formats.open(args.file, use_mmap=False)
    parts = file.paths
    if len(parts) == 1 and COUNT not in file.kv:
        raise PyggmlError(f"{printable(args.file)}: is a whole model, not a part of one; there is nothing to join")
    if os.path.exists(args.output) and not args.force:
        raise PyggmlError(f"{printable(args.output)}: exists already; --force replaces it")
    refuse_input([args.output], parts)
    merge(file, args.output)
    if args.delete_splits:
        for part in parts:
            os.unlink(part)
    print(f"{printable(args.output)}: {len(parts)} parts, {len(file.tensors)} tensors, {show.amount(os.path.getsize(args.output))}")
    return 0
