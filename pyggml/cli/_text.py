"""Options of the commands that run a model over a text: perplexity, imatrix, compare."""

from __future__ import annotations

import argparse
import sys

from pyggml.cli import _options


def add_text(parser: argparse.ArgumentParser, n_ctx: int = 512) -> None:
    group = parser.add_argument_group("text")
    group.add_argument("-f", "--file", metavar="FILE", help="the text")
    group.add_argument("--chunks", type=int, default=-1, metavar="N", help="chunks of it to use (default: all)")
    group.add_argument("-c", "--ctx-size", type=int, default=n_ctx, metavar="N", help="tokens in a chunk (default: %(default)s)")
    group = parser.add_argument_group("computation")
    group.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: physical cores)")
    group.add_argument("-b", "--batch-size", type=int, default=2048, metavar="N", help="tokens taken at once (default: %(default)s)")
    group.add_argument("-ub", "--ubatch-size", type=int, default=512, metavar="N", help="tokens computed in one go (default: %(default)s)")
    _options.add_device(group)
    group.add_argument("--no-mmap", action="store_true", help="read files into memory instead of mapping them")
    parser.set_defaults(usage_error=parser.error)


def read(path: str) -> str:
    """The text of a file; one final newline is dropped, as llama.cpp does."""
    with open(path, "rb") as file:
        return _options.decode(file.read(), path).removesuffix("\n")


def options(args: argparse.Namespace) -> dict[str, int | None]:
    """What an Evaluator takes."""
    return {"n_ubatch": min(args.batch_size, args.ubatch_size), "n_threads": args.threads}


def say(text: str) -> None:
    """A line about what is being done."""
    print(text, file=sys.stderr)


def eta(seconds: float) -> str:
    """A time to wait, as llama.cpp writes it."""
    hours = int(seconds) // 3600
    return f"{f'{hours} hours ' if hours else ''}{(seconds - 3600 * hours) / 60:.2f} minutes"
