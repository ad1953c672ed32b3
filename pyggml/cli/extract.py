"""`pyggml extract FILE TENSOR...`: tensors as numpy files."""

from __future__ import annotations

import argparse
import io
import os
import re
from typing import Any

import numpy as np

from pyggml import formats
from pyggml.errors import PyggmlError
from pyggml.formats import show
from pyggml.formats.atomic import refuse_input, replacing
from pyggml.formats.tensorfile import OpaqueType, Tensor
from pyggml.formats.values import printable

HELP = "write tensors as .npy files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a GGUF file, any part of a split model, or an address")
    parser.add_argument("tensors", nargs="+", metavar="TENSOR", help="names of tensors, or patterns such as blk.0.*")
    parser.add_argument("-o", "--output", metavar="PATH", help="a file for one tensor, a folder for several (default: NAME.npy here)")
    parser.add_argument("--raw", action="store_true", help="write the blocks as bytes instead of floats")


def run(args: argparse.Namespace) -> int:
    file = formats.open(args.file, use_mmap=False)
    chosen = select(file, args.tensors)
    folder = args.output if args.output and (len(chosen) > 1 or os.path.isdir(args.output)) else None
    if folder:
        os.makedirs(folder, exist_ok=True)
    first: dict[str, Tensor] = {}
    for tensor in chosen:
        if first.setdefault(file_name(tensor.name), tensor) is not tensor:
            raise PyggmlError(f'{tensor.label} and "{printable(first[file_name(tensor.name)].name)}" would both be {file_name(tensor.name)}; '
                              "extract one at a time with --output")
    paths = {t.name: args.output if args.output and not folder else os.path.join(folder or ".", file_name(t.name)) for t in chosen}
    refuse_input(paths.values(), file.paths)
    for tensor in chosen:
        path = paths[tensor.name]
        array = content(tensor, args.raw)
        save(path, array)
        print(f"{printable(path)}: {printable(tensor.name)}, {show.shape(tensor)} {tensor.type} as {array.dtype}")
    return 0


def select(file: formats.TensorFile, patterns: list[str]) -> list[Tensor]:
    """The tensors that are named, in file order; a pattern that matches nothing is an error."""
    chosen = set()
    for pattern in patterns:
        expression = re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)
        found = [name for name in file.tensors if expression.fullmatch(name)]
        chosen.update(found or [file[pattern].name])
    return [t for name, t in file.tensors.items() if name in chosen]


def file_name(tensor: str) -> str:
    """A tensor's name as the name of a file in any folder: a file decides nothing about where it is written."""
    return re.sub(r"[^\w.-]", "_", tensor).lstrip(".")[:200] + ".npy"


def content(tensor: Tensor, raw: bool) -> np.ndarray:
    if raw:
        return tensor.raw
    if isinstance(tensor.type, OpaqueType):
        raise PyggmlError(f"{tensor.label}: {tensor.type.why()}; --raw writes its bytes")
    return tensor.numpy() if not tensor.type.quantized and tensor.type.name != "BF16" else tensor.dequantize()


def save(path: str, array: Any) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    with replacing(path, array.nbytes + len(header.getvalue())) as out:
        out.write(header.getvalue())
        out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
