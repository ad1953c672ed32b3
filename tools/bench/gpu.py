"""Everything that pyggml claims about a GPU, measured on one: a short table comes last.

    python tools/bench/gpu.py --oracle FOLDER --shapes tinyllama-1.1b,llama3-8b --types Q4_0,Q4_K_M,Q8_0,F16 --results gpu.json

    machine     the GPU, the bytes it copies a second, the FP16 products it makes a second (cuBLAS, where there is one)
    goldens     logits of llama.cpp (FOLDER/models, FOLDER/golden): every model within the bounds of tools/golden.py
    greedy      512 tokens of each model, equal to the CPU backend's up to the first near-tie
    speed       per shape and type: upload, memory against the forecast, decode, prefill, depths, batches
    leak        1,000 contexts, and the memory that is free before and after them
    sanitizer   compute-sanitizer over a golden model, where it is installed
    rival       llama-bench (--llama-bench PATH) on the same models

A section that fails is reported and the next one runs. Models are random (random_model.py), made in --folder and deleted after use.
With --results every figure is kept in a file, so that runs of a few sections each (--sections, --shapes, --types, --limit SECONDS) end in one
table.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import gc
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from golden import hold_against  # noqa: E402
from random_model import MIXES, SHAPES, write_random_model  # noqa: E402

from pyggml.backends.cuda.device import gib, gpus, open_device, simulated, why_not  # noqa: E402
from pyggml.context import Context, Model  # noqa: E402
from pyggml.errors import PyggmlError  # noqa: E402

BUNDLED = Path(__file__).parents[2] / "models" / "books6m-q8_0.gguf"
DECODE_SHARE = {"tinyllama-1.1b": 0.45, "llama3-8b": 0.75}      # of the copy bandwidth: the goals
PREFILL_SHARE = {"llama3-8b": 0.5}                              # of the FP16 rate
REPEATS = 3


class Results:
    """Figures by (section, what); kept in a file where one is named."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, dict[str, str]] = json.loads(path.read_text()) if path is not None and path.exists() else {}

    def add(self, section: str, what: str, figure: str, goal: str = "", met: bool | None = None) -> None:
        verdict = "" if met is None else "yes" if met else "NO"
        self.rows[f"{section}|{what}"] = {"figure": figure, "goal": goal, "met": verdict, "date": time.strftime("%Y-%m-%d %H:%M")}
        print(f"{section:<10} {what:<44} {figure:<34} {goal:<22} {verdict}", flush=True)
        if self.path is not None:
            beside = self.path.with_suffix(".tmp")
            beside.write_text(json.dumps(self.rows, indent=1))
            beside.replace(self.path)

    def number(self, section: str, what: str) -> float:
        """A figure from before, as its leading number; 0 where it is not known."""
        row = self.rows.get(f"{section}|{what}")
        return float(row["figure"].split()[0]) if row else 0.0

    def table(self) -> str:
        lines = ["| section | what | figure | goal | met |", "|---|---|---|---|---|"]
        for key, row in self.rows.items():
            section, what = key.split("|")
            lines.append(f"| {section} | {what} | {row['figure']} | {row['goal']} | {row['met']} |")
        return "\n".join(lines)


