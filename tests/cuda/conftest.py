"""Everything here runs without a GPU, in a process of its own, in one of three ways:

    NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/cuda      kernels as Python, in Numba's simulator
    PYGGML_PTX=8.0 python -m pytest tests/cuda              kernels as the PTX that they are compiled to, on the machine of tests/cuda/ptx
    PYGGML_PTX=driver python -m pytest tests/cuda           the same under a fake driver, so that all above the driver is real too

tests/unit/test_cuda.py does all. Otherwise nothing is collected here: Numba decides once, when it is imported, whether its GPU is real.
"""

import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("PYGGML_KERNEL_CACHE", "0")               # kernels are compiled here, whatever the user's cache holds

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    import lanes

    from pyggml.backends.cuda import prims

    collect_ignore = ["test_ptx_machine.py", "test_large.py", "test_driver.py", "test_gpu_script.py"]
    lanes.install(prims)
elif os.environ.get("PYGGML_PTX") == "driver":
    import fake_driver

    os.environ["PYGGML_KERNEL_CACHE"] = tempfile.mkdtemp()      # of this process, and of those that its tests start
    gc.disable()
    DRIVER = fake_driver.install()
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in ("test_driver.py", "test_gpu_script.py")]

    @pytest.fixture(scope="session")
    def toy(tmp_path_factory):
        """A model of two layers whose heads are wide enough for attention to quantize what it makes."""
        import toys

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(toys, "HEAD", 32)
            return toys.write(tmp_path_factory.mktemp("toy") / "toy.gguf", layers=2)

    def pytest_sessionfinish(exitstatus):
        DRIVER.exitstatus = exitstatus

    def pytest_unconfigure():
        """Ends the process at once: at a usual end the bindings' destructors call the driver, whose functions have gone with the interpreter."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(DRIVER.exitstatus)
elif "PYGGML_PTX" in os.environ:
    import on_machine

    collect_ignore = ["test_decode.py", "test_gpu_script.py", "test_driver.py"]       # whole models
    major, minor = os.environ["PYGGML_PTX"].split(".")
    on_machine.install((int(major), int(minor)))
    gc.disable()                            # compiling makes millions of small objects that stay
else:
    collect_ignore_glob = ["*"]
