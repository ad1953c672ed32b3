"""Whole models on a simulated GPU: the tokens of the CPU backend, shares of layers, memory as forecast, nothing left behind."""

import gc
from pathlib import Path

import numpy as np
import pytest
import toys

from pyggml import native, offload
from pyggml.backends.cuda import ahead, device, plan
from pyggml.context import Context
from pyggml.errors import PyggmlError
from pyggml.model import Model

pytestmark = pytest.mark.skipif(native.lib is None, reason="the CPU backend needs the native kernels")
GOLDEN = Path(__file__).parents[1] / "golden" / "models"
PROMPT = [1, 5, 9]
CELLS = 24


def gpu():
    return device.open_device(0)


def open_model(folder, **options) -> Model:
    return Model.load(toys.write(folder / "toy.gguf", **options))


def continue_greedily(context: Context, n: int) -> tuple[list[int], np.ndarray]:
    """n tokens after PROMPT, each the one with the largest logit, and all rows of logits on the way."""
    rows = [context.eval(PROMPT)[-1].copy()]
    tokens = []
    for _ in range(n):
        tokens.append(int(rows[-1].argmax()))
        rows.append(context.eval(tokens[-1:])[-1].copy())
    return tokens, np.stack(rows)


def close(got: np.ndarray, expected: np.ndarray) -> bool:
    """Within what rounding activations to 8 bits does to a toy."""
    return np.linalg.norm(got - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("options", [dict(), dict(arch="qwen2", tied=True), dict(experts=True), dict(arch="gemma3")],
                         ids=["llama", "qwen2", "experts", "gemma3"])
def test_a_model_of_one_layer_gives_the_cpus_tokens(tmp_path, options):
    model = open_model(tmp_path, **options)
    expected, rows = continue_greedily(Context(model, n_ctx=CELLS), 2)
    context = Context(model, n_ctx=CELLS, n_gpu_layers="all")
    found, mine = continue_greedily(context, 2)
    assert context.gpu_layers == 2 and found == expected and close(mine, rows)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_share_of_the_layers(tmp_path, layers):
    model = open_model(tmp_path, layers=2)
    _, expected = continue_greedily(Context(model, n_ctx=CELLS), 1)
    context = Context(model, n_ctx=CELLS, n_gpu_layers=layers)
    _, mine = continue_greedily(context, 1)
    assert context.gpu_layers == layers and close(mine, expected)
    assert [hasattr(t, "device") for t in context.cache.keys] == [False, layers == 2]
    other = Context(model, n_ctx=CELLS)                 # the cells of both backends move to where everything is on the CPU
    other.restore(context.save())
    assert close(other.eval([3])[-1], context.eval([3])[-1])


def test_decoding_ahead_gives_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "STRETCH", 2)
    model = open_model(tmp_path)
    context = Context(model, n_ctx=CELLS, n_gpu_layers="all")
    row = context.eval(PROMPT)[-1]
    token, start = int(row.argmax()), context.n_past
    expected = context.eval([token])[-1].copy()
    context.truncate(start)
    context.greedy = True
    calls = context.plan(1, 1).program.native_calls
    row = context.eval([token])[-1].copy()
    np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-5)
    following, other = int(row.argmax()), int(row.argmin())
    asked = context.eval([following])[-1].copy()
    assert context.plan(1, 1).program.native_calls - calls == 2         # a stretch, and the next one already: asking twice cost nothing
    context.truncate(start + 1)
    np.testing.assert_allclose(context.eval([other])[-1], fresh_row(model, [*PROMPT, token, other]), rtol=1e-4, atol=1e-4)
    context.truncate(start + 1)
    np.testing.assert_allclose(context.eval([following])[-1], asked, rtol=1e-4, atol=1e-4)


def test_one_launch_does_what_several_steps_say(tmp_path, monkeypatch):
    monkeypatch.setattr(toys, "HEAD", 32)               # heads so narrow as usual do not fill a group that is quantized together
    context = Context(open_model(tmp_path, layers=2), n_ctx=CELLS, n_gpu_layers="all", timing=True)
    plan = context.plan(1, 1)
    said = [(s.op, len(s.beside), s.settles is not None or s.settled, s.hands_on is not None) for s in plan.program.steps]
    assert said[2:7] == [("mul_mat", 2, True, False), ("attention_step", 0, True, True), ("mul_mat", 0, False, True), ("glu_mat", 0, False, True),
                         ("mul_mat", 0, False, True)]
    assert len(said) == len(plan.steps) - 4 and said[7] == said[2]
    context.eval([1])
    assert len(plan.op_times()) == len(plan.steps) and all(row.ns > 0 for row in plan.op_times())


