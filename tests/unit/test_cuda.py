"""The CUDA backend, as far as a machine without a GPU can tell: what is said where it cannot be used, and the tests in the simulator."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pyggml import cli, native, offload
from pyggml.backends.cuda import device
from pyggml.context import Context
from pyggml.errors import ParameterError, PyggmlError
from pyggml.graph import walk
from pyggml.model import Model
from pyggml.shapes import OUTPUTS, TOKENS

TESTS = Path(__file__).parents[1]
MODEL = TESTS / "golden" / "models" / "llama_quant.q8_0.gguf"
needs_native = pytest.mark.skipif(native.lib is None, reason="layers are shared between the native kernels and a GPU")
missing = [name for name in ("numba_cuda", "greenlet") if importlib.util.find_spec(name) is None]
OLD, NEW = device.Gpu(0, "Old", (6, 1), 8 << 30), device.Gpu(1, "New", (9, 0), 80 << 30)


@pytest.mark.skipif(bool(missing), reason=f"the simulator needs {', '.join(missing)}: pip install 'pyggml[cuda,test]'")
def test_in_the_simulator():
    """tests/cuda, in a process whose Numba simulates a GPU."""
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(TESTS / "cuda")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


PTX = {                                             # capability (or the fake driver) and tests, by process, side by side
    "9.0": ["test_attention.py", "test_large.py", "test_gemm.py"],
    "8.0": ["test_ptx_machine.py", "test_rows.py", "test_layout.py", "test_matvec.py", "test_qkv.py"],
    "driver": ["test_driver.py", "test_gpu_script.py"],
    "7.5": ["test_gemm.py", "-k", "every_epilogue and F16"],        # other matrix instructions, and no copies behind the kernel's back
}


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="compiling for a GPU needs it: pip install 'pyggml[cuda]'")
def test_the_ptx_of_every_kernel():
    """tests/cuda once more, with kernels as they are compiled for GPUs, on the machine of tests/cuda/ptx."""
    started = []
    for capability, (first, *others) in PTX.items():
        environment = {**os.environ, "PYGGML_PTX": capability, "NUMBA_ENABLE_CUDASIM": "0"}
        files = [str(TESTS / "cuda" / name) if name.endswith(".py") else name for name in (first, *others)]
        started.append(subprocess.Popen([sys.executable, "-m", "pytest", "-q", "-x", *files], env=environment, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT))
    for process in started:
        out, _ = process.communicate()
        assert process.returncode == 0, out[-6000:]


def test_what_the_gpus_script_needs_is_named():
    done = subprocess.run([sys.executable, "-I", "-S", str(TESTS.parent / "tools" / "bench" / "gpu.py"), "--dry-run"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 1 and done.stderr.startswith("gpu.py: there is no numpy, cffi") and "pip install -e '.[cuda]'" in done.stderr


@pytest.fixture
def machine(monkeypatch):
    """Set what is found: machine(gpus, why there is none, whether numba-cuda is installed, what its compiler lacks)."""
    def set(gpus=(), reason="", installed=True, compiler=""):
        monkeypatch.setattr(device, "_no_compiler", lambda: compiler)
        monkeypatch.setattr(device, "_probe", lambda: (gpus, reason))
        monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object() if installed else None)
    return set


@pytest.mark.parametrize("arguments, expected", [
    (dict(reason="there is no NVIDIA driver (libcuda.so.1 is not found)"), "there is no NVIDIA driver .*-ngl 0"),
    (dict(reason="the NVIDIA driver finds no GPU"), "finds no GPU.*-ngl 0"),
    (dict(gpus=(OLD,)), r"cuda0 \(Old\) has compute capability 6.1 and 7.5 is needed"),
    (dict(gpus=(dataclasses.replace(NEW, driver=(11, 4)),)), "the NVIDIA driver speaks CUDA 11.4 and the compiler that is installed CUDA 12; update"),
    (dict(gpus=(NEW,), compiler="the CUDA compiler's libraries are not found"), "the CUDA compiler's libraries are not found; use -ngl 0"),
    (dict(gpus=(NEW,), installed=False), r"numba-cuda is not installed \(pip install 'pyggml\[cuda\]'\)"),
])
@needs_native
def test_why_layers_cannot_go_to_a_gpu(machine, arguments, expected):
    machine(**arguments)
    with pytest.raises(PyggmlError, match=expected):
        Context(Model.load(MODEL), n_ctx=32, n_gpu_layers="all")
    assert Context(Model.load(MODEL), n_ctx=32, n_gpu_layers="auto").gpu_layers == 0


@needs_native
def test_a_gpu_that_is_not_there(machine):
    machine((OLD, NEW))
    with pytest.raises(PyggmlError, match="there is no cuda2; the driver finds cuda0, cuda1"):
        Context(Model.load(MODEL), n_ctx=32, n_gpu_layers=1, main_gpu=2)
    with pytest.raises(ParameterError, match="device 'gpu' is unknown; use none, cpu, cuda0, cuda1"):
        Context(Model.load(MODEL), n_ctx=32, n_gpu_layers=1, device="gpu")
    with pytest.raises(ParameterError, match="device 'cuda0,cuda1' is unknown; use one of none, cpu, cuda0, cuda1"):
        Context(Model.load(MODEL), n_ctx=32, n_gpu_layers=1, device="CUDA0,CUDA1")
    with pytest.raises(ParameterError, match="device 'cuda-1' is unknown; use none, cpu, cuda0, cuda1"):
        Context(Model.load(MODEL), n_ctx=32, n_gpu_layers=1, main_gpu=-1)
    assert Context(Model.load(MODEL), n_ctx=32, n_gpu_layers="all", device="none").gpu_layers == 0


@pytest.mark.parametrize("given, expected", [("auto", None), ("all", offload.ALL), (-1, offload.ALL), ("-1", offload.ALL), (0, 0), ("12", 12)])
def test_numbers_of_layers(given, expected):
    assert offload.count(given) == expected


@pytest.mark.parametrize("bad", ["some", "-2", "1.5", ""])
def test_no_number_of_layers(bad):
    with pytest.raises(ParameterError, match="it must be a number of layers, all or auto"):
        offload.count(bad)


@needs_native
def test_exact_contexts_stay_on_the_cpu(machine):
    machine((NEW,))
    with pytest.raises(ParameterError, match="exact=True computes on the CPU"):
        Context(Model.load(MODEL), n_ctx=32, n_gpu_layers=1, exact=True)


def test_doctor_names_gpus(machine, capsys):
    machine((OLD, NEW))
    cli.main(["doctor"])
    out = capsys.readouterr().out
    assert "cuda0 Old, compute capability 6.1, 8.00 GiB (not used: " in out and "; cuda1 New, compute capability 9.0, 80.00 GiB\n" in out


def test_without_a_driver_numba_is_not_even_looked_for():
    code = ("import sys; from pyggml import Context, Model; from pyggml.backends.cuda import device; device._DRIVER = 'libno-such-driver.so';"
            f"Context(Model.load({str(MODEL)!r}), n_ctx=32, n_gpu_layers='auto').eval([1]); sys.exit('numba' in sys.modules)")
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@needs_native
@pytest.mark.parametrize("name", ["llama_quant.q8_0", "mixtral.q4_k_m_mix", "stories260K.bf16"])
def test_a_cut_graph_computes_what_the_whole_does(name):
    """Both parts on the CPU."""
    from pyggml.offload import chain

    model = Model.load(TESTS / "golden" / "models" / f"{name}.gguf")
    whole = Context(model, n_ctx=32)
    tokens = np.arange(12) % model.n_vocab
    expected = whole.eval(tokens, "all").copy()
    for first in range(1, model.config.n_layers + 1):
        context = Context(model, n_ctx=32)
        output, builder = context._graph
        inside = [t for t in walk([output]) if t.op == "rms_norm"]
        store = model.weights(repack=True, exact=False)
        limits = {TOKENS: 16, OUTPUTS: 16}
        plan = chain(output, builder.entering[first], inside, (store, store), limits, False)
        given = {"tokens": tokens, "pos": range(12), "cell": range(12), "first": 0, "wanted": range(12)}
        plan.fill(given, dict.fromkeys(given, 12))
        assert plan.run(context.pool, {TOKENS: 12, OUTPUTS: 12})
        np.testing.assert_allclose(plan.output[:12], expected, atol=0.02 * np.abs(expected).max())
        assert [c.shape[1] for c in plan.captured] == [t.shape[-1] for t in inside]
