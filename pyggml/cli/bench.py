"""pyggml bench: tokens per second, with llama-bench's flags, tests and table, so that tables can be laid side by side.

What is timed is evaluation alone: random tokens, one warm-up run of each test, the logits of the last token. Opening the file,
packing weights, tokenization and sampling stay outside.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from pyggml.cli import INTERRUPTED, _options
from pyggml.cli._bench_rows import Result, Test
from pyggml.cli._bench_table import FORMATS
from pyggml.errors import ParameterError

HELP = "measure tokens per second"

# flags whose comma lists are multiplied: (flags, name, default, help)
LISTS = [
    (("-b", "--batch-size"), "n_batch", "2048", "tokens of prompt taken at once"),
    (("-ub", "--ubatch-size"), "n_ubatch", "512", "tokens computed in one go"),
    (("-t", "--threads"), "n_threads", None, "threads (default: physical cores)"),
    (("-d", "--n-depth"), "n_depth", "0", "tokens that lie in the cache before"),
    (("-npl", "--n-parallel"), "n_parallel", "1", "sequences that are generated at once; prompts are measured for one"),
    (("-p", "--n-prompt"), "n_prompt", "512", "length of the prompt tests, pp"),
    (("-n", "--n-gen"), "n_gen", "128", "length of the generation tests, tg"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="*", metavar="MODEL", help="GGUF files")
    parser.add_argument("-m", "--model", dest="model_flag", action="append", metavar="MODEL[,MODEL]", help="the same as a flag")
    for flags, name, default, help in LISTS:
        parser.add_argument(*flags, dest=name, action="append", metavar="N[,N]", help=help + (f" (default: {default})" if default else ""))
    parser.add_argument("-pg", dest="n_pg", action="append", metavar="PP,TG", help="a test of a prompt followed by a generation")
    for letter, what in (("k", "keys"), ("v", "values")):
        parser.add_argument(f"-ct{letter}", f"--cache-type-{letter}", dest=f"type_{letter}", action="append", metavar="TYPE[,TYPE]",
                            help=f"type of cached {what} (default: f16)")
    parser.add_argument("-ngl", "--n-gpu-layers", dest="ngl", action="append", metavar="N[,N]",
                        help="layers on a GPU, all, or auto: as many as fit (default: auto)")
    parser.add_argument("-dev", "--device", metavar="NAME", help="cuda0, cuda1, ...; none or cpu for no GPU (default: the main GPU)")
    parser.add_argument("-mg", "--main-gpu", type=int, default=0, metavar="N", help="number of the main GPU (default: %(default)s)")
    parser.add_argument("--repack", action="append", metavar="0|1[,0|1]", help="compute on packed weights (default: 1)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="runs of each test (default: %(default)s)")
    parser.add_argument("--delay", type=float, default=0, metavar="SECONDS", help="pause before each test")
    parser.add_argument("--no-warmup", action="store_true", help="skip the untimed first run")
    parser.add_argument("-o", "--output", choices=FORMATS, default="md", help="format of the results (default: %(default)s)")
    parser.add_argument("--progress", action="store_true", help="tell on standard error what runs")
    parser.add_argument("--ops", action="store_true", help="tell how long each operation takes, what it reads and multiplies, and how near that "
                        "comes to what this machine can do, which is measured first (every test runs once more)")
    parser.add_argument("--deterministic", action="store_true", help="measure what the same bits for any batch and threads cost")
    _options.add_placement(parser)
    parser.set_defaults(usage_error=parser.error)


def int_list(texts: list[str]) -> list[int]:
    """Numbers of comma lists in which FIRST-LAST, FIRST-LAST+STEP and FIRST-LAST*FACTOR stand for ranges."""
    numbers = []
    for text in ",".join(texts).split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?", text.strip())
        if not found:
            raise ParameterError(f"{text!r} is not a number or a range; use 512, 128,512, 0-512+128 or 1-8*2")
        first, last, sign, step = int(found[1]), int(found[2] or found[1]), found[3] or "+", int(found[4] or 1)
        if sign == "*" and first == 0 or step < (2 if sign == "*" else 1):
            raise ParameterError(f"the range {text!r} never ends; give it a larger step")
        while first <= last:
            numbers.append(first)
            first = first * step if sign == "*" else first + step
    return numbers


def tests(args: argparse.Namespace) -> list[Test]:
    """Every combination of what the flags list, in llama-bench's order."""
    if not (models := args.model + [m for given in args.model_flag or [] for m in given.split(",")]):
        args.usage_error("name a model file, as MODEL or with -m MODEL")
    numbers: dict[str, list[Any]] = {}
    for _, name, default, _ in LISTS:
        given = getattr(args, name) or ([default] if default else None)
        numbers[name] = int_list(given) if given else [None]
    types = {name: ",".join(getattr(args, name) or ["f16"]).lower().split(",") for name in ("type_k", "type_v")}
    for kind in (*types["type_k"], *types["type_v"]):
        if kind not in _options.CACHE_TYPES:
            raise ParameterError(f"cache type {kind!r} is unknown; use one of {', '.join(_options.CACHE_TYPES)}")
    if 0 in numbers["n_parallel"]:
        args.usage_error("-npl 0: at least one sequence is needed")
    repack = int_list(args.repack or ["1"])
    if not {0, 1}.issuperset(repack):
        args.usage_error(f"--repack {max(repack)}: use 0 or 1")
    pairs = [tuple(int_list([text])) for text in args.n_pg or []]
    if any(len(pair) != 2 for pair in pairs):
        args.usage_error("-pg takes two numbers, PP,TG")
    work = [(n, 0) for n in numbers["n_prompt"] if n] + [(0, n) for n in numbers["n_gen"] if n] + pairs
    setups = itertools.product(models, numbers["n_batch"], numbers["n_ubatch"], types["type_k"], types["type_v"], numbers["n_threads"],
                               ",".join(args.ngl or ["auto"]).lower().split(","), repack, numbers["n_depth"],
                               numbers["n_parallel"])
    return [Test(*setup, *lengths) for setup in setups for lengths in work if setup[-1] == 1 or not lengths[0]]


