"""Recorded work: CUDA graphs, which launch hundreds of kernels in the time of one.

A recording captures what is enqueued on the stream while it is made; kernels find the token, its position and the cache's length
in device memory, so that the same recording computes every later token of its bucket. Where nothing can be recorded (the simulator,
or `PYGGML_CUDA_GRAPHS=0`, for debugging) the same work is launched again each time.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyggml.backends.cuda.device import simulated
from pyggml.errors import PyggmlError

if TYPE_CHECKING:
    from pyggml.backends.cuda.device import Device

BUCKET = 512            # the smallest bucket of cells; each is twice the one before


def bucket(cells: int, n_cells: int) -> int:
    """The bucket of a run that sees so many of the cache's cells."""
    return min(n_cells, max(BUCKET, 1 << (cells - 1).bit_length()))


class Recording:
    """What `enqueue` puts on the device's stream, to be replayed. Everything in it must have been launched once before: loading a kernel
    is not a thing to record."""

    def __init__(self, device: Any, enqueue: Callable[[], None]) -> None:
        self.device = device
        self._exec = self._record(enqueue)
        weakref.finalize(self, _destroy, device, self._exec).atexit = False     # the driver may be gone by then, and what it held with it

    @staticmethod
    def possible() -> bool:
        return not simulated() and os.environ.get("PYGGML_CUDA_GRAPHS", "1") != "0"

    def _record(self, enqueue: Callable[[], None]) -> Any:
        from cuda.bindings import driver

        stream = driver.CUstream(int(self.device.stream))
        with self.device.cuda.defer_cleanup():          # no freeing of memory meanwhile, which a capture forbids
            _check(driver.cuStreamBeginCapture(stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
            try:
                enqueue()
            finally:
                status, graph = driver.cuStreamEndCapture(stream)
        _check((status,))
        try:
            recording = _check(driver.cuGraphInstantiate(graph, 0))
        finally:
            driver.cuGraphDestroy(graph)
        _check(driver.cuGraphUpload(recording, stream))
        return recording

    def replay(self) -> None:
        """Enqueue the recorded work."""
        from cuda.bindings import driver

        _check(driver.cuGraphLaunch(self._exec, driver.CUstream(int(self.device.stream))))


class Recorder:
    """Runs work that is enqueued again and again, by key: launched the first time (which compiles and loads kernels), recorded the second
    time, replayed from then on."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self._recordings: dict[int, Recording | None] = {}

    def run(self, key: int, enqueue: Callable[[], None]) -> None:
        """Enqueue the work, which is the same whenever the key is."""
        recording = self._recordings.get(key)
        if recording is None and key in self._recordings and Recording.possible():
            recording = self._recordings[key] = Recording(self.device, enqueue)
        if recording is not None:
            recording.replay()
        else:
            enqueue()
            self._recordings[key] = None


def _check(answer: tuple) -> Any:
    """The value of a driver call; PyggmlError when it failed."""
    if answer[0].value:
        raise PyggmlError(f"the GPU answers {answer[0].name} to a recording; PYGGML_CUDA_GRAPHS=0 computes without recordings")
    return answer[1] if len(answer) > 1 else None


def _destroy(device: Device, recording: Any) -> None:
    from cuda.bindings import driver

    with device.active():
        driver.cuGraphExecDestroy(recording)
