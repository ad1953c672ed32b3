"""pyggml quantize: a model file in smaller types, with llama-quantize's arguments."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from pyggml.errors import PyggmlError

# options that say what --target-size and --target-bpw find out
DECIDED_BY_MIX = ("tensor_types", "output_tensor_type", "token_embedding_type", "leave_output_tensor", "pure", "prune_layers",
                  "include_weights", "exclude_weights")

HELP = "make a model smaller: quantize its tensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from pyggml.quantize.options import CHUNK
    from pyggml.quantize.recipes import ALIASES, RECIPES

    rows = "".join(f"  {r.id if r.base else '':>2} {'or' if r.base else '  '} {r.name:<10} {r.about}\n" for r in RECIPES)
    parser.usage = f"{parser.prog} [options] IN.gguf [OUT.gguf] RECIPE [THREADS]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"recipes:\n{rows}  {', '.join(f'{a} means {b}' for a, b in ALIASES.items())}"
    parser.add_argument("files", nargs="+", metavar="IN [OUT] RECIPE [THREADS]", help="OUT defaults to ggml-model-RECIPE.gguf beside IN; "
                        "RECIPE is a name, a number of the list below, or a saved recipe (.json)")
    parser.add_argument("--imatrix", metavar="FILE", help="importance matrix (from `pyggml imatrix`)")
    parser.add_argument("--include-weights", action="append", default=[], metavar="NAME", help="use it only for tensors with NAME in their name")
    parser.add_argument("--exclude-weights", action="append", default=[], metavar="NAME", help="... for all but these")
    parser.add_argument("--tensor-type", action="append", default=[], metavar="PATTERN=TYPE", help="type of tensors whose name matches; repeatable")
    parser.add_argument("--tensor-type-file", metavar="FILE", help="a file of PATTERN=TYPE, separated by spaces or newlines")
    parser.add_argument("--output-tensor-type", default="", metavar="TYPE", help="type of output.weight")
    parser.add_argument("--token-embedding-type", default="", metavar="TYPE", help="type of the token table")
    parser.add_argument("--leave-output-tensor", action="store_true", help="keep output.weight as it is")
    parser.add_argument("--pure", action="store_true", help="the same type for every tensor, no mixture")
    parser.add_argument("--allow-requantize", action="store_true", help="allow a source that is quantized already, at a loss")
    parser.add_argument("--prune-layers", type=_layers, default=(), metavar="L,L...", help="leave out these layers")
    parser.add_argument("--keep-split", action="store_true", help="write as many parts as the source has")
    parser.add_argument("--override-kv", action="append", default=[], metavar="KEY=TYPE:VALUE", help="change metadata; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="show types and sizes, write nothing")
    parser.add_argument("--compat", action="store_true", help="ggml's own rounding and no provenance: the bytes that llama-quantize writes")
    target = parser.add_argument_group("a mix made for this model (RECIPE is then left out)")
    target.add_argument("--target-size", type=_size, metavar="SIZE", help="largest file, such as 4.2G")
    target.add_argument("--target-bpw", type=float, metavar="N", help="bits per weight")
    target.add_argument("-f", "--file", metavar="TEXT", help="text that the loss of each tensor is measured on; "
                        "best one that the model was not trained on")
    target.add_argument("-c", "--ctx-size", type=int, default=CHUNK, metavar="N", help="tokens in a chunk of it (default: %(default)s)")
    target.add_argument("--chunks", type=int, default=0, metavar="N", help="chunks of it (default: a number that takes minutes)")
    target.add_argument("--target-types", metavar="T,T...", help="types to choose from (default: the K types, IQ4_XS and Q8_0; with an imatrix "
                        "also those below 3.5 bits)")
    target.add_argument("--save-recipe", metavar="FILE", help="where the mix is saved (default: OUT with .json)")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    from pyggml.cli._progress import bar, cancellable
    from pyggml.quantize import quantize_file

    wants_mix = args.target_size is not None or args.target_bpw is not None
    source, target, recipe, n_threads = positional(args, wants_mix)
    options = {
        "imatrix": args.imatrix, "include_weights": tuple(args.include_weights), "exclude_weights": tuple(args.exclude_weights),
        "output_tensor_type": args.output_tensor_type, "token_embedding_type": args.token_embedding_type, "tensor_types": tensor_types(args),
        "leave_output_tensor": args.leave_output_tensor, "pure": args.pure, "allow_requantize": args.allow_requantize,
        "keep_split": args.keep_split, "prune_layers": args.prune_layers, "override_kv": tuple(override(text) for text in args.override_kv),
        "compat": args.compat, "n_threads": n_threads,
    }
    with cancellable() as stop:
        if wants_mix:
            found, text = mix(args, source, target, options, stop)
            recipe = found.recipe
        if args.dry_run:
            return show(source, recipe, options)
        with bar(f"quantizing to {recipe if isinstance(recipe, str) else recipe.name}", "B", stop) as progress:
            result = quantize_file(source, target, recipe, progress=progress, **options)
    for note in result.notes:
        print(f"pyggml quantize: {note}", file=sys.stderr)
    before, after = result.size_before, result.size_after
    print(f"model size  = {before / 2**20:10.2f} MiB ({8 * before / result.n_weights:.2f} BPW)")
    print(f"quant size  = {after / 2**20:10.2f} MiB ({result.bits_per_weight:.2f} BPW)")
    print(*result.paths, sep="\n")
    if wants_mix:
        tell_loss(found, result.paths[0], text, n_threads)
    return 0


def positional(args: argparse.Namespace, wants_mix: bool) -> tuple[str, str, Any, int]:
    """(source, target, recipe, threads) from IN [OUT] RECIPE [THREADS]; the recipe is what stands where a recipe's name can be read."""
    from pyggml.quantize import allocate, recipes

    source, *rest = args.files
    if wants_mix:
        if not rest or len(rest) > 2 or rest[1:] and not rest[1].isdigit():
            args.usage_error("with --target-size or --target-bpw name IN.gguf OUT.gguf [THREADS] and no recipe")
        return source, rest[0], None, threads(rest[1:], args)
    if not rest:
        args.usage_error("name a recipe, such as Q4_K_M")
    recipe: Any = None
    for where in (0, 1):
        if where < len(rest) and (where == 1 or rest[0].upper() in {*recipes.BY_NAME, *recipes.ALIASES} or rest[0].isdigit()):
            recipe, after = rest[where], rest[where + 1:]
            break
    if recipe is None:
        args.usage_error(f"{rest[0]!r} is not a recipe, and none follows it")
    target = rest[0] if where else ""
    recipe = allocate.load(recipe) if recipe.endswith(".json") else recipes.find(recipe)
    return source, target or os.path.join(os.path.dirname(source), f"ggml-model-{recipe.name}.gguf"), recipe, threads(after, args)


