"""pyggml imatrix: which columns of each matrix matter, collected over a text; llama-imatrix's arguments."""

from __future__ import annotations

import argparse
import os
from typing import Any

from pyggml.cli import _options, _text

HELP = "collect an importance matrix for quantization"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_model(parser)
    _text.add_text(parser)
    parser.add_argument("-o", "--output-file", "--output", dest="output", default="imatrix.gguf", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--output-format", choices=("gguf", "dat"), default="gguf", help="dat: llama.cpp's old format (default: %(default)s)")
    parser.add_argument("--process-output", action="store_true", help="also collect for output.weight")
    parser.add_argument("--chunk", "--from-chunk", type=int, default=0, metavar="N", help="leave out the first N chunks of the text")
    parser.add_argument("--in-file", action="append", default=[], metavar="FILE",
                        help="add what this file knows; repeatable, or several with commas between")
    parser.add_argument("-ofreq", "--output-frequency", type=int, default=10, metavar="N", help="save every N chunks (default: %(default)s)")
    parser.add_argument("--save-frequency", type=int, default=0, metavar="N", help="keep a copy FILE.at_N every N chunks (0: none)")
    parser.add_argument("--no-ppl", action="store_true", help="do not compute the text's perplexity on the way")
    parser.add_argument("--parse-special", action="store_true", help="read control tokens in the text as such")
    parser.add_argument("--show-statistics", action="store_true", help="print how the importance in one --in-file is spread")


def run(args: argparse.Namespace) -> int:
    from pyggml.quantize.imatrix import Imatrix

    given = [path for text in args.in_file for path in ([text] if os.path.exists(text) else text.split(","))]
    if args.show_statistics:
        if len(given) != 1:
            args.usage_error("--show-statistics needs one file: --in-file FILE")
        print(statistics(Imatrix.load(given[0])))
        return 0
    known = Imatrix()
    for path in given:
        known.merge(Imatrix.load(path))
    if args.file is None:
        if not given:
            args.usage_error("there is neither a text (-f) nor a file to combine (--in-file)")
        known.save(args.output, args.output_format)
        _text.say(f"imatrix: combined {len(given)} files in {args.output}")
        return 0
    return collect(args, known)


def collect(args: argparse.Namespace, known: Any) -> int:
    from pyggml.formats.atomic import refuse_input, require_place
    from pyggml.model import Model
    from pyggml.quantize import calibrate
    from pyggml.quantize.imatrix import Imatrix

    model = Model.load(_options.model_path(args), use_mmap=not args.no_mmap)
    refuse_input([args.output], [*model.file.paths, args.file])
    require_place(args.output)
    saved = {"chunks": 0, "copy": 0}

    def save(found: Imatrix, done: int) -> None:
        whole = Imatrix(chunk_size=found.chunk_size)
        whole.merge(known)
        whole.merge(found)
        if done - saved["chunks"] >= args.output_frequency > 0:
            saved["chunks"] = done
            whole.save(args.output, args.output_format)
        if args.save_frequency > 0 and done - saved["copy"] >= args.save_frequency:
            saved["copy"] = done
            whole.save(f"{args.output}.at_{done}", args.output_format)

    total = None

    def progress(done: int, of: int, found: Any) -> None:
        nonlocal total
        total = found
        print(f"[{done}]{found.value:.4f}," if found else f"[{done}/{of}] ", end="", flush=True)

    found = calibrate.collect(model, _text.read(args.file), dataset=args.file, n_ctx=args.ctx_size, n_chunks=args.chunks, skip_chunks=args.chunk,
                              parse_special=args.parse_special, process_output=args.process_output, perplexity=not args.no_ppl, save=save,
                              progress=progress, **_text.options(args), **_options.device(args))
    print()
    if total is not None:
        print(f"Final estimate: PPL = {total.value:.4f} +/- {total.error:.5f}")
    known.merge(found)
    known.save(args.output, args.output_format)
    _text.say(f"imatrix: {len(known.entries)} matrices over {known.n_chunks} chunks in {args.output}")
    empty = [name for name, entry in known.entries.items() if not entry.counts.all()]
    if empty:
        _text.say(f"imatrix: {len(empty)} matrices have experts that no token reached, such as {empty[0]}; more text would help")
    return 0


def statistics(imatrix: Any) -> str:
    """The table of --show-statistics, and the averages of each layer."""
    from pyggml.quantize.imatrix import statistics as rows_of

    rows = rows_of(imatrix)
    lines = [f"{imatrix.path}: {len(rows)} matrices, {imatrix.n_chunks} chunks",
             f"{'layer':>5} {'tensor':<20} {'sum(act^2)':>12} {'min':>9} {'max':>11} {'mean':>9} {'deviation':>9} {'active':>8} {'N':>6} "
             f"{'entropy':>9} {'E (norm)':>8} {'outliers':>8} {'cosine':>7}"]
    layers: dict[int, list[Any]] = {}
    for r in rows:
        lines.append(f"{r['layer'] if r['layer'] >= 0 else '-':>5} "
                     f"{r['tensor']:<20} {r['sum']:12.2f} {r['min']:9.4f} {r['max']:11.4f} {r['mean']:9.2f} {r['deviation']:9.2f} "
                     f"{100 * r['active']:7.2f}% {r['n']:6d} {r['entropy']:9.4f} {100 * r['evenness']:7.2f}% {100 * r['outliers']:7.2f}% "
                     f"{r['likeness']:7.4f}")
        if r["layer"] >= 0:
            layers.setdefault(r["layer"], []).append(r)
    lines += ["", f"{'layer':>5} {'mean sum(act^2)':>16} {'outliers':>9} {'cosine':>7}   (weighted by columns)"]
    for layer, own in sorted(layers.items()):
        n = sum(r["n"] for r in own)
        mean = {key: sum(r[key] * r["n"] for r in own) / n for key in ("sum", "outliers", "likeness")}
        lines.append(f"{layer:5d} {mean['sum']:16.2f} {100 * mean['outliers']:8.2f}% {mean['likeness']:7.4f}")
    return "\n".join(lines)
