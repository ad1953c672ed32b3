"""Reads PTX: the part of the language that the compiler and our inline assembly write. What it does not know is an error with its text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

DTYPES = {"b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
          "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
          "f64": np.float64, "pred": np.bool_}
ENDS = ("bra", "ret", "exit", "trap")                                          # what ends a basic block
MEETINGS = ("bar", "barrier", "shfl", "vote", "match", "mma", "ldmatrix")      # what begins one: threads may have to wait for others here
_STATEMENT = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[\w$]+)\s*:(?!:)|(?P<text>[^;]+);)")
_DECLARED = re.compile(r"\.(\w+)\s+([%$\w]+)(?:<(\d+)>)?")


class PtxError(Exception):
    """PTX that this machine cannot read, or that a GPU would not run."""


class Instruction(NamedTuple):
    opcode: str
    operands: tuple[str, ...]
    guard: str                      # "", "%p1" or "!%p1"
    text: str


@dataclass
class Variable:
    """A shared or local array, or a constant table in global memory."""

    nbytes: int
    align: int
    data: bytes = b""
    offset: int = 0


@dataclass
class Function:
    name: str
    params: list[tuple[str, int, int]]                                          # (name, bytes, alignment)
    returned: str = ""                                                          # the name of the value that it gives back
    registers: dict[str, type] = field(default_factory=dict)
    local: dict[str, Variable] = field(default_factory=dict)
    code: list[Instruction | str] = field(default_factory=list)                 # instructions and labels
    limits: dict[str, tuple[int, ...]] = field(default_factory=dict)            # maxntid and the like


class Module:
    """The entries of a PTX text, with functions that they call written out in them."""

    def __init__(self, ptx: str) -> None:
        ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
        self.target = re.search(r"\.target\s+(\w+)", ptx)[1]                    # type: ignore[index]
        self.shared, self.globals = _variables(ptx, "shared"), _variables(ptx, "global")
        functions = list(_functions(ptx))
        callable_ = {f.name: f for f, entry in functions if not entry}
        self.entries = {f.name: _inlined(f, callable_) for f, entry in functions if entry}
        at = 0
        for variable in self.shared.values():
            variable.offset = -(-at // variable.align) * variable.align
            at = variable.offset + variable.nbytes
        self.shared_bytes = at


def _variables(ptx: str, space: str) -> dict[str, Variable]:
    found = {}
    pattern = rf"\.{space}\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?(?:\s*=\s*\{{([^}}]*)\}})?\s*;"
    for align, type_, name, count, values in re.findall(pattern, ptx):
        data = bytes(int(v) for v in values.split(",")) if values else b""
        size = np.dtype(DTYPES[type_]).itemsize
        found[name] = Variable(size * int(count or (1 if not data else len(data))), int(align or size), data)
    return found


def _functions(ptx: str):
    """(function, whether it is an entry), for those that have a body."""
    head = re.compile(r"\.(entry|func)\s*(?:\(\s*\.param\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$]+)(?:\[\d+\])?\s*\))?\s*([\w$]+)\s*\(([^)]*)\)")
    param = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
    for found in head.finditer(ptx):
        rest = ptx[found.end():]
        opening = re.match(r"((?:\s*\.\w+(?:\s+[\d,\s]+)?)*)\s*\{", rest)
        if opening is None:                                                     # declared only
            continue
        params = []
        for align, type_, name, count in param.findall(found[4]):
            size = np.dtype(DTYPES[type_]).itemsize
            params.append((name, size * int(count or 1), int(align or size)))
        made = Function(found[3], params, found[2] or "")
        for name, values in re.findall(r"\.(\w+)\s+([\d,\s]+)", opening[1]):
            made.limits[name] = tuple(int(v) for v in values.split(","))
        _body(made, rest[opening.end():])
        yield made, found[1] == "entry"


def _body(f: Function, text: str) -> None:
    """Statements up to the function's closing brace; names of inner scopes are made unique."""
    at, scopes, inner = 0, [{}], 0
    while True:
        found = _STATEMENT.match(text, at)
        if found is None:
            raise PtxError(f"cannot read {text[at:at + 80]!r}")
        at = found.end()
        if found["brace"] == "{":
            scopes.append({})
            inner += 1
        elif found["brace"]:
            scopes.pop()
            if not scopes:
                return
        elif found["label"]:
            f.code.append(found["label"])
        else:
            _statement(f, found["text"].strip(), scopes, inner)


