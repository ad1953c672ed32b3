"""What each opcode does: a basic block becomes a Python function over arrays that hold a register of every thread.

A block's function is called with the machine's state S, its registers R, and who takes part: M, a mask (None: all), and I, their numbers
(None: all). Registers are never written in place. An opcode that is in no table is an error with its text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptx.arithmetic import (
    CARRY,
    COMPARE,
    FLOAT,
    FLOATS,
    INTEGER,
    NAMES,
    SIGNED,
    UNSIGNED,
    WIDER,
    f32,
    f64,
    i32,
    u32,
    u64,
)
from ptx.memory import LOCAL_WINDOW, SHARED_WINDOW, Fault
from ptx.text import DTYPES, ENDS, Function, Instruction, PtxError

ADDRESS = re.compile(r"\[\s*([%$\w@]+)\s*(?:\+\s*(-?\d+))?\s*\]")


# ---- a block's function ---------------------------------------------------------------------------------------------------------------

class Compiler:
    """Registers of one entry by number, and the functions of its blocks, each in two forms: for all threads, and for some."""

    def __init__(self, f: Function, symbols: dict[str, int]) -> None:
        self.f, self.symbols = f, symbols           # symbols: variables, with their addresses as `mov` gives them
        self.numbers: dict[str, int] = {}
        self.kinds: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.params = {name: n for n, (name, _, _) in enumerate(f.params)}
        for name, kind in f.registers.items():
            self._number(name, kind)

    def _number(self, name: str, kind: Any) -> int:
        if name not in self.numbers:
            self.numbers[name] = len(self.kinds)
            self.kinds.append(kind)
        return self.numbers[name]

    def function(self, block: Sequence[Instruction], everyone: bool) -> Callable:
        lines = ["def block(S, R, M, I):", " pass"]
        for x in block:
            if x.opcode.split(".")[0] not in ENDS:
                try:
                    lines += [" " + line for line in self._instruction(x, everyone)]
                except (KeyError, ValueError, IndexError, TypeError) as error:
                    raise PtxError(f"cannot compute {x.text!r} ({error!r})") from error
        scope = {**NAMES, **self.constants, "Fault": Fault}
        exec("\n".join(lines), scope)
        return scope["block"]

    # ---- operands ----

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def operand(self, text: str, kind: Any) -> str:
        """An operand as an array, or a number, of this type."""
        if text in self.numbers:
            own = self.kinds[self.numbers[text]]
            ref = f"R[{self.numbers[text]}]"
            if own is kind or kind is np.bool_:
                return ref
            size, wanted = np.dtype(own).itemsize, np.dtype(kind).itemsize
            if size == wanted:
                return f"{ref}.view({self.constant(kind)})"
            if size > wanted:
                return f"{ref}.astype({self.constant(UNSIGNED[wanted])}).view({self.constant(kind)})"
            raise PtxError(f"{text} has {8 * size} bits, and {8 * wanted} are read")
        if text.startswith("%"):
            return f"S.special[{text!r}].view({self.constant(kind)})"
        if text in self.symbols:
            return f"S.full({self.constant(kind(self.symbols[text]))})"
        return self.constant(number(text, kind))

    def array(self, text: str, kind: Any) -> str:
        made = self.operand(text, kind)
        return made if text in self.numbers or text in self.symbols or text.startswith("%") else f"S.full({made})"

    def put(self, target: str, expression: str, kind: Any, mask: str) -> str:
        """The line that writes a result of type `kind`, in the threads of the mask."""
        n = self.numbers[target]
        own = self.kinds[n]
        if own is not kind:
            size, wanted = np.dtype(kind).itemsize, np.dtype(own).itemsize
            if size == wanted:
                expression = f"({expression}).view({self.constant(own)})"
            elif size < wanted:                     # extended by its sign
                extended = SIGNED[wanted] if np.dtype(kind).kind == "i" else UNSIGNED[wanted]
                expression = f"({expression}).astype({self.constant(extended)}).view({self.constant(own)})"
            else:
                raise PtxError(f"{target} has too few bits")
        return f"R[{n}] = where({mask}, {expression}, R[{n}])" if mask else f"R[{n}] = {expression}"

    def address(self, text: str) -> str:
        name, offset = ADDRESS.fullmatch(text).groups()         # type: ignore[union-attr]
        if name in self.numbers:
            base = f"R[{self.numbers[name]}]"
            base = f"{base}.astype(u64)" if self.kinds[self.numbers[name]] is not u64 else base
        else:
            base = f"S.full({self.constant(u64(self.symbols[name]))})"
        return f"({base} + {self.constant(u64(int(offset) & (1 << 64) - 1))})" if offset else base

    # ---- instructions ----

    def _instruction(self, x: Instruction, everyone: bool) -> list[str]:
        mask, index, lines = ("", "None", []) if everyone else ("M", "I", [])
        if x.guard:
            cond = f"R[{self.numbers[x.guard.lstrip('!')]}]"
            cond = f"~{cond}" if x.guard.startswith("!") else cond
            mask, index = "G", "J"
            lines = [f"G = {cond}" if everyone else f"G = M & {cond}", "J = flatnonzero(G)"]
        parts = x.opcode.split(".")
        special = getattr(self, "_" + parts[0], None)
        body = special(x, parts, mask, index) if special is not None else self._plain(x, parts, mask)
        if x.guard and index == "J" and special is not None and parts[0] in ("ld", "st", "atom", "cp"):
            return [*lines, "if len(J):", *(" " + line for line in body)]
        return lines + body

    def _plain(self, x: Instruction, parts: list[str], mask: str) -> list[str]:
        """Arithmetic: the opcode's name, perhaps with .lo or .hi, its modifiers, and the type of everything."""
        kind, name, target = DTYPES[parts[-1]], parts[0], x.operands[0]
        if len(parts) > 2 and parts[1] in ("lo", "hi"):
            name += "." + parts[1]
        modifiers = set(parts[1:-1]) - {"lo", "hi"}
        if "cc" in modifiers or name.split(".")[0] in ("addc", "subc", "madc"):
            return self._with_carry(x, name, "cc" in modifiers, mask)
        if kind in FLOATS:
            if modifiers - {"rn", "ftz", "approx", "full"}:
                raise PtxError(f"cannot compute {x.text!r}")
            operands = [self.operand(o, kind) for o in x.operands[1:]]
            ftz = "ftz" in modifiers
            operands = [f"flush({o})" if ftz else o for o in operands]
            made = f"{'fma32' if kind is f32 else 'fma64'}({', '.join(operands)})" if name == "fma" else FLOAT[name].format(*operands)
            return [self.put(target, f"flush({made})" if ftz else made, kind, mask)]
        if modifiers:
            raise PtxError(f"cannot compute {x.text!r}")
        return [self.put(target, INTEGER[name].format(*(self.array(o, kind) for o in x.operands[1:])),
                         u32 if name == "clz" else kind, mask)]

    def _with_carry(self, x, name, carries, mask):
        given = [f"{self.array(o, u32)}.astype(u64)" for o in x.operands[1:]]
        lines = [f"wide = {CARRY[name].format(*given)}", self.put(x.operands[0], "wide.astype(u32)", u32, mask)]
        return [*lines, f"S.carry = where({mask or 'True'}, wide >> u64(32) & u64(1), S.carry)"] if carries else lines

    def _mul(self, x, parts, mask, index):
        return self._wide(x, parts, mask, "{0} * {1}") if parts[1] == "wide" else self._plain(x, parts, mask)

    def _mad(self, x, parts, mask, index):
        return self._wide(x, parts, mask, "{0} * {1} + {2}") if parts[1] == "wide" else self._plain(x, parts, mask)

    def _wide(self, x, parts, mask, form):
        kind = DTYPES[parts[-1]]
        wide = WIDER[kind]
        given = [f"{self.array(o, kind)}.astype({self.constant(wide)})" for o in x.operands[1:3]]
        given += [self.operand(o, wide) for o in x.operands[3:]]
        return [self.put(x.operands[0], form.format(*given), wide, mask)]

    def _shl(self, x, parts, mask, index):
        kind = DTYPES[parts[-1]]
        return [self.put(x.operands[0], f"{parts[0]}({self.array(x.operands[1], kind)}, {self.operand(x.operands[2], u32)})", kind, mask)]

    _shr = _shl

    def _bfi(self, x, parts, mask, index):
        kind = DTYPES[parts[-1]]
        a, b = (self.array(o, kind) for o in x.operands[1:3])
        return [self.put(x.operands[0], f"bfi({a}, {b}, {int(x.operands[3])}, {int(x.operands[4])})", kind, mask)]

    def _prmt(self, x, parts, mask, index):
        return [self.put(x.operands[0], f"prmt({', '.join(self.array(o, u32) for o in x.operands[1:])})", u32, mask)]

    def _dp4a(self, x, parts, mask, index):
        a, b = (self.array(o, u32) for o in x.operands[1:3])
        kinds = ", ".join("i8" if p == "s32" else "u8" for p in parts[1:])
        return [self.put(x.operands[0], f"dp4a({a}, {b}, {self.operand(x.operands[3], i32)}, {kinds})", i32, mask)]

    def _selp(self, x, parts, mask, index):
        kind = DTYPES[parts[-1]]
        a, b = (self.operand(o, kind) for o in x.operands[1:3])
        return [self.put(x.operands[0], f"where({self.operand(x.operands[3], np.bool_)}, {a}, {b})", kind, mask)]

    def _setp(self, x, parts, mask, index):
        kind = DTYPES[parts[-1]]
        operands = [self.operand(o, kind) for o in x.operands[1:3]]
        if "ftz" in parts:
            operands = [f"flush({o})" for o in operands]
        if set(parts[2:-1]) - {"ftz"} or len(x.operands) != 3:
            raise PtxError(f"cannot compute {x.text!r}")
        return [self.put(x.operands[0], COMPARE[parts[1]].format(*operands), np.bool_, mask)]

    def _mov(self, x, parts, mask, index):
        kind, (target, source) = DTYPES[parts[-1]], x.operands
        if target.startswith("{"):                                      # the parts of a register, the lowest first
            names = [t.strip() for t in target.strip("{}").split(",")]
            part = UNSIGNED[np.dtype(kind).itemsize // len(names)]
            whole = f"{self.array(source, kind)}.view({self.constant(part)}).reshape(-1, {len(names)})"
            return [f"parts = {whole}", *(self.put(t, f"parts[:, {n}].copy()", part, mask) for n, t in enumerate(names))]
        if source.startswith("{"):
            names = [t.strip() for t in source.strip("{}").split(",")]
            part = UNSIGNED[np.dtype(kind).itemsize // len(names)]
            stacked = ", ".join(self.array(t, part) for t in names)
            return [self.put(target, f"stack([{stacked}], axis=1).view({self.constant(kind)}).reshape(-1)", kind, mask)]
        return [self.put(target, self.array(source, kind), kind, mask)]

    def _cvt(self, x, parts, mask, index):
        kind, source = DTYPES[parts[-2]], DTYPES[parts[-1]]
        value, modifiers = self.array(x.operands[1], source), parts[1:-2]
        if set(modifiers) - {"rn", "rni", "rzi", "rmi", "rpi", "ftz"}:
            raise PtxError(f"cannot compute {x.text!r}")
        if "ftz" in modifiers and source is f32:
            value = f"flush({value})"
        rounding = next((m for m in modifiers if m.endswith("i")), "")
        if rounding and kind not in FLOATS:
            made = f"to_integer({value}, {self.constant(kind)}, {rounding!r})"
        elif rounding:
            made = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}[rounding] + f"({value})"
        else:
            made = f"{value}.astype({self.constant(kind)})"
        if "ftz" in modifiers and kind is f32:
            made = f"flush({made})"
        return [self.put(x.operands[0], made, kind, mask)]

    def _cvta(self, x, parts, mask, index):
        space = parts[2] if parts[1] == "to" else parts[1]
        window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": u64(0)}[space]
        value = self.array(x.operands[1], u64)
        if parts[1] == "to" and space != "global":
            return [f"S.within({value}, {self.constant(window)}, {index}, {x.text!r})",
                    self.put(x.operands[0], f"{value} - {self.constant(window)}", u64, mask)]
        return [self.put(x.operands[0], f"{value} + {self.constant(window)}" if parts[1] != "to" else value, u64, mask)]

    # ---- memory ----

    def _vector(self, text: str) -> list[str]:
        return [t.strip() for t in text.strip("{}").split(",")]

    def _ld(self, x, parts, mask, index):
        kind = DTYPES[parts[-1]]
        if parts[1] == "param":
            name, offset = ADDRESS.fullmatch(x.operands[1]).groups()    # type: ignore[union-attr]
            if name in self.params:
                return [self.put(x.operands[0], f"S.param({self.params[name]}, {int(offset or 0)}, {self.constant(kind)})", kind, mask)]
            return [self.put(x.operands[0], f"R[{self._number(f'{name}+{int(offset or 0)}', kind)}]", kind, mask)]
        space, modifiers = parts[1], [p for p in parts[2:-1] if p not in ("v2", "v4")]
        if space not in ("global", "shared", "local") or set(modifiers) - {"nc", "L1::no_allocate", "cg", "ca", "cs", "volatile"}:
            raise PtxError(f"cannot compute {x.text!r}")
        targets = self._vector(x.operands[0])
        lines = [f"got = S.load({space!r}, {self.address(x.operands[1])}, {index}, {self.constant(kind)}, {len(targets)}, {'nc' in modifiers}, "
                 f"{x.text!r})"]
        for n, target in enumerate(targets):
            number_ = self.numbers[target]
            own = self.kinds[number_]
            size, wanted = np.dtype(kind).itemsize, np.dtype(own).itemsize
            extended = kind if size == wanted else SIGNED[wanted] if np.dtype(kind).kind == "i" else UNSIGNED[wanted]
            lines.append(f"R[{number_}] = S.spread(R[{number_}], {index}, got[{n}].astype({self.constant(extended)}, copy=False))")
        return lines

    def _st(self, x, parts, mask, index):
        kind = DTYPES[parts[-1]]
        if parts[1] == "param":
            name, offset = ADDRESS.fullmatch(x.operands[0]).groups()    # type: ignore[union-attr]
            slot = f"{name}+{int(offset or 0)}"
            self._number(slot, kind)
            return [self.put(slot, self.array(x.operands[1], kind), kind, mask)]
        if parts[1] not in ("global", "shared", "local") or set(parts[2:-1]) - {"v2", "v4"}:
            raise PtxError(f"cannot compute {x.text!r}")
        values = ", ".join(self.array(o, kind) for o in self._vector(x.operands[1]))
        return [f"S.store({parts[1]!r}, {self.address(x.operands[0])}, {index}, [{values}], {self.constant(kind)}, {x.text!r})"]

    def _atom(self, x, parts, mask, index):
        _, space, op, kind = parts
        if space != "global" or op not in ("add", "max", "min", "exch"):
            raise PtxError(f"cannot compute {x.text!r}")
        lines = [f"got = S.atomic({self.address(x.operands[1])}, {index}, {op!r}, {self.array(x.operands[2], DTYPES[kind])}, {x.text!r})"]
        n = self.numbers[x.operands[0]]
        return [*lines, f"R[{n}] = S.spread(R[{n}], {index}, got.view({self.constant(self.kinds[n])}))"]

    def _cp(self, x, parts, mask, index):
        form = ".".join(parts[1:])
        if form == "async.commit_group":
            return [f"S.commit({index})"]
        if form == "async.wait_group":
            return [f"S.wait({index}, {int(x.operands[0])}, {x.text!r})"]
        if form == "async.wait_all":
            return [f"S.commit({index})", f"S.wait({index}, 0, {x.text!r})"]
        if form != "async.cg.shared.global" or x.operands[2] != "16":
            raise PtxError(f"cannot compute {x.text!r}")
        taken = self.array(x.operands[3], u32) if len(x.operands) > 3 else "S.full(u32(16))"
        return [f"S.copy({self.address(x.operands[0])}, {self.address(x.operands[1])}, {taken}, {index}, {x.text!r})"]

    def _membar(self, x, parts, mask, index):
        return []                               # threads take turns at whole blocks of instructions: memory is always in order

    _fence = _bar = _barrier = _membar          # barriers are the machine's business

    # ---- warps ----

    def _shfl(self, x, parts, mask, index):
        _, sync, mode, _ = parts
        target, *valid = x.operands[0].split("|")
        a, b, c, members = (self.array(o, u32) for o in x.operands[1:])
        lines = [f"got, valid = S.shuffle({mode!r}, {a}, {b}, {c}, {members}, {index}, {x.text!r})", self.put(target, "got", u32, mask)]
        return lines + [self.put(v, "valid", np.bool_, mask) for v in valid]

    def _vote(self, x, parts, mask, index):
        _, sync, mode, kind = parts
        lines = [f"got = S.vote({mode!r}, {self.array(x.operands[1].lstrip('!'), np.bool_)}, {self.array(x.operands[2], u32)}, {index}, {x.text!r})"]
        return [*lines, self.put(x.operands[0], "got", DTYPES[kind], mask)]

    def _ldmatrix(self, x, parts, mask, index):
        if ".".join(parts[1:]) != "sync.aligned.m8n8.x4.shared.b16":
            raise PtxError(f"cannot compute {x.text!r}")
        lines = [f"got = S.ldmatrix({self.address(x.operands[1])}, {index}, {x.text!r})"]
        return lines + [self.put(t, f"got[{n}]", u32, mask) for n, t in enumerate(self._vector(x.operands[0]))]

    def _mma(self, x, parts, mask, index):
        form = ".".join(parts[1:])
        shapes = {"sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": 16, "sync.aligned.m16n8k8.row.col.f32.f16.f16.f32": 8}
        if form not in shapes:
            raise PtxError(f"cannot compute {x.text!r}")
        a, b = ("[" + ", ".join(self.array(o, u32) for o in self._vector(x.operands[n])) + "]" for n in (1, 2))
        c = "[" + ", ".join(self.array(o, f32) for o in self._vector(x.operands[3])) + "]"
        lines = [f"got = S.mma({shapes[form]}, {a}, {b}, {c}, {index}, {x.text!r})"]
        return lines + [self.put(t, f"got[{n}]", f32, mask) for n, t in enumerate(self._vector(x.operands[0]))]


def number(text: str, kind: Any) -> Any:
    """A constant: 12, -1, 0x1F, 0f3F800000 and 0d3FF0000000000000."""
    if found := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
        bits, of = (u32, f32) if found[1] in "fF" else (u64, f64)
        value = bits(int(found[2], 16)).view(of)
        return value if kind in FLOATS else bits(int(found[2], 16)).astype(kind)
    value = int(text.rstrip("U"), 0)
    if kind is np.bool_:
        return np.bool_(value)
    if kind in FLOATS:
        return kind(value)
    bits = 8 * np.dtype(kind).itemsize
    return UNSIGNED[bits // 8](value & (1 << bits) - 1).view(kind)
