"""A whole model over the fake driver: uploaded, launched, recorded and replayed by the real numba-cuda, computed as the PTX it compiled."""

import gc

import numpy as np
import pytest
import toys
from conftest import DRIVER

from pyggml import native
from pyggml.backends.cuda import device
from pyggml.context import Context, Model
from pyggml.errors import PyggmlError

pytestmark = pytest.mark.skipif(native.lib is None, reason="the CPU backend needs the native kernels")


def test_a_model_launched_recorded_and_replayed(tmp_path):
    model = Model.load(toys.write(tmp_path / "toy.gguf"))
    cpu, gpu = Context(model, n_ctx=32), Context(model, n_ctx=32, n_gpu_layers="all")
    expected, found = cpu.eval([1, 5, 9])[-1].copy(), gpu.eval([1, 5, 9])[-1].copy()
    nodes = []
    for _ in range(4):                          # launched, recorded, replayed, replayed
        assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
        before = DRIVER.calls.get("nodes", 0)
        token = [int(expected.argmax())]
        expected, found = cpu.eval(token)[-1].copy(), gpu.eval(token)[-1].copy()
        nodes.append(DRIVER.calls.get("nodes", 0) - before)
    assert nodes == [0, 18, 18, 18]             # launches of a token through one layer, its embedding and its logits
    assert not DRIVER.problems and DRIVER.calls["cuStreamBeginCapture"] == 1
    gpu_device = device.open_device(0)
    assert gpu_device.allocated <= DRIVER.used < gpu_device.allocated + (1 << 16)      # beside the arenas only small constants
    del gpu, cpu, model
    gc.collect()
    gpu_device.free                             # noqa: B018  which gives back what waits for it
    assert gpu_device.allocated == 0 and DRIVER.used < 1 << 16 and not any(isinstance(x, list) and len(x) > 1 for x in DRIVER.objects.values())


def test_memory_that_the_driver_does_not_give():
    gpu_device = device.open_device(0)
    with pytest.raises(PyggmlError, match=r"the test needs 4\.00 GiB on cuda0, where 10\d\d\.\d MiB are free"):
        device.Arena(gpu_device, 4 << 30, "the test")
