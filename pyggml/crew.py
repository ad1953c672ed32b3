"""One thread or the whole pool for a single token: measured while the first tokens are computed."""

from __future__ import annotations

import time
from collections.abc import Callable


class Crew:
    """Decides whether a token is computed by the whole pool or by one thread, which is faster for small models.

    Both are tried in turn for the first tokens, some in a row, as a pool that has slept takes its time to wake; the one with the
    lower median is kept, as soon as each had a row where the medians lie clearly apart. A number of threads that the user gave is never
    second-guessed, and large models always take the pool.
    """

    ROW, TRIALS, CLEAR = 6, 24, 1.25
    SMALL_MODEL = 64 << 20          # bytes of weights: beyond it the pool wins by so much that trying is a waste

    def __init__(self, undecided: bool) -> None:
        self.alone = False
        self._times: dict[bool, list[float]] = {False: [], True: []}
        self.trials_left = self.TRIALS if undecided else 0

    def run(self, run: Callable[[bool], bool]) -> bool:
        """Call `run(alone)` for one token."""
        if not self.trials_left:
            return run(self.alone)
        self.trials_left -= 1
        trial = self.trials_left // self.ROW % 2 == 0         # the pool first: its first token packs weights and touches memory
        start = time.perf_counter()
        done = run(trial)
        if self.trials_left % self.ROW != self.ROW - 1:       # the first of a row wakes the pool
            self._times[trial].append(time.perf_counter() - start)
        if self.trials_left % (2 * self.ROW) == 0:
            pool, alone = (sorted(self._times[way])[len(self._times[way]) // 2] for way in (False, True))
            self.alone = alone < pool
            if max(pool, alone) > self.CLEAR * min(pool, alone):
                self.trials_left = 0
        return done
