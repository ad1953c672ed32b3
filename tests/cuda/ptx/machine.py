"""Runs an entry of a PTX module over a grid: all threads side by side in arrays, those at the same basic block together.

Threads that part meet again because the ones that are furthest behind go first. At a barrier the threads of a block wait for all of theirs
that have not left; at an instruction of a whole warp, the lanes of the warp. Whoever waits for someone that never comes is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ptx.arithmetic import i32, i64, u32, u64
from ptx.instructions import Compiler
from ptx.memory import SHIFT, Fault, Global, Local, Segment, Shared
from ptx.text import Function, Module, PtxError, basic_blocks

AT_ONCE = 8192                  # threads that run side by side
MOST_STEPS = 1_000_000
GONE = np.int32(1 << 30)
LIMITS = (2**31 - 1, 65535, 65535)
_seen: Counter[str] = Counter()     # opcodes that ran


def opcodes_seen() -> Counter[str]:
    """How often each opcode was met so far, in all launches."""
    return _seen


class Program:
    """A module ready to run: its variables' places, and its entries' blocks as functions."""

    def __init__(self, ptx: str) -> None:
        self.module = Module(ptx)
        self.entries = {name: Entry(self.module, f) for name, f in self.module.entries.items()}

    def only(self) -> Entry:
        (entry,) = self.entries.values()
        return entry


class Entry:
    def __init__(self, module: Module, f: Function) -> None:
        self.module, self.f = module, f
        at, symbols = 0, {}
        for name, v in f.local.items():
            v.offset = -(-at // v.align) * v.align
            at = v.offset + v.nbytes
            symbols[name] = v.offset
        self.local_bytes = at
        symbols |= {name: v.offset for name, v in module.shared.items()}
        self.tables = [v for v in module.globals.values() if v.data]
        for n, v in enumerate(self.tables):                     # constant tables have segments of their own, far from everybody's
            v.offset = (0x6000 + n) << 40
        symbols |= {name: v.offset for name, v in module.globals.items() if v.data}
        self.blocks, self.labels = basic_blocks(f)
        self.compiler = Compiler(f, symbols)
        self._functions: dict[tuple[int, bool], Any] = {}

    def function(self, block: int, everyone: bool) -> Any:
        key = block, everyone
        if key not in self._functions:
            self._functions[key] = self.compiler.function(self.blocks[block], everyone)
        return self._functions[key]

    @cached_property
    def meetings(self) -> list[str]:
        """What each block begins with: "block", "warp" or nothing."""
        kinds = [b[0].opcode.split(".")[0] if b else "" for b in self.blocks]
        return ["block" if k in ("bar", "barrier") else "warp" if k in ("shfl", "vote", "match", "mma", "ldmatrix") else "" for k in kinds]

    @cached_property
    def ends(self) -> list[tuple[int, int, bool, bool]]:
        """How each block ends: (register of the condition or -1, where to go when it holds, whether it is negated, whether to leave)."""
        out = []
        for n, b in enumerate(self.blocks):
            last = b[-1] if b else None
            kind = last.opcode.split(".")[0] if last else ""
            if kind not in ("bra", "ret", "exit", "trap"):
                out.append((-1, n + 1, False, False))
                continue
            assert last is not None
            target = self.labels[last.operands[0]] if kind == "bra" else GONE
            register = self.compiler.numbers[last.guard.lstrip("!")] if last.guard else -1
            out.append((register, int(target), last.guard.startswith("!"), kind == "trap"))
        return out

    def launch(self, memory: Global, grid: Sequence[int], block: Sequence[int], params: Sequence[bytes], dynamic_shared: int = 0,
               last_only: bool = False) -> None:
        """last_only: of the grid's blocks only the last runs."""
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        if any(not 0 < g <= most for g, most in zip(grid, LIMITS, strict=True)):
            raise Fault(f"a grid of {grid} blocks cannot be launched")
        per_block = int(np.prod(block))
        if not 0 < per_block <= 1024:
            raise Fault(f"blocks of {block} threads cannot be launched")
        if self.module.shared_bytes > 48 << 10:
            raise Fault(f"{self.module.shared_bytes} bytes of shared memory are more than the 48 KiB that a kernel may declare")
        for given, (name, nbytes, _) in zip(params, self.f.params, strict=True):
            if len(given) != nbytes:
                raise Fault(f"{name} has {nbytes} bytes and is given {len(given)}")
        memory.begin()
        for v in self.tables:
            memory.segments.setdefault(v.offset >> 40, _table(v.data))
        for b in self.blocks:
            _seen.update(x.opcode for x in b)
        total = int(np.prod(grid, dtype=np.int64))
        at_once = max(1, AT_ONCE // per_block)
        with np.errstate(all="ignore"):
            for first in range(total - 1 if last_only else 0, total, at_once):
                numbers = np.arange(first, min(first + at_once, total))
                State(self, memory, grid, block, numbers, params, dynamic_shared).run()


def _table(data: bytes) -> Segment:
    return Segment(np.frombuffer(data, np.uint8), "a constant table", [(0, len(data))])


class State:
    """Some blocks of a grid at work."""

    def __init__(self, entry: Entry, memory: Global, grid: Sequence[int], block: Sequence[int], blocks: np.ndarray, params: Sequence[bytes],
                 dynamic_shared: int) -> None:
        self.entry, self.memory, self.params = entry, memory, params
        self.per_block = int(np.prod(block))
        n = self.n = len(blocks) * self.per_block
        self.block_of, within = np.divmod(np.arange(n, dtype=i64), self.per_block)
        self.global_block = blocks[self.block_of]
        self.lane = (within % 32).astype(i64)
        self.warps_per_block = -(-self.per_block // 32)
        self.warp_of = self.block_of * self.warps_per_block + within // 32
        self.n_warps = len(blocks) * self.warps_per_block
        self.everyone = np.arange(n, dtype=i64)
        self.special: dict[str, np.ndarray] = {"%laneid": self.lane.astype(u32), "%warpsize": np.full(n, 32, u32)}
        for axis, stride_t, stride_b in (("x", 1, 1), ("y", block[0], grid[0]), ("z", block[0] * block[1], grid[0] * grid[1])):
            n_axis = "xyz".index(axis)
            self.special["%tid." + axis] = (within // stride_t % block[n_axis]).astype(u32)
            self.special["%ctaid." + axis] = (self.global_block // stride_b % grid[n_axis]).astype(u32)
            self.special["%ntid." + axis], self.special["%nctaid." + axis] = np.full(n, block[n_axis], u32), np.full(n, grid[n_axis], u32)
        self.shared = Shared(len(blocks), self.per_block, entry.module.shared_bytes + dynamic_shared)
        self.local = Local(n, entry.local_bytes)
        self.carry = np.zeros(n, u64)
        self.registers: list[np.ndarray] = []
        self.groups = np.zeros(n, i64)                          # copies committed so far, by thread
        self.promised: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str]] = []

    # ---- what blocks of instructions call ----

    def full(self, value: Any) -> np.ndarray:
        return np.full(self.n, value)

    def param(self, number: int, offset: int, kind: Any) -> np.ndarray:
        return np.full(self.n, np.frombuffer(self.params[number], kind, 1, offset)[0])

    @staticmethod
    def spread(old: np.ndarray, index: np.ndarray | None, values: np.ndarray) -> np.ndarray:
        if index is None:
            return values.view(old.dtype)
        new = old.copy()
        new[index] = values.view(old.dtype)
        return new

    def _who(self, index: np.ndarray | None) -> np.ndarray:
        return self.everyone if index is None else index

    def within(self, at: np.ndarray, window: Any, index: np.ndarray | None, text: str) -> None:
        if ((at[self._who(index)] >> SHIFT) != window >> SHIFT).any():
            raise Fault(f"{text}: the address is in another kind of memory")

    def load(self, space: str, at: np.ndarray, index: np.ndarray | None, kind: Any, count: int, constant: bool, text: str) -> list[np.ndarray]:
        at = at if index is None else at[index]
        if space == "global":
            return self.memory.load(at, kind, count, constant, text)
        return getattr(self, space).load(at, self._who(index), kind, count, text)

    def store(self, space: str, at: np.ndarray, index: np.ndarray | None, values: list[np.ndarray], kind: Any, text: str) -> None:
        if index is not None:
            at, values = at[index], [v[index] for v in values]
        if space == "global":
            self.memory.store(at, values, kind, self.global_block[self._who(index)], text)
        else:
            getattr(self, space).store(at, self._who(index), values, kind, text)

    def atomic(self, at: np.ndarray, index: np.ndarray | None, op: str, values: np.ndarray, text: str) -> np.ndarray:
        who = self._who(index)
        given = values[who]
        combine = {"add": lambda old, n: old + given[n], "max": lambda old, n: max(old, given[n]), "min": lambda old, n: min(old, given[n]),
                   "exch": lambda old, n: given[n]}[op]
        return self.memory.atomic(at[who], combine, values.dtype.type, text)

    # ---- copies behind the kernel's back ----

    def copy(self, to: np.ndarray, source: np.ndarray, taken: np.ndarray, index: np.ndarray | None, text: str) -> None:
        """16 bytes, of which the first `taken` come from global memory and the rest are zeros."""
        who = self._who(index)
        to, source, taken = to[who], source[who], taken[who]
        places = self.shared.promise(to, who, 16, text)
        data = np.zeros((len(who), 4), u32)
        some = taken > 0
        if not np.isin(taken, (0, 16)).all():
            raise Fault(f"{text}: only whole and empty copies are known")
        if some.any():
            data[some] = np.stack(self.memory.load(source[some], u32, 4, False, text), axis=1)
        self.promised.append((who, places, data, self.groups[who], text))

    def commit(self, index: np.ndarray | None) -> None:
        self.groups[self._who(index)] += 1

    def wait(self, index: np.ndarray | None, most: int, text: str) -> None:
        """All but the last `most` groups of these threads have arrived."""
        here = np.zeros(self.n, bool)
        here[self._who(index)] = True
        left = []
        for who, places, data, group, what in self.promised:
            done = here[who] & (group < self.groups[who] - most)
            if done.any():
                self.shared.arrive(places[done], data[done], who[done], what)
            if not done.all():
                left.append((who[~done], places[~done], data[~done], group[~done], what))
        self.promised = left

    # ---- warps ----

    def _by_lane(self, values: np.ndarray, who: np.ndarray) -> np.ndarray:
        out = np.zeros((self.n_warps, 32), values.dtype)
        out[self.warp_of[who], self.lane[who]] = values[who]
        return out

    def _members(self, members: np.ndarray | None, who: np.ndarray, text: str) -> np.ndarray:
        """Which lanes are here, after the check that they are those that the instruction names (None: all)."""
        here = np.zeros((self.n_warps, 32), bool)
        here[self.warp_of[who], self.lane[who]] = True
        bits = (here.astype(u64) << np.arange(32, dtype=u64)).sum(axis=1).astype(u32)[self.warp_of[who]]
        named = np.full(len(who), 0xFFFFFFFF, u32) if members is None else members[who]
        if (bits != named).any():
            raise Fault(f"{text}: lanes {bits[bits != named][0]:#010x} are there, and {named[bits != named][0]:#010x} are named")
        return here

    def shuffle(self, mode: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, members: np.ndarray, index: np.ndarray | None, text: str):
        who = self._who(index)
        self._members(members, who, text)
        lane, b, clamp, segment = self.lane, (b & u32(31)).astype(i64), (c & u32(31)).astype(i64), (c >> u32(8) & u32(31)).astype(i64)
        highest, lowest = (lane & segment) | (clamp & ~segment & 31), lane & segment
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment & 31)}[mode]
        valid = j >= highest if mode == "up" else j <= highest
        source = np.where(valid, j, lane)
        return self._by_lane(a, who)[self.warp_of, source], valid

    def vote(self, mode: str, p: np.ndarray, members: np.ndarray, index: np.ndarray | None, text: str) -> np.ndarray:
        who = self._who(index)
        here = self._members(members, who, text)
        values = self._by_lane(p, who)
        if mode == "ballot":
            return (values.astype(u64) << np.arange(32, dtype=u64)).sum(axis=1).astype(u32)[self.warp_of]
        if mode not in ("any", "all"):
            raise PtxError(f"cannot compute {text!r}")
        return (values.any(axis=1) if mode == "any" else (values | ~here).all(axis=1))[self.warp_of]

    def ldmatrix(self, at: np.ndarray, index: np.ndarray | None, text: str) -> list[np.ndarray]:
        """Lane 8 m + r points at row r of matrix m (16 bytes); every lane gets, of each matrix, word lane % 4 of row lane / 4."""
        who = self._who(index)
        self._members(None, who, text)
        words = np.stack(self.shared.load(at[who], who, u32, 4, text), axis=1)
        rows = np.zeros((self.n_warps, 32, 4), u32)
        rows[self.warp_of[who], self.lane[who]] = words
        return [rows[self.warp_of, 8 * m + self.lane // 4, self.lane % 4] for m in range(4)]

    def mma(self, k: int, a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray], index: np.ndarray | None, text: str) -> list[np.ndarray]:
        """D = A B + C of a warp, A (16, k), B (k, 8), C (16, 8). With g = lane / 4 and t = lane % 4, two half floats to a register:

            A  register 2 j + i:    row g + 8 i, columns 8 j + 2 t, 8 j + 2 t + 1
            B  register j:          rows 8 j + 2 t, 8 j + 2 t + 1, column g
            C  register 2 i + n:    row g + 8 i, column 2 t + n
        """
        who = self._who(index)
        self._members(None, who, text)
        warps = np.unique(self.warp_of[who])
        g, t = np.arange(32) // 4, np.arange(32) % 4
        left, right, start = np.zeros((self.n_warps, 16, k), np.float32), np.zeros((self.n_warps, k, 8), np.float32), \
            np.zeros((self.n_warps, 16, 8), np.float32)
        for n in range(2):
            for j in range(k // 8):
                for i in range(2):
                    left[:, g + 8 * i, 8 * j + 2 * t + n] = self._halves(a[2 * j + i], n, who)
                right[:, 8 * j + 2 * t + n, g] = self._halves(b[j], n, who)
            for i in range(2):
                start[:, g + 8 * i, 2 * t + n] = self._by_lane(c[2 * i + n], who)
        made = np.zeros_like(start)
        made[warps] = start[warps] + left[warps] @ right[warps]
        return [made[self.warp_of, self.lane // 4 + 8 * i, 2 * (self.lane % 4) + n] for i in range(2) for n in range(2)]

    def _halves(self, register: np.ndarray, n: int, who: np.ndarray) -> np.ndarray:
        return (self._by_lane(register, who) >> u32(16 * n)).astype(np.uint16).view(np.float16).astype(np.float32)

    # ---- running ----

    def run(self) -> None:
        entry, n = self.entry, self.n
        pc = np.zeros(n, i32)
        together: int | None = 0                                # the block at which all threads are, if they are
        for _ in range(MOST_STEPS):
            if together is not None:
                at, mask, index = together, None, None
            else:
                found = self._next(pc)
                if found is None:
                    return
                at, mask = found
                index = np.flatnonzero(mask)
            if at >= len(entry.blocks):
                together = int(GONE)
            if together == GONE:
                return
            self._meet(entry.meetings[at], index)
            function = entry.function(at, mask is None)
            while len(self.registers) < len(entry.compiler.kinds):
                self.registers.append(np.zeros(n, entry.compiler.kinds[len(self.registers)]))
            function(self, self.registers, mask, index)
            register, target, negated, trap = entry.ends[at]
            if trap:
                raise Fault("the kernel stopped at a trap")
            if together is not None:
                taken = np.True_ if register < 0 else self.registers[register] != negated
                if taken.all():
                    together = target
                elif not taken.any():
                    together = at + 1
                else:
                    pc, together = np.where(taken, target, at + 1).astype(i32), None
                continue
            assert index is not None
            pc[index] = target if register < 0 else np.where(self.registers[register][index] != negated, target, at + 1)
            if (pc == pc[0]).all():
                together = int(pc[0])
        raise Fault(f"still running after {MOST_STEPS} steps")

    def _next(self, pc: np.ndarray) -> tuple[int, np.ndarray] | None:
        """The block furthest behind at which somebody can go on, and who."""
        alive = pc < GONE
        if not alive.any():
            return None
        for at in np.unique(pc[alive]):
            mask = pc == at
            kind = self.entry.meetings[at]
            if kind:
                group, count = (self.block_of, self.n // self.per_block) if kind == "block" else (self.warp_of, self.n_warps)
                complete = np.bincount(group[mask], minlength=count) == np.bincount(group[alive], minlength=count)
                mask = mask & complete[group]
            if mask.any():
                return int(at), mask
        waiting = Counter(self.entry.blocks[at][0].text for at in pc[alive])
        raise Fault(f"threads wait for others that do not come, at {dict(waiting)}")

    def _meet(self, kind: str, index: np.ndarray | None) -> None:
        if kind == "block":
            self.shared.block_turn[np.unique(self.block_of[self._who(index)])] += 1
        elif kind == "warp":
            self.shared.warp_turn[np.unique(self.warp_of[self._who(index)])] += 1
