"""Everything that pyggml claims about a GPU, measured on one: a short table comes last.

    python tools/bench/gpu.py --shapes tinyllama-1.1b,llama3-8b --types Q4_0,Q4_K_M,Q8_0,F16 --results gpu.json

    machine     the GPU, the bytes it copies a second, the FP16 products it makes a second (cuBLAS, where there is one)
    goldens     logits of llama.cpp (--oracle): every model within the bounds of tools/golden.py
    greedy      512 tokens of each model, equal to the CPU backend's up to the first near-tie
    speed       per shape and type: upload, memory against the forecast, decode, prefill, depths, batches
    rival       llama-bench (--llama-bench PATH) on the same models
    leak        1,000 contexts, and the memory that is free before and after them
    sanitizer   compute-sanitizer over a golden model, where it is installed

A section is steps, each with a budget in seconds, and each in a process of its own: a step that fails, is not done in time or ends its process
is reported and the next one runs; goldens, most of whose time is compiling, run --jobs at a time. With --results every figure is kept in a file,
and a later call does what is not done; --limit ends a call in time. --dry-run lists the steps, their budgets and what is done.
Models are random (random_model.py), made in --folder when a step needs them and deleted after the last that does.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from functools import partial
from itertools import product
from pathlib import Path

if missing := [name for name in ("numpy", "cffi", "jinja2", "regex", "tqdm", "numba_cuda") if importlib.util.find_spec(name) is None]:
    sys.exit(f"gpu.py: there is no {', '.join(missing)} here; pip install -e '.[cuda]' brings what is needed")
sys.path.insert(0, str(Path(__file__).parent))

import gpu_measures as measures  # noqa: E402
from gpu_run import Run, Source, Step  # noqa: E402
from random_model import MIXES, SHAPES  # noqa: E402

from pyggml import native  # noqa: E402
from pyggml.backends.cuda.device import why_not  # noqa: E402

# seconds that a step of a section, or of a part of one, may take
BUDGETS = {"machine": 120, "goldens": 180, "greedy": 300, "loading": 180, "decoding": 180, "prefilling": 240, "depths": 240, "batches": 240,
           "rival": 300, "leak": 600, "sanitizer": 900}
SPEED = ("loading", "decoding", "prefilling", "depths", "batches")
SECTIONS = ("machine", "goldens", "greedy", "speed", "rival", "leak", "sanitizer")
OF_MODELS = ("greedy", "speed", "rival")


# ---- the steps ----------------------------------------------------------------------------------------------------------------

def sources(args: argparse.Namespace) -> list[Source]:
    """The models asked for; the bundled one where there are none."""
    pairs = product(filter(None, args.shapes.split(",")), args.types.split(","))
    made = [Source(args.folder / f"{shape}-{kind}.gguf", shape, kind) for shape, kind in pairs]
    return [*(Source(path) for path in args.models), *made] or [Source(measures.BUNDLED)]


def steps(args: argparse.Namespace) -> list[Step]:
    """Everything asked for, in order; what concerns one model stands together."""
    out: list[Step] = []
    wanted = args.sections.split(",")
    if "machine" in wanted:
        out.append(Step("machine", "", BUDGETS["machine"], measures.machine))
    if "goldens" in wanted:
        out += goldens(args)
    for source in sources(args):
        for section in (s for s in OF_MODELS if s in wanted):
            for name in SPEED if section == "speed" else (section,):
                work = getattr(measures, name)
                out.append(Step(section, f"{source.name} {name}" if section == "speed" else source.name, BUDGETS[name], partial(work, source=source),
                                source))
    out += [Step(name, "", BUDGETS[name], getattr(measures, name)) for name in ("leak", "sanitizer") if name in wanted]
    return out


def goldens(args: argparse.Namespace) -> list[Step]:
    """A step for each golden file, or one that fails for want of any."""
    paths = measures.golden_files(args.oracle, args.only) or [None]
    return [Step("goldens", path.stem if path else "", BUDGETS["goldens"], partial(measures.golden, path=path), beside=True) for path in paths]


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--oracle", type=Path, default=measures.GOLDENS, metavar="FOLDER",
                        help="golden models with their logits, beside each other or in models and golden (default: %(default)s)")
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
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="end after so long: no step has more than is left")
    parser.add_argument("--patience", type=float, default=1, metavar="FACTOR", help="of every step's budget (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="goldens at a time (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="FILE")
    parser.add_argument("--again", action="store_true", help="measure anew what the results file has")
    parser.add_argument("--in-process", action="store_true", help="all steps in this process, one after the other")
    parser.add_argument("--step", metavar="NAME", help="this one alone")
    parser.add_argument("--dry-run", action="store_true", help="list the steps; measure nothing")
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    if unknown := set(args.sections.split(",")) - set(SECTIONS):
        parser.error(f"no section {sorted(unknown)[0]!r}; there are {', '.join(SECTIONS)}")
    run, todo = Run(args, given), steps(args)
    if args.dry_run:
        for step in todo:
            print(f"{step.key:<60} {step.seconds * args.patience:>6.0f} s  {run.results.state(step)}")
        print(f"{len(todo)} steps, {sum(s.seconds for s in todo) * args.patience:.0f} s at the most")
    if reason := why_not(args.main_gpu) or native.why_missing and f"the native kernels are missing ({native.why_missing}); tools/build.sh makes them":
        print(f"gpu.py: nothing can be measured: {reason}", file=sys.stderr)
        return int(not args.dry_run)
    if args.dry_run:
        return 0
    if args.step is not None:
        run.here(next(step for step in todo if step.key == args.step))
        return 0
    run.go(todo)
    print("\n" + run.results.table())
    return int(any(row["met"] == "NO" for row in run.results.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
