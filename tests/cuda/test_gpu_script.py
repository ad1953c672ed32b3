"""tools/bench/gpu.py, which is written for a machine that is seldom at hand: every step runs here on a toy, over the fake driver."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_measures
import gpu_run
import numpy as np
import pytest

from pyggml import native
from pyggml.backends.cuda import ahead
from pyggml.backends.cuda.device import Device
from pyggml.context import Context
from pyggml.model import Model

pytestmark = pytest.mark.skipif(native.lib is None, reason="the CPU backend needs the native kernels")
SMALL = ["--n-gen", "1", "--n-prompt", "3", "--depths", "3", "--batches", "3", "--greedy", "2", "--runs", "2"]


@pytest.fixture
def oracle(toy, tmp_path, monkeypatch):
    """A folder with golden logits of the toy from the CPU backend, and programs that stand for NVIDIA's and llama.cpp's."""
    monkeypatch.setattr(gpu_measures, "REPEATS", 0)
    monkeypatch.setattr(ahead, "STRETCH", 2)
    monkeypatch.setattr(Device.copy_bandwidth, "__defaults__", (1 << 10, 2))
    (tmp_path / "llama_quant.q8_0.gguf").symlink_to(toy)
    tokens = np.int32([1, 5, 9])
    logits = Context(Model.load(toy), n_ctx=64).eval(tokens, "all").copy()
    np.savez(tmp_path / "llama_quant.q8_0.npz", tokens=tokens, logits=logits, gen_ids=logits[-1:].argmax(-1), gen_margin=np.float32([1]))
    rows = [{"n_prompt": 3, "avg_ts": 1e-9}, {"n_prompt": 0, "avg_ts": 1e-9}]
    for name, says in (("compute-sanitizer", "========= ERROR SUMMARY: 0 errors"), ("llama-bench", json.dumps(rows))):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def test_every_step(oracle, capsys):
    model, kept = oracle / "llama_quant.q8_0.gguf", oracle / "results.json"
    command = ["--in-process", "--oracle", str(oracle), "--models", str(model), "--llama-bench", str(oracle / "llama-bench"), "--results", str(kept),
               *SMALL]
    gpu.main(command)
    found = json.loads(kept.read_text())
    rows, name = found["rows"], model.stem
    assert not [row for key, row in rows.items() if key.startswith("failed")] and {s["state"] for s in found["steps"].values()} == {"done"}
    assert {f"goldens|{name}", f"greedy|{name}", "leak|2 contexts", "sanitizer|memcheck"} <= {key for key, row in rows.items() if row["met"] == "yes"}
    assert {f"speed|{name} {what}" for what in ("upload", "memory", "tg one by one", "tg greedy", "pp3", "tg @ d3", "tg, 3 sequences")} < set(rows)
    assert f"rival|{name} tg one by one" in rows
    assert capsys.readouterr().out.rstrip().endswith("|")
    gpu.main(command)                                   # everything is there
    assert "---- " not in capsys.readouterr().out and json.loads(kept.read_text()) == found


def test_what_fails_is_told_and_the_rest_runs(oracle, capsys, monkeypatch):
    def too_long(run):
        time.sleep(60)

    monkeypatch.setattr(gpu_measures, "leak", too_long)
    monkeypatch.setitem(gpu.BUDGETS, "leak", 0.1)
    assert gpu.main(["--in-process", "--sections", "goldens,rival,leak,machine", "--oracle", str(oracle / "none")]) == 1
    out = capsys.readouterr().out
    assert "| failed | goldens | there are no golden logits in " in out and "| machine | gpu | cuda0 Fake" in out
    assert "name a llama-bench" in out and "| failed | leak | not done after 1 s |" in out


def test_a_model_that_cannot_be_made(oracle, capsys):
    assert gpu.main(["--in-process", "--sections", "machine,greedy", "--shapes", "tiny", "--types", "Q8_0", "--folder", str(oracle / "none")]) == 1
    out = capsys.readouterr().out
    assert "| failed | greedy tiny Q8_0 | tiny Q8_0 cannot be made: " in out and "| machine | gpu |" in out


def test_each_step_has_a_process_of_its_own(oracle, capsys, monkeypatch):
    """Here of programs that stand for this one: the process of one step is killed, that of another one gives a figure."""
    commands = []

    def process(command, *, check, timeout):
        commands.append(command)
        args = dict(zip(command, command[1:], strict=False))
        if args["--step"] != "machine":
            return SimpleNamespace(returncode=-11)
        results = gpu_run.Results(Path(args["--results"]))
        results.add("machine", "gpu", "one")
        results.mark(gpu_run.Step("machine", "", 1, print), "")
        return SimpleNamespace(returncode=0)

    kept = oracle / "results.json"
    kept.write_text(json.dumps({"rows": {"failed|machine": {"figure": "bad", "goal": "", "met": "NO"}}, "steps": {"machine": {"state": "failed"}}}))
    monkeypatch.setattr(gpu_run.subprocess, "run", process)
    options = ["--sections", "goldens,machine", "--oracle", str(oracle), "--results", str(kept), "--limit", "30"]
    assert gpu.main(options) == 1
    out = capsys.readouterr().out
    assert "| machine | gpu | one |" in out and "failed | machine" not in out
    assert "| failed | goldens llama_quant.q8_0 | its process ended with -11 |" in out
    found = json.loads(kept.read_text())
    assert {key: step["state"] for key, step in found["steps"].items()} == {"machine": "done", "goldens llama_quant.q8_0": "failed"}
    assert gpu.main(options) == 1                       # what failed is tried again
    assert [c[c.index("--step") + 1] for c in commands] == ["machine", *["goldens llama_quant.q8_0"] * 2]
    assert all(1 <= float(c[-1]) <= 30 for c in commands)


def test_a_dry_run_measures_nothing(oracle, capsys):
    assert gpu.main(["--dry-run", "--shapes", "tinyllama-1.1b", "--types", "Q4_0,F16", "--oracle", str(oracle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 2 * (1 + 5 + 1) + 2 + 1 and lines[1].split() == ["goldens", "llama_quant.q8_0", "180", "s", "to", "do"]
    assert lines[-1].startswith("18 steps, ")
