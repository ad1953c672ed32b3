"""`pyggml info FILE`: what is in a model file."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from typing import Any

import pyggml.formats as formats
from pyggml.errors import GGUFError, PyggmlError
from pyggml.formats import shards, show
from pyggml.formats.keys import missing
from pyggml.formats.tensorfile import OpaqueType, TensorFile
from pyggml.formats.values import printable

HELP = "show metadata and tensors of a model file"
TEMPLATE = "tokenizer.chat_template"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a GGUF file, any part of a split model, or an address (https://..., hf:user/repo/file.gguf)")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--no-tensors", action="store_true", help="with --json: metadata alone")
    parser.add_argument("--full", "--json-array", action="store_true", help="show long arrays and texts in full")
    parser.add_argument("--key", action="append", default=[], metavar="KEY", help="print the value of a key alone, in full (repeatable)")
    parser.add_argument("--json", action="store_true", help="print one JSON document with metadata and tensors")
    parser.add_argument("--plot", metavar="PAGE", help="also write a page with size by type and layer, histograms and outliers (extra [plot])")
    parser.add_argument("--chat-template", action="store_true", help="print the chat template alone")


def run(args: argparse.Namespace) -> int:
    file = opened(args.file)
    if args.chat_template:
        return print_template(file)
    if args.key:
        return print_keys(file, args.key)
    if args.plot:
        from pyggml import page
        from pyggml.formats import picture
        from pyggml.formats.atomic import refuse_input

        refuse_input([args.plot], file.paths)
        page.save(args.plot, picture.html(file))
    print(show.json_text(as_json(file, args.full, not args.no_tensors)) if args.json else as_text(file, args.tensors, args.full))
    return unknown_types(file)


def opened(path: str) -> TensorFile:
    """The model; of a split model whose other parts are missing or damaged, the part at `path` with a warning."""
    file = formats.open(path, use_mmap=False, split=False)
    if not shards.is_split(file.kv):
        return file
    try:
        return formats.open(path, use_mmap=False)
    except GGUFError as error:
        file.warnings.append(f"this part alone is shown: {error}")
        return file


def unknown_types(file: TensorFile) -> int:
    """1, and an error, when the file has tensors of types that are not known: everything about them but their place is a guess."""
    unknown = [t for t in file.tensors.values() if isinstance(t.type, OpaqueType)]
    for t in unknown[:1]:
        assert isinstance(t.type, OpaqueType)
        more = f", and so are those of {len(unknown) - 1} more tensors" if len(unknown) > 1 else ""
        print(f"pyggml info: {printable(t.source.name)}: offset 0x{t.type.at:x}: tensor \"{printable(t.name)}\": {t.type.why()}{more}",
              file=sys.stderr)
    return int(bool(unknown))


def print_template(file: TensorFile) -> int:
    """The template with its line breaks; other control characters stay escaped."""
    if TEMPLATE not in file.kv:
        raise PyggmlError(f'{printable(file.path)}: key "{TEMPLATE}" is missing; the file has no chat template')
    print("\n".join(printable(line) for line in str(file.kv[TEMPLATE]).split("\n")))
    return 0


def print_keys(file: TensorFile, keys: list[str]) -> int:
    """The values of keys, each on a line; arrays as JSON."""
    for key in keys:
        if key not in file.kv:
            raise missing(file.path, key, file.kv)
        value = file.kv.typed_value(key)
        print(json.dumps(show.json_value(value)) if value.type.endswith("[]") else show.text(value, length=1 << 62))
    return 0


def as_json(file: TensorFile, full: bool = False, tensors: bool = True) -> dict[str, Any]:
    """One document; arrays come with their length and, unless `full`, their first elements only."""
    metadata = {}
    for key in file.kv:
        value, kind = file.kv[key], file.kv.type(key)
        cut = kind.endswith("[]") or (kind == "str" and len(value) > show.SHOWN_JSON)
        metadata[key] = {"type": kind, **({"length": len(value)} if cut else {}),
                         "value": show.json_value(value, None if full else show.SHOWN_ITEMS)}
    return {"path": file.path, "format": file.format, "byte_order": "little" if file.order == "<" else "big", "bytes": file.nbytes,
            "alignment": file.alignment, "data_offset": file.data_offset, "warnings": file.warnings, "metadata": metadata,
            **({"tensors": [show.json_tensor(t) for t in file.tensors.values()]} if tensors else {})}


def as_text(file: TensorFile, tensors: bool = False, full: bool = False) -> str:
    parts = [summary(file), metadata(file, full)]
    if tensors and file.tensors:
        rows = [("tensor", "type", "shape", "bytes", "offset")]
        rows += [(printable(t.name), t.type.name, show.shape(t), str(t.nbytes), f"0x{t.offset:x}") for t in file.tensors.values()]
        parts.append(show.columns(rows, frozenset((3, 4))))
    parts += show.some([f"warning: {w}" for w in file.warnings], "warnings", "--json lists all")
    return "\n\n".join(part for part in parts if part)


def summary(file: TensorFile) -> str:
    order = "" if file.order == "<" else ", big-endian"
    rows = [("file", printable(file.path) + (f" and {len(file.sources) - 1} more parts" if len(file.sources) > 1 else "")),
            ("format", f"{file.format}{order}, alignment {file.alignment}"), ("size", f"{show.amount(file.nbytes)} ({file.nbytes} bytes)")]
    if file.tensors:
        weights = sum(t.size for t in file.tensors.values())
        stored = sum(t.nbytes for t in file.tensors.values())
        bits = f", {8 * stored / weights:.2f} bits per weight" if weights else ""
        rows.append(("tensors", f"{len(file.tensors)}, {show.amount(weights, '').strip()} weights{bits}"))
        counts = Counter(t.type.name for t in file.tensors.values())
        rows.append(("types", ", ".join(f"{name} {n}" for name, n in counts.most_common())))
    if TEMPLATE in file.kv:
        rows.append(("template", "sha256 " + hashlib.sha256(str(file.kv[TEMPLATE]).encode("utf-8", "surrogateescape")).hexdigest()))
    return show.columns(rows)


def metadata(file: TensorFile, full: bool) -> str:
    if not file.kv:
        return "no metadata"
    limits = (1 << 62, 1 << 62) if full else (show.SHOWN_ITEMS, show.SHOWN_TEXT)
    rows = []
    for key in file.kv:
        typed = file.kv.typed_value(key)
        kind = typed.type
        rows.append((printable(key), f"{kind[:-1]}{len(typed.value)}]" if kind.endswith("[]") else kind, show.text(typed.value, *limits)))
    return show.columns(rows)
