"""What tools/bench/gpu.py measures: each function takes a run (its device, options and results) and adds rows to the results."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden import hold_against  # noqa: E402

from pyggml.backends.cuda.device import gib, gpus, simulated  # noqa: E402
from pyggml.context import Context  # noqa: E402
from pyggml.errors import PyggmlError  # noqa: E402
from pyggml.model import Model  # noqa: E402

if TYPE_CHECKING:
    from gpu_run import Run, Source

BUNDLED = Path(__file__).parents[2] / "models" / "books6m-q8_0.gguf"
GOLDENS = Path(__file__).parents[2] / "tests" / "golden" / "models"
DECODE_SHARE = {"tinyllama-1.1b": 0.45, "llama3-8b": 0.75}      # of the copy bandwidth: the goals
PREFILL_SHARE = {"llama3-8b": 0.5}                              # of the FP16 rate
SOFTWARE = ("numpy", "numba", "numba-cuda", "cuda-bindings", "cuda-core", "llvmlite")
REPEATS = 3


def seconds(device: Any, work: Callable[[], object]) -> float:
    """The fastest of a few runs, the first of which warms up."""
    best = float("inf")
    for i in range(REPEATS + 1):
        device.synchronize()
        start = time.perf_counter()
        work()
        device.synchronize()
        best = min(best, time.perf_counter() - start) if i else best
    return best


# ---- machine ------------------------------------------------------------------------------------------------------------------

def machine(run: Run) -> None:
    """The GPU, what it copies a second, and what cuBLAS multiplies a second."""
    add = run.results.add
    add("machine", "gpu", str(gpus()[run.args.main_gpu]))
    add("machine", "software", f"Python {platform.python_version()}, " + ", ".join(f"{name} {metadata.version(name)}" for name in SOFTWARE))
    add("machine", "copy bandwidth", f"{run.device.copy_bandwidth() / 1e9:.0f} GB/s")
    rate = matmul_rate(run.device)
    add("machine", "FP16 matmul", f"{rate / 1e12:.0f} TFLOP/s" if rate else "0 (no cuBLAS here)")


def matmul_rate(device: Any, n: int = 8192) -> float:
    """Floating point operations a second of an FP16 product with FP32 sums by cuBLAS; 0 where its library is not found."""
    library = next((x for x in (_load(name) for name in cublas_names()) if x is not None), None)
    if library is None or simulated():
        return 0.0
    handle, one, zero = ctypes.c_void_p(), ctypes.c_float(1), ctypes.c_float(0)
    half, compute_32f = 2, 68                                       # CUDA_R_16F, CUBLAS_COMPUTE_32F
    with device.active():
        arrays = [device.cuda.device_array(n * n, np.float16) for _ in range(3)]
        numbers = np.random.default_rng(1).standard_normal(n * n, np.float32).astype(np.float16)        # zeros are faster: they take less power
        for array in arrays[:2]:
            device.upload(array, numbers)
        if library.cublasCreate_v2(ctypes.byref(handle)) or library.cublasSetStream_v2(handle, ctypes.c_void_p(int(device.stream))):
            return 0.0
        a, b, c = (ctypes.c_void_p(x.device_ctypes_pointer.value) for x in arrays)

        def product() -> None:
            status = library.cublasGemmEx(handle, 1, 0, n, n, n, ctypes.byref(one), a, half, n, b, half, n, ctypes.byref(zero), c, half, n,
                                          compute_32f, -1)
            if status:
                raise PyggmlError(f"cuBLAS answers {status} to a product")

        def ten() -> None:
            for _ in range(10):
                product()

        taken = seconds(device, ten) / 10
        library.cublasDestroy_v2(handle)
    return 2 * n**3 / taken


def cublas_names() -> list[str]:
    """Where cuBLAS may be: the system's, or a package's."""
    packages = [str(p) for folder in sys.path for p in Path(folder).glob("nvidia/*/lib/libcublas.so.1[0-9]")]
    return [name for name in (ctypes.util.find_library("cublas"), "libcublas.so.13", "libcublas.so.12", *packages) if name]


def _load(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


# ---- goldens and greedy -----------------------------------------------------------------------------------------------------

def golden_files(oracle: Path, only: str | None) -> list[Path]:
    """The golden logits in a folder whose names contain `only`."""
    paths = sorted((oracle / "golden").glob("*.npz")) or sorted(oracle.glob("*.npz"))
    return [path for path in paths if not only or only in path.stem]


def golden(run: Run, path: Path | None) -> None:
    """The logits of one golden file."""
    if path is None:
        raise PyggmlError(f"there are no golden logits in {run.args.oracle}; name their folder with --oracle")
    models = run.args.oracle / "models" if (run.args.oracle / "models").exists() else run.args.oracle
    found, wrong = hold_against(path, models, n_gpu_layers="all", main_gpu=run.args.main_gpu)
    run.results.add("goldens", path.stem, "  ".join(f"{k} {v:.2g}" for k, v in found.items() if k in ("rel_l2", "kl_mean", "top1")),
                    "within native bounds", not wrong)
    for said in wrong:
        print("   ", said)


def greedy(run: Run, source: Source) -> None:
    found, said = greedy_agreement(run, Model.load(source.path))
    run.results.add("greedy", source.name, said, "the CPU's to a near-tie", found)


def greedy_agreement(run: Run, model: Model) -> tuple[bool, str]:
    """Decode on the GPU, then hold every choice against the CPU's logits after the same tokens."""
    n = min(run.args.greedy, model.config.n_ctx_train - 9)
    prompt = np.random.default_rng(3).integers(3, model.n_vocab, 8).tolist()
    context = run.context(model, n_ctx=n + 9)
    context.greedy = True
    rows = [context.eval(prompt)[-1].copy()]
    ids = [int(rows[0].argmax())]
    while len(ids) < n:
        rows.append(context.eval(ids[-1:])[0].copy())
        ids.append(int(rows[-1].argmax()))
    cpu = Context(model, n_ctx=n + 9).eval([*prompt, *ids[:-1]], "all")[len(prompt) - 1:]
    for step, (mine, theirs) in enumerate(zip(rows, cpu, strict=True)):
        chosen, best = ids[step], int(theirs.argmax())
        error = 2 * float(np.abs(mine - theirs).max())
        margin = float(theirs[best] - theirs[chosen])
        if chosen != best:
            return margin <= error, f"{step} of {n} tokens, then a margin of {margin:.3g} (errors {error / 2:.2g})"
    return True, f"all {n} tokens"


