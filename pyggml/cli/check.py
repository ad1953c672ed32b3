"""`pyggml check FILE...`: is a model file whole, sound and usable? For people, for programs (--json) and for CI (exit status)."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import pyggml.formats as formats
from pyggml.errors import PyggmlError
from pyggml.formats import show
from pyggml.formats.check import LEVELS, NO_TOKENIZER, NOTE, Finding, placer
from pyggml.formats.check import check as findings
from pyggml.formats.values import printable

HELP = "check model files for damage, oddities and missing parts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="GGUF files; any part of a split model stands for all of it")
    parser.add_argument("--level", choices=LEVELS, default="validate",
                        help="parse: structure; validate (default): also every weight and scale; "
                             "load: also whether metadata and tensors fit together")
    parser.add_argument("--reproduce", action="store_true", help="also quantize the recorded source again and compare every byte")
    parser.add_argument("--source", metavar="FILE", help="with --reproduce: where the source is now (default: in the same folder)")
    parser.add_argument("--imatrix", metavar="FILE", help="with --reproduce: where the importance matrix is now")
    parser.add_argument("--strict", action="store_true", help="a warning fails too")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")


def run(args: argparse.Namespace) -> int:
    """0 all sound, 1 an error (or, with --strict, a warning) in one of them."""
    reports = []
    for path in args.files:
        report = check(path, args.level)
        if args.reproduce:
            reproduce(report, args.source, args.imatrix)
        reports.append(report)
        if not args.json:
            print_report(report, args.quiet)
    if args.json:
        print(show.json_text({"level": args.level, "files": reports}))
    return int(any(r["errors"] or (args.strict and r["warnings"]) for r in reports))


def check(path: str, level: str) -> dict[str, Any]:
    """Errors, warnings and notes of one file as lines of text."""
    report: dict[str, Any] = {"path": path, "errors": [], "warnings": [], "notes": []}
    try:
        file = formats.open(path, use_mmap=False)
        found = findings(file, level)
        if level == "load" and file.tensors and not any(finding.is_error(level) for finding in found):
            found += engine(file)
        placed, shown = placer(file), printable(path)
        for finding in found:
            kind = "errors" if finding.is_error(level) else "notes" if finding.level == NOTE else "warnings"
            report[kind].append(f"{shown}: {placed(finding.text)}")
        report["summary"] = f"{file.format}, {len(file.kv)} keys, {len(file.tensors)} tensors, {show.amount(file.nbytes)}"
    except PyggmlError as error:
        report["errors"].append(printable(error))
    return report


def reproduce(report: dict[str, Any], source: str | None, imatrix: str | None) -> None:
    """Adds to a report whether the quantization that made the file gives the same bytes again."""
    from pyggml.quantize import reproduce as again

    path = printable(report["path"])
    try:
        found = again(report["path"], source, imatrix)
    except PyggmlError as error:
        report["errors"].append(printable(error))
        return
    if found.same:
        report["notes"].append(f"{path}: reproduced: {found.recipe} of {printable(found.source)} gives the same {found.n_tensors} tensors")
    else:
        report["errors"].append(f'{path}: not reproduced: tensor "{printable(found.difference)}" of {printable(found.source)} comes out different')


def engine(file: formats.TensorFile) -> list[Finding]:
    """What the engine says about a file in which nothing else is wrong: it reads the sizes, builds the graph and the tokenizer."""
    from pyggml import arch, tokenizers
    from pyggml.context import Context
    from pyggml.model import Model
    name = str(file.kv.get("general.architecture", ""))
    if name not in arch.names():
        return [Finding(NOTE, f'pyggml does not run the architecture "{show.text(name)}": not every tensor was compared with the metadata')]
    try:
        model = Model(file)
        Context(model, n_ctx=8, n_threads=1).output     # noqa: B018  builds the graph, which looks at every weight's shape
        kind = file.kv.get("tokenizer.ggml.model", NO_TOKENIZER[0])
        if kind in tokenizers.MODELS:
            model.tokenizer                             # noqa: B018  builds it
        elif kind not in NO_TOKENIZER:
            return [Finding(NOTE, f'key "tokenizer.ggml.model": pyggml does not run the tokenizer "{show.text(kind)}": it was not tried')]
    except PyggmlError as error:
        return [Finding("load", str(error).removeprefix(f"{file.path}: "))]
    return []


def print_report(report: dict[str, Any], quiet: bool) -> None:
    """Errors go to standard error, everything else to standard output."""
    path = printable(report["path"])
    for line in some(report, "errors"):
        print(line, file=sys.stderr)
    if quiet:
        return
    for kind in ("warnings", "notes"):
        for line in some(report, kind):
            print(f"{line} ({kind[:-1]})")
    if not report["errors"]:
        print(f"{path}: sound ({report['summary']})")


def some(report: dict[str, Any], kind: str) -> list[str]:
    return show.some(report[kind], kind, "--json lists all")
