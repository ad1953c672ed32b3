"""Everything here runs in Numba's simulator, in a process of its own (tests/unit/test_cuda.py starts it): Numba decides once, when it is
imported, whether its GPU is a simulated one."""

import os

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

import pytest  # noqa: E402

pytest.importorskip("numba_cuda", reason="the CUDA backend needs the extra [cuda]")
pytest.importorskip("greenlet", reason="the simulator needs greenlet, of the extra [test]")

import lanes  # noqa: E402

from pyggml.backends.cuda import prims  # noqa: E402

lanes.install(prims)
