"""A machine that runs PTX, for tests on computers without a GPU. Written from NVIDIA's PTX ISA manual alone: it shares nothing with the
Python meanings in pyggml/backends/cuda/prims.py, so that a wrong idea of an instruction shows as a difference.

    text.py          PTX -> kernels: parameters, variables, basic blocks of instructions
    instructions.py  what each opcode does, as Python text over arrays that hold a register of every thread
    arithmetic.py    the functions and expressions in that text
    memory.py        global, shared and local memory, with what a GPU would do wrong: bounds, alignment, races, unwritten bytes
    machine.py       threads: divergence, barriers, warps

Approximate instructions (division, 2^x, roots) are computed exactly; sums within an mma are made in float32 in no particular order.
"""