# ---- speed and memory -----------------------------------------------------------------------------------------------------------

def matrices(model: Model) -> dict[str, Any]:
    """The matrices of a dense model that multiply a token."""
    looked_up = {"token_embd.weight"} if "output.weight" in model.file.tensors else set()
    return {name: t for name, t in model.file.tensors.items() if len(t.shape) > 1 and name not in looked_up}


def prompt_products(model: Model, n: int) -> int:
    """Multiplications of a prompt of n tokens: the output, which may be the token table, has its part in the last one alone."""
    weights = {name: int(np.prod(t.shape, dtype=np.int64)) for name, t in matrices(model).items()}
    output = weights.get("output.weight") or weights["token_embd.weight"]
    return (sum(weights.values()) - output) * n + output


def loading(run: Run, source: Source) -> None:
    """Upload and re-lay; then the memory that is gone against the forecast."""
    name, model = source.name, Model.load(source.path)
    for tensor in model.file.tensors.values():                       # from the disk into the page cache
        tensor.stored[::4096].max()
    before = run.device.free
    start = time.perf_counter()
    context = run.context(model, n_ctx=2176)
    run.device.synchronize()
    taken = time.perf_counter() - start
    run.results.add("speed", f"{name} upload", f"{taken:.2f} s, {model.nbytes / taken / 1e9:.1f} GB/s")
    context.eval(np.ones(run.args.n_prompt[0], np.int64))
    context.eval([1])
    gone = before - run.device.free
    forecast = context._gpu.forecast.peak
    off = (gone - forecast) / forecast if not simulated() else 0.0
    run.results.add("speed", f"{name} memory", f"{gib(gone if gone == gone else 0)} of {gib(forecast)} forecast", "within 3%", abs(off) <= 0.03)


def decoding(run: Run, source: Source) -> None:
    """A token at a time, chosen by the host and by the GPU."""
    name, shape, model = source.name, source.shape, Model.load(source.path)
    n = run.args.n_gen
    context = run.context(model, n_ctx=max(2 * n, 64) + 8)
    read = sum(t.nbytes for t in matrices(model).values())
    bandwidth = run.results.number("machine", "copy bandwidth") * 1e9
    tokens = np.random.default_rng(1).integers(3, model.n_vocab, n)

    def one_by_one() -> None:
        context.reset()
        for token in tokens:
            context.eval([token])

    def going_on() -> None:
        context.reset()
        context.greedy = True
        row = context.eval(tokens[:1])[-1]
        for _ in range(n - 1):
            row = context.eval([int(row.argmax())])[-1]
        context.greedy = False

    for what, work in (("tg one by one", one_by_one), ("tg greedy", going_on)):
        taken = seconds(run.device, work) / n
        share = read / taken / bandwidth if bandwidth else 0.0
        goal = DECODE_SHARE.get(shape)
        run.results.add("speed", f"{name} {what}", f"{1 / taken:.1f} t/s, {100 * share:.0f}% of the copy bandwidth",
                        f"{100 * goal:.0f}%" if goal else "", share >= goal if goal and what == "tg greedy" else None)


