"""The CUDA backend (extra `cuda`): the same graphs, fusions and steps as the CPU backend, run by kernels written with Numba."""