def threads(rest: list[str], args: argparse.Namespace) -> int:
    if len(rest) > 1 or rest and not rest[0].isdigit():
        args.usage_error(f"{' '.join(rest)!r} is not a number of threads")
    return int(rest[0]) if rest else 0


def tensor_types(args: argparse.Namespace) -> tuple[tuple[str, str], ...]:
    """(pattern, type) of every --tensor-type, and of the file, in that order."""
    given = list(args.tensor_type)
    if args.tensor_type_file:
        given += Path(args.tensor_type_file).read_text().split()
    pairs = []
    for text in given:
        pattern, _, kind = text.partition("=")
        if not pattern or not kind:
            raise PyggmlError(f"--tensor-type {text!r}: write it as PATTERN=TYPE, such as attn_v=q6_K")
        pairs.append((pattern.lower(), kind))
    return tuple(pairs)


def override(text: str) -> tuple[str, str, Any]:
    """KEY=TYPE:VALUE as (key, GGUF type, value); llama.cpp writes whole numbers as u32."""
    key, _, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    try:
        if key and colon:
            if kind == "int":
                return key, "u32", abs(int(value))
            if kind == "float":
                return key, "f32", float(value)
            if kind == "bool" and value in ("true", "false"):
                return key, "bool", value == "true"
            if kind == "str":
                return key, "str", value
    except ValueError:
        pass
    raise PyggmlError(f"--override-kv {text!r}: write it as KEY=TYPE:VALUE with int, float, bool (true, false) or str")


