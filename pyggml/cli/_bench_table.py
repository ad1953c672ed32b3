"""Results of `pyggml bench` as text, in the columns and fields of llama-bench."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from pyggml import __version__
from pyggml.cli._bench_rows import Result, Test

# settings that get a column of the table when they are not at their default: field -> default
OPTIONAL = {"n_batch": 2048, "n_ubatch": 512, "type_k": "f16", "type_v": "f16", "ngl": "auto", "repack": 1}
# column -> its width, negative where the text stands left
WIDTHS = {"model": -30, "size": 10, "params": 10, "backend": -10, "threads": 7, "n_batch": 7, "n_ubatch": 8, "type_k": 6, "type_v": 6, "ngl": 4,
          "repack": 6, "test": 15, "t/s": 20}


def fields(result: Result) -> dict[str, Any]:
    """One result as llama-bench's JSON fields (those that have a meaning here), times in nanoseconds, sizes in bytes."""
    from pyggml import native
    from pyggml.cli.doctor import cpu_name, gpus

    test, model, ns, ts = result.test, result.model, result.samples_ns, result.samples_ts
    return {
        "build_commit": f"pyggml-{__version__}", "build_number": 0, "cpu_info": cpu_name(),
        "gpu_info": gpus() if result.gpu_layers else "", "backends": backend(result), "isa": native.isa,
        "model_filename": test.model, "model_type": model.describe(), "model_size": model.nbytes, "model_n_params": model.n_params,
        "n_batch": test.n_batch, "n_ubatch": test.n_ubatch, "n_threads": result.n_threads, "type_k": test.type_k, "type_v": test.type_v,
        "n_gpu_layers": result.gpu_layers, "repack": bool(test.repack), "n_prompt": test.n_prompt, "n_gen": test.n_gen,
        "n_depth": test.n_depth, "n_parallel": test.n_parallel, "test_time": result.test_time,
        "avg_ns": round(statistics.fmean(ns)), "stddev_ns": round(stddev(ns)), "avg_ts": statistics.fmean(ts), "stddev_ts": stddev(ts),
    }


def every_field(result: Result) -> dict[str, Any]:
    """One result with what a table has no room for."""
    samples = {**fields(result), "samples_ns": result.samples_ns, "samples_ts": result.samples_ts}
    return samples | ({"ops": result.ops} if result.ops else {})


def backend(result: Result) -> str:
    return "CUDA" if result.gpu_layers else "CPU"


def stddev(values: list) -> float:
    """Standard deviation of a sample; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(results: Iterator[Result], tests: list[Test]) -> None:
    optional = [name for name, default in OPTIONAL.items() if any(getattr(test, name) != default for test in tests)]
    columns = ["model", "size", "params", "backend", "threads", *optional, "test", "t/s"]

    def line(cells: Iterable[str]) -> str:
        aligned = (f" {cell:{'<' if WIDTHS[name] < 0 else '>'}{abs(WIDTHS[name])}} " for name, cell in zip(columns, cells, strict=True))
        return f"|{'|'.join(aligned)}|"

    print(line(columns))
    print("|" + "|".join(f" {'-' * (abs(WIDTHS[name]) - 1)}{'-' if WIDTHS[name] < 0 else ':'} " for name in columns) + "|")
    for result in results:
        model, test = result.model, result.test
        size = f"{model.nbytes / 2**30:.2f} GiB" if model.nbytes >= 2**30 else f"{model.nbytes / 2**20:.2f} MiB"
        params = f"{model.n_params / 1e9:.2f} B" if model.n_params >= 1e9 else f"{model.n_params / 1e6:.2f} M"
        speed = f"{statistics.fmean(result.samples_ts):.2f} ± {stddev(result.samples_ts):.2f}"
        settings = (str(getattr(test, name)) for name in optional)
        print(line([model.describe(), size, params, backend(result), str(result.n_threads), *settings, test.name, speed]), flush=True)
    from pyggml import native

    print(f"\nbuild: pyggml {__version__} ({native.isa})")


def as_json(results: Iterator[Result], tests: list[Test]) -> None:
    print("[", end="")
    for i, result in enumerate(results):
        print((",\n" if i else "\n") + json.dumps(every_field(result), indent=2),
              end="", flush=True)
    print("\n]")


def json_lines(results: Iterator[Result], tests: list[Test]) -> None:
    for result in results:
        print(json.dumps(every_field(result)), flush=True)


def comma_separated(results: Iterator[Result], tests: list[Test]) -> None:
    writer = None
    for result in results:
        row = fields(result)
        if writer is None:
            writer = csv.DictWriter(sys.stdout, row, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
        sys.stdout.flush()


FORMATS = {"md": markdown, "json": as_json, "jsonl": json_lines, "csv": comma_separated}