def test_experts_need_no_launches_for_what_they_hand_on(tmp_path):
    plan = Context(open_model(tmp_path, layers=2, experts=True), n_ctx=CELLS, n_gpu_layers="all").plan(1, 1)
    assert [s.op for s in plan.program.steps if s.op.endswith(("mat_id", "moe_sum")) and s.hands_on is None] == ["mul_mat_id"] * 2


def fresh_row(model, tokens):
    return Context(model, n_ctx=CELLS, n_gpu_layers="all").eval(tokens)[-1].copy()


# ---- memory ----

@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("types", [("F16", "F16"), ("Q8_0", "F32")])
def test_the_forecast_is_what_is_allocated(tmp_path, monkeypatch, layers, types):
    if types[0] == "Q8_0":                              # its rows are whole blocks
        monkeypatch.setattr(toys, "HEAD", 32)
    gc.collect()
    before = gpu().allocated
    gpu().peak = before
    context = Context(open_model(tmp_path, layers=2), n_ctx=64, n_gpu_layers=layers, type_k=types[0], type_v=types[1])
    found = context._gpu.forecast
    assert gpu().allocated - before == found.weights + found.cache      # what computes a batch is taken with the first plan
    for n, rows in ((1, 1), (3, 1), (40, 1), (64, 64)):
        context.plan(n, rows)
    assert gpu().allocated - before == found.weights + found.cache + found.compute
    assert gpu().peak - before == found.peak


def test_contexts_leave_nothing_behind(tmp_path):
    model = open_model(tmp_path, layers=2)
    first = Context(model, n_ctx=CELLS, n_gpu_layers="all")
    first.plan(1, 1)
    del first
    gc.collect()
    held = gpu().allocated                              # the weights, which are the model's
    gc.disable()                                        # memory comes back with its owner, not when Python gets round to it
    for layers in [1, 2, 3] * 10:
        context = Context(model, n_ctx=CELLS, n_gpu_layers=layers)
        context.plan(1, 1)
        context.plan(9, 1)
        assert gpu().allocated > held
        del context
        assert gpu().allocated == held
    gc.enable()
    del model
    gc.collect()
    assert gpu().allocated < held


def test_too_little_memory_names_both_figures_and_what_fits(tmp_path, monkeypatch):
    model = open_model(tmp_path, layers=2)
    graph = []
    monkeypatch.setattr(offload, "Share", lambda weights, g, found: graph.append((g, weights)))
    Context(model, n_ctx=64, n_gpu_layers="all")
    two, three = (offload.forecast(*graph[0][:1], n, graph[0][1]).peak for n in (2, 3))
    monkeypatch.undo()
    monkeypatch.setattr(device.Device, "free", property(lambda self: two))
    with pytest.raises(PyggmlError, match=rf"^3 layers need {device.gib(three)} \(weights .*, cache .*, computing .*\) on cuda0, where "
                                          rf"{device.gib(two)} are free; use -ngl 2, which fit, or a smaller context \(-c\)$"):
        Context(model, n_ctx=64, n_gpu_layers="all")
    monkeypatch.setattr(offload, "MARGIN", 0)
    assert Context(model, n_ctx=64, n_gpu_layers="auto", device="cuda0").gpu_layers == 2
    monkeypatch.setattr(device.Device, "free", property(lambda self: 1000))
    assert Context(model, n_ctx=64, n_gpu_layers="auto", device="cuda0").gpu_layers == 0


def test_auto_leaves_a_model_to_the_cpu_that_has_steps_without_kernels(tmp_path, monkeypatch):
    launches, needs = plan.kernels()
    monkeypatch.setattr(plan, "kernels", lambda: ({op: launch for op, launch in launches.items() if op != "moe_sum"}, needs))
    model = open_model(tmp_path, experts=True)
    assert Context(model, n_ctx=64, n_gpu_layers="auto", device="cuda0").gpu_layers == 0
    with pytest.raises(PyggmlError, match="the step moe_sum has no CUDA kernel; use -ngl 0"):
        Context(model, n_ctx=64, n_gpu_layers="all")


def test_gpt_oss_with_its_sinks_and_biases_of_experts():
    model = Model.load(GOLDEN / "gpt-oss.mxfp4.gguf")
    expected, rows = continue_greedily(Context(model, n_ctx=CELLS), 1)
    found, mine = continue_greedily(Context(model, n_ctx=CELLS, n_gpu_layers="all"), 1)
    assert found == expected and close(mine, rows)


def test_a_simulator_is_used_only_when_it_is_asked_for(tmp_path):
    assert Context(open_model(tmp_path), n_ctx=CELLS, n_gpu_layers="auto").gpu_layers == 0


def test_there_is_one_simulated_gpu(tmp_path):
    with pytest.raises(PyggmlError, match="there is no cuda1; the driver finds cuda0"):
        Context(open_model(tmp_path), n_ctx=CELLS, n_gpu_layers=1, main_gpu=1)
