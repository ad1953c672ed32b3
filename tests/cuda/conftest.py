"""Everything here runs in Numba's simulator, in a process of its own: Numba decides once, when it is imported, whether its GPU is a
simulated one. `NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/cuda` runs it, and so does tests/unit/test_cuda.py; otherwise nothing is
collected here.
"""

import os

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    collect_ignore_glob = ["*"]
else:
    import lanes

    from pyggml.backends.cuda import prims

    lanes.install(prims)