def show(source: str, recipe: Any, options: dict[str, Any]) -> int:
    """What would be written, tensor by tensor."""
    from pyggml import formats
    from pyggml.formats.values import printable
    from pyggml.quantize import Options, plan

    job = plan(formats.open(source), Options(recipe=recipe, **options), dry_run=True)
    for i, c in enumerate(job.choices, 1):
        shape = ", ".join(f"{d:5d}" for d in reversed(c.shape))
        change = "" if c.copied else f" -> {job.nbytes(c) / 2**20:10.3f} MiB ({c.after.name})"
        size = job.sources[c.name].nbytes / 2**20
        print(f"[{i:4d}/{len(job.choices):4d}] {printable(c.name):<36} [{shape}] {c.before.name:>7} {size:10.3f} MiB{change}")
    for note in job.notes:
        print(f"note: {note}")
    print(f"model size  = {job.size_before / 2**20:10.2f} MiB ({8 * job.size_before / job.n_weights:.2f} BPW)")
    print(f"quant size  = {job.size_after / 2**20:10.2f} MiB ({8 * job.size_after / job.n_weights:.2f} BPW)")
    if job.missing_imatrix:
        c = job.missing_imatrix[0]
        print(f'note: this needs an importance matrix (--imatrix): without one {c.after.name} is no good for "{c.name}"')
    return 0


def mix(args: argparse.Namespace, source: str, target: str, options: dict[str, Any], stop: Any) -> tuple[Any, str]:
    """(mix, text it was chosen by) for --target-size or --target-bpw: measured, printed and saved."""
    from pyggml import formats
    from pyggml.cli import _text
    from pyggml.cli._progress import bar
    from pyggml.formats.atomic import check_room, refuse_input
    from pyggml.quantize import allocate

    if args.file is None:
        args.usage_error("--target-size and --target-bpw measure the loss of each tensor on a text: give one with -f")
    decided = [name for name in DECIDED_BY_MIX if options[name]]
    if decided:
        args.usage_error(f"--target-size and --target-bpw choose the type of every tensor: leave out --{decided[0].replace('_', '-')}")
    file, text = formats.open(source), _text.read(args.file)
    if not args.dry_run:
        refuse_input([target, *([args.save_recipe] if args.save_recipe else [])], file.paths)
        check_room(target, args.target_size or int(args.target_bpw * sum(t.size for t in file.tensors.values()) / 8))
    with bar("measuring", "tensors", stop) as progress:
        found = allocate.allocate(source, text, size=args.target_size, bits_per_weight=args.target_bpw, imatrix=options["imatrix"],
                                  types=args.target_types.upper().split(",") if args.target_types else None,
                                  allow_requantize=args.allow_requantize, n_ctx=args.ctx_size, n_chunks=args.chunks,
                                  n_threads=options["n_threads"], progress=progress)
    print(found.table())
    path = args.save_recipe or f"{target.removesuffix('.gguf')}.json"
    found.save(path)
    print(f"recipe: {path}")
    return found, text


def tell_loss(found: Any, path: str, text: str, n_threads: int) -> None:
    """What the mix really costs, where the text has a part that it was not chosen by."""
    from pyggml.quantize import allocate

    loss = allocate.verify(found, path, text, n_threads=n_threads)
    if loss is not None:
        print(f"mean KLD    = {loss.value:10.6f} ± {loss.error:.6f} over the next {found.n_chunks} chunks of the text")


def _layers(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(n) for n in text.split(",")}))


def _size(text: str) -> int:
    """Bytes: 4.2G and the like are powers of 1024."""
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(text.upper().rstrip("IB")[-1:], 1)
    return int(float(text.upper().rstrip("KMGTIB")) * scale)
