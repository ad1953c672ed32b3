"""Python's share of a token: time of Context.eval less the native call, at one position of the cache, and native calls per token.

    python tools/bench/token_cost.py MODEL

Prints the least of many rounds in microseconds; single-threaded, so that waiting for other threads is not counted as Python. A model
that does not fit in the caches makes Python slower, whose objects then come from memory.
"""

from __future__ import annotations

import sys
import time

from pyggml.context import Context
from pyggml.model import Model


def main() -> None:
    context = Context(Model.load(sys.argv[1]), n_ctx=512, n_threads=1)
    context.eval([1])
    plan = context.plan(1, 1)

    def least(action, rounds: int = 60, n: int = 100) -> float:
        best = float("inf")
        for _ in range(rounds):
            start = time.thread_time()
            for _ in range(n):
                action()
            best = min(best, (time.thread_time() - start) / n)
        return best * 1e6

    calls = plan.program.native_calls
    context.reset()
    for _ in range(100):
        context.eval([1])
    per_token = (plan.program.native_calls - calls) / 100

    def again() -> None:
        context.n_past = 100
        context.eval([1])

    whole = least(again)
    native = least(lambda: plan.program.run(context.pool))
    print(f"eval {whole:.1f} us, of which native {native:.1f} us: Python {whole - native:.1f} us a token, {per_token:g} native calls a token")


if __name__ == "__main__":
    main()
