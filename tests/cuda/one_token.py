"""A token over the fake driver in a process of its own; prints how many kernels were compiled, and the largest logits.

    PYGGML_KERNEL_CACHE=FOLDER python tests/cuda/one_token.py MODEL
"""

import json
import os
import sys

import fake_driver

driver = fake_driver.install()
from numba.cuda.dispatcher import _Kernel  # noqa: E402

from pyggml.context import Context  # noqa: E402
from pyggml.model import Model  # noqa: E402

compiled = []
compile_ = _Kernel.__init__
_Kernel.__init__ = lambda self, function, *args, **options: (compiled.append(function.__qualname__), compile_(self, function, *args, **options))[1]
logits = Context(Model.load(sys.argv[1]), n_ctx=32, n_gpu_layers="all").eval([1])[-1]
print(json.dumps({"compiled": len(compiled), "logits": [float(x) for x in logits], "problems": driver.problems}), flush=True)
os._exit(0)                             # a usual end calls the driver, whose functions have gone with the interpreter