def run(args: argparse.Namespace) -> int:
    from pyggml.cli._interrupt import on_interrupt

    if args.repetitions < 1:
        args.usage_error(f"-r {args.repetitions}: at least one repetition is needed")
    if not 0 <= args.delay <= threading.TIMEOUT_MAX:
        args.usage_error(f"--delay {args.delay:g} is no time to wait; give seconds from 0 up")
    todo = tests(args)
    args.place = _options.place(args)
    running: list[Any] = []             # the context at work

    def cancel() -> None:
        for context in running:
            context.cancel()

    with on_interrupt(cancel) as interrupted:
        FORMATS[args.output](results(todo, args, running, interrupted), todo)
    return INTERRUPTED if interrupted.is_set() else 0


def results(todo: list[Test], args: argparse.Namespace, running: list[Any], interrupted: threading.Event) -> Iterator[Result]:
    """Run the tests one after the other; an interruption ends them early."""
    from pyggml.errors import Cancelled

    path, model = None, None
    for i, test in enumerate(todo):
        if test.model != path:
            path, model = test.model, _options.load_model(args, test.model)
        if args.progress:
            print(f"pyggml bench: {i + 1}/{len(todo)} {test.model} {test.name}", file=sys.stderr)
        time.sleep(args.delay)
        try:
            result = measure(test, model, args, running)
            if args.ops:
                result.ops.extend(operations(test, model, args, running))
            yield result
            if args.ops and args.output in ("md", "csv"):
                print_ops(test, result.ops, sys.stdout if args.output == "md" else sys.stderr)
        except Cancelled:
            return
        if interrupted.is_set():
            return


def measure(test: Test, model: Any, args: argparse.Namespace, running: list[Any]) -> Result:
    """Run one test."""
    context = open_context(test, model, args, running)
    n_threads = context.pool.n_threads if context.pool is not None else 1
    result = Result(test, model, n_threads, context.gpu_layers, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), [], [])
    if not args.no_warmup:
        evaluate(context, test._replace(n_gen=min(test.n_gen, 1), n_depth=0), model)
        context.reset()
    fill(context, test, model)
    for _ in range(args.repetitions):
        context.truncate(test.n_depth if test.n_parallel == 1 else 0)
        start = time.perf_counter_ns()
        evaluate(context, test, model)
        result.samples_ns.append(time.perf_counter_ns() - start)
    return result


def operations(test: Test, model: Any, args: argparse.Namespace, running: list[Any]) -> list[dict[str, Any]]:
    """Time and work of each operation in one more run of a test, warmed up, beside what the machine can do."""
    from pyggml.roofline import measure_peaks

    context = open_context(test, model, args, running, timing=True)
    if context.pool is None:
        raise ParameterError("--ops needs the native kernels, which are missing; `pyggml doctor` tells why")
    fill(context, test, model)
    before: list[Any] = []
    for _ in range(2):
        before = context.op_times()
        context.truncate(test.n_depth if test.n_parallel == 1 else 0)
        evaluate(context, test, model)
    spent = since(before, context.op_times())
    peaks = measure_peaks(context.pool.n_threads)
    copied = context.copy_bandwidth()
    if copied:                                          # layers on a GPU: what limits those is its memory
        peaks = peaks._replace(read=copied, int8=math.inf, floats=math.inf, bf16=math.inf)
    rows = []
    for op in spent:
        least, limit = peaks.least(op.work)
        rows.append({"op": op.op, "what": op.what, "ns": op.ns, "bytes": op.work.bytes, "macs": op.work.macs,
                     "macs_int8": op.work.int8, "macs_float": op.work.floats, "macs_bf16": op.work.bf16,
                     "share_of_peak": 1e9 * least / op.ns, "limit": limit,
                     "peak_read": peaks.read, "peak_int8": None if copied else peaks.int8, "peak_float": None if copied else peaks.floats,
                     "peak_bf16": None if copied else peaks.bf16})
    return rows