def _statement(f: Function, text: str, scopes: list[dict[str, str]], inner: int) -> None:
    if text.startswith((".pragma", ".loc\t", ".loc ")):
        return
    if text.startswith(".reg"):
        first, *others = (part.strip() for part in text[4:].split(","))
        type_, name, count = _DECLARED.match(first).groups()                    # type: ignore[union-attr]
        for base in (name, *others):
            for n in range(int(count)) if count else (None,):
                own = base if n is None else f"{base}{n}"
                if len(scopes) > 1:
                    scopes[-1][own] = f"{own}@{inner}"
                f.registers[scopes[-1].get(own, own)] = DTYPES[type_]
        return
    if text.startswith(".param"):                                               # what passes an argument or a result of a call
        name = re.match(r"\.param\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$]+)", text)[1]    # type: ignore[index]
        scopes[-1][name] = f"{name}@{inner}"
        return
    if text.startswith(".local"):
        f.local |= _variables(text + ";", "local")
        return
    if text.startswith("."):
        raise PtxError(f"cannot read {text!r}")
    found = re.match(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
    if found is None:
        raise PtxError(f"cannot read {text!r}")
    guard, opcode, rest = found.groups()

    def renamed(word: re.Match) -> str:
        return next((scope[word[0]] for scope in reversed(scopes) if word[0] in scope), word[0])

    rest, guard = (re.sub(r"[%$A-Za-z_][\w$]*", renamed, " ".join(part.split())) for part in (rest, guard or ""))
    f.code.append(Instruction(opcode, tuple(_split(rest)), guard, " ".join(text.split())))


def _split(operands: str) -> list[str]:
    """At commas outside of braces, brackets and parentheses."""
    parts, depth, start = [], 0, 0
    for n, c in enumerate(operands):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(operands[start:n].strip())
            start = n + 1
    return [*parts, operands[start:].strip()] if operands else []


def _inlined(f: Function, functions: dict[str, Function]) -> Function:
    """The function with every call replaced by the instructions of what it calls; parameters of calls become registers named by their place."""
    code: list[Instruction | str] = []
    for n, item in enumerate(f.code):
        if isinstance(item, str) or not item.opcode.startswith("call"):
            code.append(item)
            continue
        *returned, name, given = item.operands if len(item.operands) == 3 else (*item.operands, "()")
        if name not in functions:
            raise PtxError(f"a call of something that is not there: {item.text}")
        callee, tag = _inlined(functions[name], functions), f"@call{n}"
        names = dict(zip((p[0] for p in callee.params), (a.strip() for a in given.strip("()").split(",")), strict=True))
        if returned:
            names[callee.returned] = returned[0].strip("() ")
        labels = {x for x in callee.code if isinstance(x, str)}
        own = {r: r + tag for r in (*callee.registers, *callee.local, *labels)} | names

        def renamed(text: str, own: dict[str, str] = own) -> str:
            return re.sub(r"[%$A-Za-z_][\w$@]*", lambda w: own.get(w[0], w[0]), text)

        f.registers.update({own[r]: t for r, t in callee.registers.items()})
        f.local.update({own[v]: Variable(x.nbytes, x.align) for v, x in callee.local.items()})
        for x in callee.code:
            if isinstance(x, str):
                code.append(own[x])
            elif x.opcode.split(".")[0] == "ret":
                code.append(Instruction("bra", ("after" + tag,), renamed(x.guard), x.text))
            else:
                code.append(Instruction(x.opcode, tuple(renamed(o) for o in x.operands), renamed(x.guard), x.text))
        code.append("after" + tag)
    f.code = code
    return f


def basic_blocks(f: Function) -> tuple[list[list[Instruction]], dict[str, int]]:
    """The code cut where threads may part or meet, and the block that each label begins."""
    blocks: list[list[Instruction]] = [[]]
    labels = {}
    for item in f.code:
        if isinstance(item, str):
            if blocks[-1]:
                blocks.append([])
            labels[item] = len(blocks) - 1
            continue
        kind = item.opcode.split(".")[0]
        if kind in MEETINGS and blocks[-1]:
            blocks.append([])
        blocks[-1].append(item)
        if kind in ENDS:
            blocks.append([])
    return blocks, labels
