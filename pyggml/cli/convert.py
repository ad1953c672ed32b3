"""`pyggml convert IN OUT`: any model file that can be read, as GGUF version 3."""

from __future__ import annotations

import argparse
import os

from pyggml import formats
from pyggml.errors import PyggmlError
from pyggml.formats import Typed, keys, show
from pyggml.formats.atomic import refuse_input
from pyggml.formats.split import PADDING
from pyggml.formats.values import printable

HELP = "convert an old model file (ggml, ggmf, ggjt, GGUF 1 and 2) to GGUF 3"
ORDERS = {"little": "<", "big": ">"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a model file")
    parser.add_argument("output", help="the GGUF file to write")
    parser.add_argument("--byte-order", choices=ORDERS, default="little", help="of the new file (default: little)")
    parser.add_argument("--name", help="set general.name")
    parser.add_argument("-c", "--context-length", type=int, metavar="N", help="set the context length, which files before GGUF do not have")
    parser.add_argument("--eps", type=float, metavar="X", help="set the epsilon of the norms, which files before GGUF do not have")


def run(args: argparse.Namespace) -> int:
    file = formats.open(args.file, use_mmap=False)
    kv = {key: value for key, value in file.kv.typed().items() if key != PADDING}
    arch = file.kv.get("general.architecture")
    changes = {"general.name": (args.name, "str"), f"{arch}.context_length": (args.context_length, "u32"),
               f"{arch}.attention.layer_norm_rms_epsilon": (args.eps, "f32")}
    for key, (value, kind) in changes.items():
        if value is not None:
            kv[key] = Typed(kind, value)
            problem = keys.problem(key, kv[key])
            if problem:
                raise PyggmlError(problem)
    if len(file.paths) > 1:             # a single file is replaced by what it holds
        refuse_input([args.output], file.paths)
    formats.write(args.output, kv, file.tensors, order=ORDERS[args.byte_order])
    for warning in file.warnings:
        print(f"{printable(args.file)}: {warning} (warning)")
    print(f"{printable(args.output)}: GGUF v3 from {file.format}, {len(file.tensors)} tensors, {show.amount(os.path.getsize(args.output))}")
    return 0