def open_context(test: Test, model: Any, args: argparse.Namespace, running: list[Any], timing: bool = False) -> Any:
    from pyggml.context import Context

    n_ctx = (test.n_prompt + test.n_gen + test.n_depth) * test.n_parallel
    context = Context(model, n_ctx=n_ctx, n_batch=test.n_batch, n_ubatch=test.n_ubatch, n_threads=test.n_threads, place=args.place,
                      type_k=test.type_k.upper(), type_v=test.type_v.upper(), repack=bool(test.repack), deterministic=args.deterministic,
                      timing=timing, n_gpu_layers=test.ngl, device=args.device, main_gpu=args.main_gpu)
    running[:] = [context]
    return context


def random_tokens(model: Any, n: int) -> Any:
    """`n` tokens, int64; the first one begins a text where the vocabulary has a token for that."""
    import numpy as np

    tokens = np.random.default_rng(1).integers(0, model.n_vocab, n)
    bos = model.file.kv.get("tokenizer.ggml.bos_token_id")
    tokens[:1] = bos if isinstance(bos, int) and 0 <= bos < model.n_vocab else 0
    return tokens


def fill(context: Any, test: Test, model: Any) -> None:
    """Put the depth of a test into the cache."""
    tokens = random_tokens(model, test.n_depth)
    if test.n_parallel == 1:
        context.eval(tokens, logits="none")
        return
    step = max(1, context.n_ubatch // test.n_parallel)
    for at in range(0, test.n_depth, step):
        piece = tokens[at:at + step]
        context.sequences(piece[None].repeat(test.n_parallel, 0), at, [])


def evaluate(context: Any, test: Test, model: Any) -> None:
    """The work that is timed: the prompt as one piece, then one token after the other (of each sequence)."""
    tokens = random_tokens(model, test.n_prompt + test.n_gen)
    prompt, generation = tokens[:test.n_prompt], tokens[test.n_prompt:]
    if len(prompt):
        context.eval(prompt)
    if test.n_parallel == 1:
        for i in range(len(generation)):
            context.eval(generation[i:i + 1])
    else:
        each = generation[None].repeat(test.n_parallel, 0)
        for i in range(len(generation)):
            context.sequences(each[:, i:i + 1], test.n_depth + i, [0])


def since(before: list[Any], after: list[Any]) -> list[Any]:
    """What each step took between two readings (OpTime), summed over steps of one name that write the same kind of thing; the longest first."""
    from pyggml.roofline import Work

    spent: dict[tuple[str, str], Any] = {}
    for sign, readings in ((-1, before), (1, after)):
        for step in readings:
            what = re.sub(r"\.\d+(?=\.|$)", ".*", step.what)      # blk.7.ffn_up -> blk.*.ffn_up
            so_far = spent.get((step.op, what), step._replace(what=what, ns=0, work=Work(0)))
            work = Work(*(done + sign * more for done, more in zip(so_far.work, step.work, strict=True)))
            spent[step.op, what] = so_far._replace(ns=so_far.ns + sign * step.ns, work=work)
    return sorted((step for step in spent.values() if step.ns), key=lambda step: -step.ns)


def print_ops(test: Test, ops: list[dict[str, Any]], file: Any) -> None:
    """The roofline: GB/s and GMAC/s of each operation, and its share of the nearer limit."""
    total = sum(op["ns"] for op in ops) or 1
    print(f"\n{test.name}: {total / 1e6:.2f} ms in operations", file=file)
    if ops:
        peak = ops[0]
        best = f"the GPU copies {peak['peak_read'] / 1e9:.0f} GB/s" if peak["peak_int8"] is None else (
            f"this machine: reads {peak['peak_read'] / 1e9:.1f} GB/s, multiplies {peak['peak_int8'] / 1e9:.0f} G int8, "
            f"{peak['peak_float'] / 1e9:.0f} G float and {peak['peak_bf16'] / 1e9:.0f} G bf16 a second")
        print(f"{best}\n"
              f"{'time':>13} {'share':>7} {'GB/s':>7} {'GMAC/s':>7}  of the limit   operation", file=file)
    for op in ops:
        ns = max(op["ns"], 1)
        macs = f"{op['macs'] / ns:7.1f}" if op["macs"] else f"{'':7}"
        near = f"{100 * op['share_of_peak']:3.0f} % {op['limit']:<7}" if op["macs"] else f"{'':13}"
        print(f"{ns / 1e6:10.3f} ms {100 * ns / total:5.1f} % {op['bytes'] / ns:7.2f} {macs}  {near}  {op['op']:<16} {op['what']}", file=file)
    print(file=file)
