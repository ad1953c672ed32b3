"""A whole model over the fake driver: uploaded, launched, recorded and replayed by the real numba-cuda, computed as the PTX it compiled."""

import gc
import threading

import numpy as np
import pytest
from conftest import DRIVER

from pyggml import native
from pyggml.backends.cuda import device
from pyggml.context import Context, Model
from pyggml.errors import PyggmlError

pytestmark = pytest.mark.skipif(native.lib is None, reason="the CPU backend needs the native kernels")


def test_a_model_launched_recorded_and_replayed(toy):
    model = Model.load(toy)
    cpu, gpu = Context(model, n_ctx=32), Context(model, n_ctx=32, n_gpu_layers="all")
    expected, found = cpu.eval([1, 5, 9])[-1].copy(), gpu.eval([1, 5, 9])[-1].copy()
    nodes = []
    for _ in range(4):                          # launched, recorded, replayed, replayed
        assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
        before = DRIVER.calls.get("nodes", 0)
        token = [int(expected.argmax())]
        expected, found = cpu.eval(token)[-1].copy(), gpu.eval(token)[-1].copy()
        nodes.append(DRIVER.calls.get("nodes", 0) - before)
    assert nodes == [0, 23, 23, 23]             # launches of a token: 8 in a layer, and 15 in the last with the embedding and the logits
    assert not DRIVER.problems and DRIVER.calls["cuStreamBeginCapture"] == 1
    gpu_device = device.open_device(0)
    assert gpu_device.allocated <= DRIVER.used < gpu_device.allocated + (1 << 16)      # beside the arenas only small constants
    del gpu, cpu, model
    gc.collect()
    gpu_device.free                             # noqa: B018  which gives back what waits for it
    assert gpu_device.allocated == 0 and DRIVER.used < 1 << 16 and not any(isinstance(x, list) and len(x) > 1 for x in DRIVER.objects.values())


def test_another_thread_computes_the_same(toy):
    context, rows = Context(Model.load(toy), n_ctx=32, n_gpu_layers="all"), []
    for thread in (threading.Thread(target=lambda: rows.append(context.eval([1])[-1].copy())) for _ in range(2)):
        context.reset()
        thread.start()
        thread.join()
    context.reset()
    rows.append(context.eval([1])[-1].copy())
    assert len(rows) == 3 and (rows[0] == rows[1]).all() and (rows[0] == rows[2]).all() and not DRIVER.problems


def test_memory_that_the_driver_does_not_give():
    gpu_device = device.open_device(0)
    with pytest.raises(PyggmlError, match=r"the test needs 4\.00 GiB on cuda0, where 10\d\d\.\d MiB are free"):
        device.Arena(gpu_device, 4 << 30, "the test")
