"""The command line: `pyggml COMMAND ...`, where a command is a module of this package and its file name is its name.

A command module has HELP (one line), `add_arguments(parser)` and `run(args) -> exit status`, and imports what is heavy inside
`run`; it is imported only when its command is asked for. Modules that begin with an underscore are shared by commands.

Exit status: 0 done; 1 something is wrong with the input; 2 wrong usage; 130 interrupted; 141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

from pyggml import __version__
from pyggml.errors import PyggmlError

USAGE, INTERRUPTED, CLOSED_PIPE = 2, 130, 141


def commands() -> dict[str, str]:
    """Every command with its line of help, read from the modules' text without importing them."""
    import ast

    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        line = next(line for line in path.read_text().splitlines() if line.startswith("HELP = "))
        found[path.stem.replace("_", "-")] = ast.literal_eval(line.removeprefix("HELP = "))
    return found


def overview() -> str:
    lines = "".join(f"  {name:<12} {help}\n" for name, help in commands().items())
    return f"usage: pyggml COMMAND [options]\n\n{lines}\npyggml COMMAND --help tells more; pyggml --version prints the version.\n"


def parser_of(name: str) -> tuple[argparse.ArgumentParser, Any]:
    """The argument parser and the module of a command."""
    module = importlib.import_module(f"pyggml.cli.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(f"pyggml {name}", description=f"{module.HELP[0].upper()}{module.HELP[1:]}.", allow_abbrev=False,
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120))
    module.add_arguments(parser)
    return parser, module


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    _open_streams()
    try:
        status = _dispatch(name, rest)
        sys.stdout.flush()
        return status
    except SystemExit as done:          # argparse has printed help or what is wrong with the usage
        return int(done.code or 0)
    except PyggmlError as error:
        return _fail(name, str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # so that nothing fails again when Python flushes at exit
        return CLOSED_PIPE
    except OSError as error:
        return _fail(name, str(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error))
    except MemoryError:
        return _fail(name, "there is not enough memory; use a smaller context (-c) or a smaller model")
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:               # of a file cut under a reader anything may follow; that it was cut is what helps
        cut = _cut()
        if not cut:
            raise
        return _fail(name, cut)


def _cut() -> str:
    """What is to be said of a mapped file that was cut: then whatever was read from it may have failed in any way."""
    source = sys.modules.get("pyggml.formats.source")
    for file in list(source.mapped) if source is not None else []:
        try:
            file.verify()
        except PyggmlError as error:
            return str(error)
    return ""


def _open_streams() -> None:
    """Put the null device in the place of standard streams that are closed: a model file must not get one of their numbers."""
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, mode))        # noqa: SIM115  (open as long as the process)


def _is_command(name: str) -> bool:
    return re.fullmatch("[a-z][a-z-]*", name) is not None and (Path(__file__).parent / f"{name.replace('-', '_')}.py").exists()


def _dispatch(name: str, argv: list[str]) -> int:
    if name in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if name in ("-V", "--version"):
        print(f"pyggml {__version__}")
        return 0
    if not _is_command(name):
        import difflib

        near = difflib.get_close_matches(name, commands(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"pyggml: {name!r} is not a command{hint}\n\n{overview()}" if name else overview(), end="", file=sys.stderr)
        return USAGE
    parser, module = parser_of(name)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")        # a terminal that cannot show a character is no reason to stop
    return module.run(parser.parse_intermixed_args(argv))


def _fail(name: str, message: str) -> int:
    """One line, whatever a name in it holds."""
    from pyggml.formats.values import printable

    print(f"pyggml {name}: {printable(message)}", file=sys.stderr)
    return 1
