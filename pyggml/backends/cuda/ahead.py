"""Greedy decoding that does not wait for the host: the GPU takes the largest logit itself and goes on, several tokens in one recording.

While the host looks at the rows of one stretch the GPU computes the next. A row is given out when it is asked for the token that the
GPU went on with; whoever asks for another token finds the context as it should be, as later cells are written again.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pyggml.backends.cuda.base import DeviceStep, DeviceView, Launch
from pyggml.backends.cuda.device import round_up
from pyggml.backends.cuda.graphs import Recorder, bucket

if TYPE_CHECKING:
    from pyggml.backends.cuda.plan import DeviceProgram

STRETCH = 8             # tokens in one recording


@dataclass
class _Stretch:
    """STRETCH tokens under way: the first one's position, where their logits and successors are copied to, and when."""

    start: int
    rows: np.ndarray            # float32 (STRETCH, n_vocab and padding)
    chosen: np.ndarray          # int32 (STRETCH), the token after each row
    done: Any
    fed: list[int] = field(default_factory=list)        # the token before each row; [0] is known from the start


class Ahead:
    """Stretches of greedy decoding over the program of a single token."""

    def __init__(self, program: DeviceProgram, launches: dict[str, Launch]) -> None:
        self.program, self.device = weakref.proxy(program), program.device      # no circle: memory is free as soon as its owner goes
        self._n_vocab = program.results[0].host.shape[1]
        self._stride = round_up(4 * self._n_vocab)
        block = program.take(STRETCH * self._stride)
        rows = [program.views[program.view(block[r * self._stride:], "F32", (1, self._n_vocab))] for r in range(STRETCH)]
        self._block = program.views[program.view(block, "F32", (STRETCH, self._stride // 4))]
        self._chosen, self._history, self._count = (self._place("I32", (n,)) for n in (1, STRETCH, 1))
        tokens, pos, cell = (program.views[program.view(program.places[name][1], "I32", (1,))] for name in ("tokens", "pos", "cell"))
        *body, last = program.steps
        steps = []
        for row in rows:
            self.own_steps = [DeviceStep("argmax", self._chosen, (row,)),
                              DeviceStep("advance", tokens, (self._chosen, pos, cell, self._history, self._count))]
            steps += [*body, replace(last, dst=row), *self.own_steps]
        self._launches = [(launches[s.op], s) for s in steps]
        self._first = program.steps[0]
        self._recorder = Recorder(self.device)
        self._free: list[tuple[np.ndarray, np.ndarray, Any]] = []
        self._under_way: deque[_Stretch] = deque()

    @staticmethod
    def fits(program: DeviceProgram) -> bool:
        """Whether the program takes one token and nothing but integers, and gives its logits."""
        one = all(place[0].shape == (1,) for place in program.places.values())
        return one and {"tokens", "pos", "cell"} <= set(program.places) and len(program.results) == 1 and program.step_ns is None

    def _place(self, type: str, shape: tuple[int, ...]) -> DeviceView:
        count = int(np.prod(shape))
        return self.program.views[self.program.view(self.program.take(4 * count), type, shape)]

    def row(self, token: int, position: int) -> np.ndarray | None:
        """Logits after `token` at `position`, which is also its cell: float32 (n_vocab), until the next call. None near the cache's end."""
        while self._under_way:
            stretch = self._under_way[0]
            self.device.wait(stretch.done)
            if len(stretch.fed) == 1:
                stretch.fed += stretch.chosen[:-1].tolist()
            i = position - stretch.start
            if 0 <= i < STRETCH and stretch.fed[i] == token:
                if len(self._under_way) == 1:
                    self._go_on(stretch.start + STRETCH, int(stretch.chosen[-1]))
                return stretch.rows[i, :self._n_vocab]
            if i != STRETCH or (len(self._under_way) > 1 and self._under_way[1].fed[0] != token):
                break
            self._release()
        self.stop()
        if position + STRETCH > self.program.n_cells:
            return None
        for name, value in (("tokens", token), ("pos", position), ("cell", position), ("first", 0), ("wanted", 0)):
            if name in self.program.places:
                self.program.places[name][0][0] = value
        self.program.slots[:] = 1
        with self.device.active():
            self.program.upload()
        self._go_on(position, token)
        return self.row(token, position)

    def _go_on(self, position: int, token: int) -> None:
        """Enqueue the stretch that begins with this token, which the GPU has at hand."""
        if position + STRETCH > self.program.n_cells:
            return
        if not self._free:
            self._free.append((self.device.pinned(self._block.shape, np.float32), self.device.pinned((STRETCH,), np.int32),
                               self.device.event()))
        rows, chosen, done = self._free.pop()
        with self.device.active():
            self.program.scratch.cells = bucket(position + STRETCH, self.program.n_cells)
            self._recorder.run(self.program.scratch.cells, self._launch)
            self.device.download(rows.reshape(-1), self._block.array)
            self.device.download(chosen, self._history.array)
            done.record(self.device.stream)
        self.program.native_calls += 1
        self._under_way.append(_Stretch(position, rows, chosen, done, [token]))

    def _launch(self) -> None:
        self.device.clear(self._count.array)
        for launch, step in self._launches:
            if step is self._first:
                self.program.scratch.begin()
            launch(self.device.stream, self.program.device_slots, step, self.program.scratch)

    def _release(self) -> None:
        stretch = self._under_way.popleft()
        self._free.append((stretch.rows, stretch.chosen, stretch.done))

    def stop(self) -> None:
        """Wait for what is under way and forget it."""
        while self._under_way:
            self.device.wait(self._under_way[0].done)
            self._release()