def prefilling(run: Run, source: Source) -> None:
    """Prompts of each length."""
    name, shape, model = source.name, source.shape, Model.load(source.path)
    rate = run.results.number("machine", "FP16 matmul") * 1e12
    for n in run.args.n_prompt:
        context = run.context(model, n_ctx=n, n_ubatch=min(n, 2048), n_batch=n)
        tokens = np.random.default_rng(1).integers(3, model.n_vocab, n)

        def prefill(context: Context = context, tokens: np.ndarray = tokens) -> None:
            context.reset()
            context.eval(tokens)

        taken = seconds(run.device, prefill)
        share, goal = (2 * prompt_products(model, n) / taken / rate if rate else 0.0), PREFILL_SHARE.get(shape)
        run.results.add("speed", f"{name} pp{n}", f"{n / taken:.0f} t/s, {100 * share:.0f}% of the FP16 rate", f"{100 * goal:.0f}%" if goal else "",
                        share >= goal if goal and rate else None)


def depths(run: Run, source: Source) -> None:
    """Decoding behind a long cache; its content does not matter for the speed."""
    name, model = source.name, Model.load(source.path)
    n = min(32, run.args.n_gen)
    for depth in run.args.depths:
        context = run.context(model, n_ctx=depth + 40)
        context.n_past = depth

        def decode(context: Context = context, depth: int = depth) -> None:
            context.truncate(depth)
            for _ in range(n):
                context.eval([5])

        run.results.add("speed", f"{name} tg @ d{depth}", f"{n / seconds(run.device, decode):.1f} t/s")


def batches(run: Run, source: Source) -> None:
    """Several sequences that decode a token at a time."""
    name, model = source.name, Model.load(source.path)
    n = min(16, run.args.n_gen)
    for count in run.args.batches:
        context = run.context(model, n_ctx=64 * count, n_ubatch=max(64, count))

        def decode(context: Context = context, count: int = count) -> None:
            for start in range(n):
                context.sequences(np.full((count, 1), 5), start, [0])

        run.results.add("speed", f"{name} tg, {count} sequences", f"{n * count / seconds(run.device, decode):.1f} t/s")


# ---- leaks, the sanitizer, the rival ----------------------------------------------------------------------------------------

def leak(run: Run) -> None:
    model = Model.load(run.args.models[0] if run.args.models else BUNDLED)

    def one() -> None:
        context = run.context(model, n_ctx=64)
        context.eval([1, 2, 3])
        context.eval([4])

    for _ in range(3):
        one()
    gc.collect()
    before, counted = run.device.free, run.device.allocated
    done = 0
    while done < run.args.runs:
        one()
        done += 1
    lost = 0 if simulated() else before - run.device.free
    run.results.add("leak", f"{done} contexts", f"{lost / 2**20:.1f} MiB gone, {run.device.allocated - counted} bytes held", "0",
                    lost < 16 << 20 and run.device.allocated == counted and done == run.args.runs)


def sanitizer(run: Run) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise PyggmlError("compute-sanitizer is not installed here")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(Path(__file__).with_name("gpu.py")), "--in-process",
               "--sections", "goldens", "--oracle", str(run.args.oracle), "--only", run.args.only or "llama_quant.q4_k", "--patience", "20"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYGGML_CUDA_GRAPHS": "0"}, check=False)
    summary = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR SUMMARY" in line]
    run.results.add("sanitizer", "memcheck", summary[-1].strip("= ") if summary else f"exit status {done.returncode}", "0 errors",
                    done.returncode == 0 and bool(summary))


def rival(run: Run, source: Source) -> None:
    """llama-bench on the same file."""
    if run.args.llama_bench is None:
        raise PyggmlError("name a llama-bench with --llama-bench")
    command = [str(run.args.llama_bench), "-m", str(source.path), "-ngl", "99", "-p", ",".join(map(str, run.args.n_prompt)),
               "-n", str(run.args.n_gen), "-fa", "1", "-o", "json", "-mg", str(run.args.main_gpu)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PyggmlError(f"{run.args.llama_bench} ends with {done.returncode}: {done.stderr.strip()[-150:]}")
    for row in json.loads(done.stdout[done.stdout.index("["):]):
        test = f"pp{row['n_prompt']}" if row["n_prompt"] else "tg one by one"
        ours = run.results.number("speed", f"{source.name} {test}")
        run.results.add("rival", f"{source.name} {test}", f"{row['avg_ts']:.1f} t/s" + (f", ours {ours / row['avg_ts']:.2f} of it" if ours else ""),
                        "at or ahead" if "tg" in test else "", ours >= row["avg_ts"] if "tg" in test and ours else None)
