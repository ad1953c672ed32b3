"""pyggml tokenize: the tokens of a text, one per line or as a list of ids."""

from __future__ import annotations

import argparse
import sys

from pyggml.cli import _options

HELP = "show the tokens of a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_model(parser)
    _options.add_prompt(parser)
    parser.add_argument("--stdin", action="store_true", help="read the text from standard input")
    parser.add_argument("--ids", action="store_true", help="print the ids only, as a list that Python and JSON read")
    parser.add_argument("--no-bos", action="store_true", help="without the tokens that the vocabulary adds to a text")
    parser.add_argument("--no-parse-special", action="store_true", help="take the texts of control tokens as plain text")
    parser.add_argument("--show-count", action="store_true", help="print the number of tokens at the end")


def run(args: argparse.Namespace) -> int:
    from pyggml import formats, tokenizers

    path = _options.model_path(args)
    if args.stdin:
        if args.prompt is not None or args.file is not None:
            args.usage_error("give --stdin, -p or -f, only one of them")
        args.file = "-"
    text = _options.prompt_text(args)
    file = formats.open(path)
    tokenizer = tokenizers.load(file.kv, path)
    file.verify()
    ids = tokenizer.encode(text, add_special=not args.no_bos, parse_special=not args.no_parse_special)
    if args.ids:
        print(ids)
    else:
        for id in ids:
            sys.stdout.write(f"{id:6d} -> '{visible(tokenizer.piece(id))}'\n")
    if args.show_count:
        print(f"Total number of tokens: {len(ids)}")
    return 0


def visible(piece: bytes) -> str:
    r"""The text of a token on one line: control characters and bytes that are no text of their own as \n, \xNN and the like."""
    text = piece.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
