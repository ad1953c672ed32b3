"""tools/bench/gpu.py, which is written for a machine that is seldom at hand: every section runs here on a toy, and one that fails is told."""

import json

import gpu
import numpy as np
import pytest
import toys

from pyggml import native
from pyggml.backends.cuda import ahead
from pyggml.context import Context, Model

pytestmark = pytest.mark.skipif(native.lib is None, reason="the CPU backend needs the native kernels")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A toy model, and golden logits of it from the CPU backend."""
    monkeypatch.setattr(gpu, "REPEATS", 0)
    monkeypatch.setattr(ahead, "STRETCH", 2)
    path = toys.write(tmp_path / "llama_quant.q8_0.gguf")
    tokens = np.int32([1, 5])
    context = Context(Model.load(path), n_ctx=64)
    logits = context.eval(tokens, "all").copy()
    np.savez(tmp_path / "llama_quant.q8_0.npz", tokens=tokens, logits=logits, gen_ids=logits[-1:].argmax(-1), gen_margin=np.float32([1]))
    return path


def test_every_section_but_those_that_need_programs(toy, capsys):
    kept = toy.with_name("results.json")
    gpu.main(["--sections", "machine,goldens,greedy,speed,leak", "--oracle", str(toy.parent), "--models", str(toy), "--n-gen", "1", "--n-prompt", "2",
              "--depths", "3", "--batches", "2", "--greedy", "2", "--runs", "2", "--results", str(kept)])
    rows = json.loads(kept.read_text())
    assert not [key for key in rows if key.startswith("failed")]
    name = toy.stem
    assert {f"goldens|{name}", f"greedy|{name}", "leak|2 contexts"} < {key for key, row in rows.items() if row["met"] == "yes"}
    assert {f"speed|{name} {what}" for what in ("upload", "memory", "tg one by one", "tg greedy", "pp2", "tg @ d3", "tg, 2 sequences")} < set(rows)
    assert capsys.readouterr().out.rstrip().endswith("|")


def test_what_fails_is_told_and_the_rest_runs(toy, capsys):
    assert gpu.main(["--sections", "goldens,rival,machine"]) == 1
    out = capsys.readouterr().out
    assert "| failed | goldens | name the folder with --oracle |" in out and "| machine | gpu | cuda0 simulator" in out
    assert "name a llama-bench" in out
