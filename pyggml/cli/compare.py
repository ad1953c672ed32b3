"""pyggml compare: how far quantized files are from the file they were made from, without any file of logits in between."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pyggml.cli import _options, _text

HELP = "measure what quantization lost: files against their source"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REF", help="the file to be compared with (F32, F16, BF16)")
    parser.add_argument("files", nargs="+", metavar="FILE", help="quantized files of the same model")
    _text.add_text(parser)
    parser.add_argument("--per-tensor", action="store_true", help="also what each tensor costs alone (one replaced at a time, over 4 chunks)")
    parser.add_argument("--per-layer", action="store_true", help="also what each layer costs alone")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE", help="write a page with size against loss (report.html; extra [plot])")


def run(args: argparse.Namespace) -> int:
    from pyggml import page
    from pyggml.cli._progress import bar, cancellable
    from pyggml.formats.atomic import refuse_input, require_place
    from pyggml.measure import compare as measure
    from pyggml.measure import report

    if args.file is None:
        args.usage_error("there is no text to compare on; give one with -f FILE")
    if args.plot:
        page.require()                  # before the long work
        require_place(args.plot)
        refuse_input([args.plot], [args.reference, *args.files, args.file])
    text = _text.read(args.file)
    parts: dict[str, Any] = {}
    with cancellable() as stop:
        with bar("comparing", "chunks", stop) as progress:
            found = measure.compare(args.reference, args.files, text, n_ctx=args.ctx_size, n_chunks=args.chunks, **_text.options(args),
                                    **_options.device(args),
                                    progress=lambda done, total, scores: progress(done, total, f"KLD {scores[0].kld.mean():.5f}"))
        if args.per_tensor or args.per_layer:
            for path in args.files:
                with bar("measuring parts", "parts", stop) as progress:
                    parts[path] = measure.contributions(args.reference, path, text, by_layer=args.per_layer, n_ctx=args.ctx_size,
                                                        n_chunks=4 if args.chunks < 0 else min(4, args.chunks), progress=progress,
                                                        **_text.options(args))
    if args.json:
        result = found.as_dict() | {"parts": {path: [{"name": p.name, "type": p.type, "bytes": p.nbytes, "Mean KLD": list(p.kld)} for p in ps]
                                              for path, ps in parts.items()}}
        print(json.dumps(result, indent=1))
    else:
        print(measure.table(found))
        for path, ps in parts.items():
            print(f"\n{path}\n{measure.parts_table(ps)}")
    if args.plot:
        page.save(args.plot, report.html(found))
    return 0
