"""Work that is counted by hand, and peaks that no step can beat by much."""

from pathlib import Path

import numpy as np
import pytest

from pyggml import native
from pyggml.context import Context
from pyggml.model import Model
from pyggml.roofline import Peaks, Work, measure_peaks

if native.lib is None:
    pytest.skip("counts the work of the kernels", allow_module_level=True)

MODEL = Path(__file__).parents[1] / "golden" / "models" / "llama_quant.q8_0.gguf"


def totals(context):
    times = context.op_times()
    return {op: [sum(x) for x in zip(*((t.work.bytes, t.work.macs, t.ns) for t in times if t.op == op), strict=True)] for op in {t.op for t in times}}


@pytest.fixture
def model():
    return Model.load(MODEL)


def matrices(model, *names):
    return sum(t.size for name, t in model.file.tensors.items() if len(t.shape) == 2 and any(n in name for n in names))


def test_one_token(model):
    context = Context(model, n_ctx=64, timing=True)
    context.eval(np.arange(9))
    before = totals(context)
    context.eval([1])
    after = totals(context)
    c = model.config
    macs = {op: after[op][1] - before.get(op, [0, 0])[1] for op in after}
    output = "output.weight" if "output.weight" in model.file.tensors else "token_embd.weight"
    assert macs["mul_mat"] == sum(matrices(model, f"{name}.weight") for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down"))\
        + model.file[output].size
    assert macs["glu_mat"] == matrices(model, "ffn_gate", "ffn_up")
    assert macs["attention_step"] == sum(c.n_head) * 2 * c.head_dim * 10
    weights = sum(t.nbytes for name, t in model.file.tensors.items() if len(t.shape) == 2 and (name == output or "token_embd" not in name))
    read = sum(after[op][0] - before.get(op, [0])[0] for op in ("mul_mat", "glu_mat"))
    assert weights < read < 1.3 * weights
    assert all(after[op][2] > 0 for op in after)


def test_a_prompt_and_sequences(model):
    c = model.config
    context = Context(model, n_ctx=64, timing=True)
    context.eval(np.arange(20))
    assert totals(context)["attention"][1] == sum(c.n_head) * 2 * c.head_dim * 20 * 21 // 2
    halves, floats = sum(c.n_kv), sum(c.n_head)                 # keys and values; queries and results
    assert totals(context)["attention"][0] == 20 * 2 * c.head_dim * (2 * halves + 4 * floats)
    context = Context(model, n_ctx=64, timing=True)
    for at in range(3):
        context.sequences(np.ones((4, 1), np.int64), at, [0])
    assert totals(context)["attention_step"][1] == sum(c.n_head) * 2 * c.head_dim * 4 * (1 + 2 + 3)
    row = c.n_kv[0] * c.head_dim * 2 * 2
    assert totals(context)["attention_step"][0] >= c.n_layers * row * 4 * (1 + 2 + 3)


@pytest.fixture(params=[isa for isa, usable in native.isa_names().items() if usable])
def isa(request):
    yield native.select_isa(request.param)
    native.select_isa(native.isa)


def test_what_multiplies(isa):
    """Of 40 tokens a matrix unit takes all but what follows the last layer's attention, of which one token is wanted."""
    model = Model.load(MODEL)
    context = Context(model, n_ctx=64, timing=True)
    context.eval(np.arange(40))
    work = {op: np.sum([t.work for t in context.op_times() if t.op == op], 0) for op in ("attention", "glu_mat")}
    c = model.config
    ffn = matrices(model, "ffn_gate", "ffn_up") // c.n_layers
    attention = sum(c.n_head) * 2 * c.head_dim * 40 * 41 // 2
    wide = isa == "amx"
    assert work["glu_mat"][1:].tolist() == ([ffn, 0, 40 * ffn * (c.n_layers - 1)] if wide else [ffn * (1 + 40 * (c.n_layers - 1)), 0, 0])
    if isa != "avx512bf16":         # there it is the processor's choice
        assert work["attention"][1:].tolist() == [0, 0 if wide else attention, attention if wide else 0]


def test_peaks(isa):
    peaks = measure_peaks(1, runs=1)
    assert min(peaks) > 1e8
    assert Peaks(10.0, 20.0, 5.0, 2.0).least(Work(100, bf16=100)) == (50.0, "compute")
    assert Peaks(10.0, 20.0, 5.0, 50.0).least(Work(100, int8=100)) == (10.0, "memory")
    assert Peaks(10.0, 20.0, 5.0, 50.0).least(Work(100, floats=100)) == (20.0, "compute")
    assert Peaks(10.0, 20.0, 5.0, 50.0).least(Work(50)) == (5.0, "memory")
    assert Peaks(10.0, 20.0, 5.0, 50.0).least(Work(100, int8=100, floats=50, bf16=100)) == (17.0, "compute")
