"""A progress bar for long work: `with bar("quantizing", unit="B") as progress: work(progress=progress)`."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

from pyggml.cli._interrupt import on_interrupt
from pyggml.errors import Cancelled


@contextlib.contextmanager
def cancellable() -> Iterator[threading.Event]:
    """Long work that Ctrl-C ends at its next report: the event is for `bar`, and what the work says of its end is printed."""
    with on_interrupt(lambda: None) as stop:
        try:
            yield stop
        except Cancelled as reason:
            if not stop.is_set():
                raise
            print(f"\n{reason}", file=sys.stderr)
            raise KeyboardInterrupt from None


@contextlib.contextmanager
def bar(what: str, unit: str, stop: threading.Event | None = None) -> Iterator[Callable[[int, int, str], bool]]:
    """Yields a callback (done, total, note) that draws on standard error when it is a terminal, and returns False once `stop` is set.

    unit: "B" counts bytes with prefixes.
    """
    from tqdm import tqdm

    counts_bytes = unit == "B"
    with tqdm(desc=what, unit=unit, unit_scale=counts_bytes, unit_divisor=1024 if counts_bytes else 1000, file=sys.stderr, disable=None,
              leave=False, dynamic_ncols=True) as line:

        def show(done: int, total: int, note: str) -> bool:
            line.total = total
            line.set_postfix_str(note, refresh=False)
            line.update(done - line.n)
            return stop is None or not stop.is_set()

        yield show
