"""What `pyggml bench` measures, and what it found: a row of its table."""

from __future__ import annotations

from typing import Any, NamedTuple


class Test(NamedTuple):
    """One row: a model, how it is set up, and how many tokens are computed. Field names are llama-bench's."""

    model: str
    n_batch: int
    n_ubatch: int
    type_k: str
    type_v: str
    n_threads: int | None
    ngl: str
    repack: int
    n_depth: int
    n_parallel: int
    n_prompt: int
    n_gen: int

    @property
    def name(self) -> str:
        work = "+".join(f"{kind}{n}" for kind, n in (("pp", self.n_prompt), ("tg", self.n_gen)) if n)
        work += f" x{self.n_parallel}" if self.n_parallel > 1 else ""
        return work + (f" @ d{self.n_depth}" if self.n_depth else "")


class Result(NamedTuple):
    """What a test gave."""

    test: Test
    model: Any
    n_threads: int
    gpu_layers: int                     # on a GPU, with the output as one more
    test_time: str                      # when it began, ISO 8601 in UTC
    samples_ns: list[int]
    ops: list[dict[str, Any]]           # with --ops: where the time went, the longest first

    @property
    def samples_ts(self) -> list[float]:
        return [1e9 * (self.test.n_prompt + self.test.n_gen) * self.test.n_parallel / ns for ns in self.samples_ns]
