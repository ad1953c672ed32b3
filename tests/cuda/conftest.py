"""These tests run the GPU's kernels in Numba's simulator: an OS thread for each lane, so on toy shapes."""

import os
import sys

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"        # before anything imports numba; what is compiled is tested in processes of its own
sys.setswitchinterval(1e-5)                     # the simulator's main thread polls: it must let go of the interpreter soon
