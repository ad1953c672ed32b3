"""Ctrl-C during a native call. Python runs signal handlers only between its own instructions, but a prompt may keep one native
call busy for seconds; so a thread waits for the byte that the C-level handler writes, and cancels the call from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def on_interrupt(cancel: Callable[[], None]) -> Iterator[threading.Event]:
    """Within the block the first Ctrl-C calls `cancel` from another thread at once and sets the event; a second one raises
    KeyboardInterrupt. Outside of the main thread, where Python allows no signal handlers, the block runs as it is."""
    interrupted, done = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while signals := os.read(reader, 64):
            if signal.SIGINT in signals:
                interrupted.set()
                cancel()
                while not done.wait(0.01):      # that may have come just before there was anything to cancel
                    cancel()

    def first(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    watcher = threading.Thread(target=watch, name="pyggml-interrupt", daemon=True)
    old_handler = signal.signal(signal.SIGINT, first)
    old_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield interrupted
    finally:
        done.set()
        signal.set_wakeup_fd(old_wakeup)
        signal.signal(signal.SIGINT, old_handler)
        os.close(writer)                # ends the watcher
        watcher.join()
        os.close(reader)