class Run:
    """One call of this script: its options, its results, and how long it may go on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.results, self.end = args, Results(args.results), time.monotonic() + args.limit
        self.device = open_device(args.main_gpu)

    @property
    def late(self) -> bool:
        return time.monotonic() > self.end

    def context(self, model: Model, **options: Any) -> Context:
        return Context(model, n_gpu_layers="all", main_gpu=self.args.main_gpu, **options)

    def models(self) -> Iterator[tuple[str, str, Path]]:
        """(shape, type, file) of every model asked for; a made one is deleted behind."""
        for path in self.args.models:
            yield "", path.stem, path
        for shape in filter(None, self.args.shapes.split(",")):
            for kind in self.args.types.split(","):
                if self.late:
                    print(f"left out, as {self.args.limit} s are over: {shape} {kind}")
                    continue
                path = self.args.folder / f"{shape}-{kind}.gguf"
                made = not path.exists()
                if made:
                    write_random_model(path, shape, kind)
                try:
                    yield shape, kind, path
                finally:
                    if made and not self.args.keep:
                        path.unlink()


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
    add = run.results.add
    add("machine", "gpu", str(gpus()[run.args.main_gpu]))
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
        for array in arrays:
            device.clear(array)
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

def goldens(run: Run) -> None:
    if run.args.oracle is None:
        raise PyggmlError("name the folder with --oracle")
    paths = sorted((run.args.oracle / "golden").glob("*.npz")) or sorted(run.args.oracle.glob("*.npz"))
    models = run.args.oracle / "models" if (run.args.oracle / "models").exists() else run.args.oracle
    for path in paths:
        if run.args.only and run.args.only not in path.stem:
            continue
        if run.late:
            print(f"left out, as {run.args.limit} s are over: {path.stem} and what follows")
            return
        found, wrong = hold_against(path, models, n_gpu_layers="all", main_gpu=run.args.main_gpu)
        run.results.add("goldens", path.stem, "  ".join(f"{k} {v:.2g}" for k, v in found.items() if k in ("rel_l2", "kl_mean", "top1")),
                        "within native bounds", not wrong)
        for said in wrong:
            print("   ", said)


def greedy(run: Run) -> None:
    bundled = [("", BUNDLED.stem, BUNDLED)] if not run.args.models else []
    for _, _, path in chain(bundled, run.models()):
        with reported(run, f"greedy {path.stem}"):
            found, said = greedy_agreement(run, Model.load(path))
            run.results.add("greedy", path.stem, said, "the CPU's to a near-tie", found)


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

def matrix_numbers(model: Model) -> tuple[int, int]:
    """(bytes of weights that a token reads, weights that multiply it) of a dense model."""
    looked_up = {"token_embd.weight"} if "output.weight" in model.file.tensors else set()
    read = [t for name, t in model.file.tensors.items() if len(t.shape) > 1 and name not in looked_up]
    return sum(t.nbytes for t in read), sum(int(np.prod(t.shape, dtype=np.int64)) for t in read)


def speed(run: Run) -> None:
    for shape, kind, path in run.models():
        name = f"{shape} {kind}".strip()
        for measure in (loading, decoding, prefilling, depths, batches):
            if run.late:
                print(f"left out, as {run.args.limit} s are over: {name} {measure.__name__} and what follows")
                break
            with reported(run, f"{name} {measure.__name__}"):
                measure(run, name, shape, Model.load(path))


def loading(run: Run, name: str, shape: str, model: Model) -> None:
    """Upload and re-lay; then the memory that is gone against the forecast."""
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


def decoding(run: Run, name: str, shape: str, model: Model) -> None:
    n = run.args.n_gen
    context = run.context(model, n_ctx=max(2 * n, 64) + 8)
    read, _ = matrix_numbers(model)
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


def prefilling(run: Run, name: str, shape: str, model: Model) -> None:
    rate = run.results.number("machine", "FP16 matmul") * 1e12
    _, weights = matrix_numbers(model)
    for n in run.args.n_prompt:
        context = run.context(model, n_ctx=n, n_ubatch=min(n, 2048), n_batch=n)
        tokens = np.random.default_rng(1).integers(3, model.n_vocab, n)

        def prefill(context: Context = context, tokens: np.ndarray = tokens) -> None:
            context.reset()
            context.eval(tokens)

        taken = seconds(run.device, prefill)
        share, goal = (2 * weights * n / taken / rate if rate else 0.0), PREFILL_SHARE.get(shape)
        run.results.add("speed", f"{name} pp{n}", f"{n / taken:.0f} t/s, {100 * share:.0f}% of the FP16 rate", f"{100 * goal:.0f}%" if goal else "",
                        share >= goal if goal and rate else None)


def depths(run: Run, name: str, shape: str, model: Model) -> None:
    """Decoding behind a long cache; its content does not matter for the speed."""
    n = min(32, run.args.n_gen)
    for depth in run.args.depths:
        context = run.context(model, n_ctx=depth + 40)
        context.n_past = depth

        def decode(context: Context = context, depth: int = depth) -> None:
            context.truncate(depth)
            for _ in range(n):
                context.eval([5])

        run.results.add("speed", f"{name} tg @ d{depth}", f"{n / seconds(run.device, decode):.1f} t/s")


def batches(run: Run, name: str, shape: str, model: Model) -> None:
    """Several sequences that decode a token at a time."""
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
    while done < run.args.runs and not run.late:
        one()
        done += 1
    lost = 0 if simulated() else before - run.device.free
    run.results.add("leak", f"{done} contexts", f"{lost / 2**20:.1f} MiB gone, {run.device.allocated - counted} bytes held", "0",
                    lost < 16 << 20 and run.device.allocated == counted and done == run.args.runs)


def sanitizer(run: Run) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise PyggmlError("compute-sanitizer is not installed here")
    if run.args.oracle is None:
        raise PyggmlError("name the folder with --oracle")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, __file__, "--sections", "goldens",
               "--oracle", str(run.args.oracle), "--only", run.args.only or "llama_quant.q4_k", "--limit", str(max(30, run.end - time.monotonic()))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYGGML_CUDA_GRAPHS": "0"}, check=False)
    summary = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR SUMMARY" in line]
    run.results.add("sanitizer", "memcheck", summary[-1].strip("= ") if summary else f"exit status {done.returncode}", "0 errors",
                    done.returncode == 0 and bool(summary))


def rival(run: Run) -> None:
    if run.args.llama_bench is None:
        raise PyggmlError("name a llama-bench with --llama-bench")
    for shape, kind, path in run.models():
        name = f"{shape} {kind}".strip()
        command = [str(run.args.llama_bench), "-m", str(path), "-ngl", "99", "-p", ",".join(map(str, run.args.n_prompt)), "-n", str(run.args.n_gen),
                   "-fa", "1", "-o", "json", "-mg", str(run.args.main_gpu)]
        with reported(run, f"{name} llama-bench"):
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(60, run.end - time.monotonic()), check=True)
            for row in json.loads(done.stdout[done.stdout.index("["):]):
                test = f"pp{row['n_prompt']}" if row["n_prompt"] else "tg one by one"
                mine = run.results.rows.get(f"speed|{name} {test}")
                ours = float(mine["figure"].split()[0]) if mine else 0.0
                run.results.add("rival", f"{name} {test}", f"{row['avg_ts']:.1f} t/s" + (f", ours {ours / row['avg_ts']:.2f} of it" if ours else ""),
                                "at or ahead" if "tg" in test else "", ours >= row["avg_ts"] if "tg" in test and ours else None)


# ---- the whole --------------------------------------------------------------------------------------------------------------

@contextmanager
def reported(run: Run, what: str) -> Iterator[None]:
    """What fails is told and counted, and the next thing runs."""
    try:
        yield
        run.results.rows.pop(f"failed|{what}", None)        # of an earlier call
    except PyggmlError as error:
        run.results.add("failed", what, str(error).replace("|", "/")[:200], "", False)
    except Exception as error:      # noqa: BLE001  a kernel that does not compile must not hide what the others do
        traceback.print_exc()
        run.results.add("failed", what, f"{type(error).__name__}: {error}".replace("|", "/").replace("\n", " ")[:200], "", False)


SECTIONS = {f.__name__: f for f in (machine, goldens, greedy, speed, leak, sanitizer, rival)}


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--oracle", type=Path, metavar="FOLDER")
    parser.add_argument("--only", help="golden files whose name contains this")
    parser.add_argument("--shapes", default="", help=f"of random models: {', '.join(SHAPES)}")
    parser.add_argument("--types", default="Q4_0,Q4_K_M,Q8_0,F16", help=f"of them: {', '.join(MIXES)} (default: %(default)s)")
    parser.add_argument("--models", type=Path, nargs="*", default=[], metavar="FILE", help="models of your own")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where random models are made (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave them there")
    parser.add_argument("--n-gen", type=int, default=128)
    parser.add_argument("--n-prompt", type=numbers, default=[512, 2048])
    parser.add_argument("--depths", type=numbers, default=[0, 4096, 32768])
    parser.add_argument("--batches", type=numbers, default=[1, 4, 16, 64])
    parser.add_argument("--greedy", type=int, default=512, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=1000, help="contexts of the leak section (default: %(default)s)")
    parser.add_argument("--llama-bench", type=Path, metavar="PATH")
    parser.add_argument("--main-gpu", type=int, default=0, metavar="N")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="start nothing new after so long")
    parser.add_argument("--results", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if unknown := set(args.sections.split(",")) - set(SECTIONS):
        parser.error(f"no section {sorted(unknown)[0]!r}; there are {', '.join(SECTIONS)}")
    if reason := why_not(args.main_gpu):
        print(f"gpu.py: nothing can be measured: {reason}", file=sys.stderr)
        return 1
    run = Run(args)
    for name in args.sections.split(","):
        print(f"---- {name}", flush=True)
        with reported(run, name):
            SECTIONS[name](run)
    print("\n" + run.results.table())
    return int(any(row["met"] == "NO" for row in run.results.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
