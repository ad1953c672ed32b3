"""Memory as a GPU has it, and a GPU's reasons to fail: addresses outside of what was given, addresses that are not multiples of an access's
size, bytes of shared memory that nobody wrote, and two threads at one place with no barrier between them.

An address is the number of a segment (from bit 40 on) and an offset into it. Accesses take an array of addresses, one for each thread that
takes part, with the threads' numbers.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHIFT, WITHIN = np.uint64(40), np.uint64((1 << 40) - 1)
SHARED_WINDOW = np.uint64(0x7000 << 40)             # generic addresses of shared and of local memory
LOCAL_WINDOW = np.uint64(0x7001 << 40)
NO_RESERVE = 0x4000                                 # MAP_NORESERVE of Linux, which mmap has a name for from Python 3.13 on
POISON = 0x7B                                       # fills what nobody wrote
i64, u64 = np.int64, np.uint64


class Fault(Exception):
    """What a GPU would not do, or would do wrong."""


@dataclass
class Segment:
    """One allocation: its bytes, and the parts of them that this launch was given."""

    bytes: np.ndarray
    what: str
    given: list[tuple[int, int]] = field(default_factory=list)
    writer: np.ndarray | None = None                # per byte: 1 + the block that wrote it in this launch
    constant: np.ndarray | None = None              # per byte: was it read as memory that the kernel does not write (ld.global.nc)?
    views: dict[Any, np.ndarray] = field(default_factory=dict)

    def view(self, dtype: Any) -> np.ndarray:
        if dtype not in self.views:
            size = np.dtype(dtype).itemsize
            self.views[dtype] = self.bytes[:len(self.bytes) // size * size].view(dtype)
        return self.views[dtype]

    def merged(self) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        for low, high in sorted(self.given):
            if spans and low <= spans[-1][1]:
                spans[-1] = spans[-1][0], max(spans[-1][1], high)
            else:
                spans.append((low, high))
        return spans


def zeros(count: int, dtype: Any) -> np.ndarray:
    """Zeros that take no memory before they are touched, however many they are."""
    nbytes = count * np.dtype(dtype).itemsize
    if nbytes < 1 << 26:
        return np.zeros(count, dtype)
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE), dtype, count)


class Global:
    """Global memory: segments by number."""

    def __init__(self) -> None:
        self.segments: dict[int, Segment] = {}
        self._last = 0                                  # number given; never again, also when that memory is freed
        self._numbers: dict[tuple[int, int], int] = {}
        self._owners: list[Any] = []

    def add(self, data: np.ndarray, what: str) -> int:
        """The address of new memory over these bytes (uint8), all of which are given."""
        self._last += 1
        self.segments[self._last] = Segment(data, what, [(0, len(data))])
        return self._last << 40

    def address(self, array: np.ndarray, what: str) -> int:
        """The address of an array; arrays that share memory are one segment, of which only their own parts are given."""
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        start = root.__array_interface__["data"][0]
        key = start, root.nbytes
        if key not in self._numbers:
            flat = root.reshape(-1, copy=False).view(np.uint8)
            self._numbers[key] = self.add(flat, what) >> 40
            self.segments[self._numbers[key]].given.clear()
            self._owners.append(root)
        offset = array.__array_interface__["data"][0] - start
        self.segments[self._numbers[key]].given.append((offset, offset + array.nbytes))
        return self._numbers[key] << 40 | offset

    def begin(self) -> None:
        """A launch begins: nothing was written or read by it so far."""
        for s in self.segments.values():
            s.writer = s.constant = None

    def _places(self, at: np.ndarray, size: int, text: str):
        """(segment, threads, offsets), after the checks."""
        if (at & u64(size - 1)).any():
            raise Fault(f"misaligned: {text} at {int(at[(at & u64(size - 1)) != 0][0]) & 0xFF:#x} of 256")
        numbers = at >> SHIFT
        for number in (numbers[:1] if (numbers == numbers[0]).all() else np.unique(numbers)):
            here = None if len(numbers) == 1 or (numbers == number).all() else np.flatnonzero(numbers == number)
            segment = self.segments.get(int(number))
            if segment is None:
                raise Fault(f"no memory at {int(at[0]):#x}: {text}")
            off = (at if here is None else at[here]) & WITHIN
            low, high = int(off.min()), int(off.max()) + size
            if not any(a <= low and high <= b for a, b in segment.given):
                ok = np.zeros(len(off), bool)
                for a, b in segment.merged():
                    ok |= (off >= u64(a)) & (off + u64(size) <= u64(b))
                if not ok.all():
                    raise Fault(f"out of bounds: {text} at byte {int(off[~ok][0])} of {segment.what}, which has {segment.merged()}")
            yield segment, here, off.astype(i64)

    def load(self, at: np.ndarray, dtype: Any, count: int, constant: bool, text: str) -> list[np.ndarray]:
        size = np.dtype(dtype).itemsize
        out = [np.empty(len(at), dtype) for _ in range(count)]
        for segment, here, off in self._places(at, size * count, text):
            if constant:
                if segment.constant is None:
                    segment.constant = zeros(len(segment.bytes), bool)
                segment.constant[off] = True
                if segment.writer is not None and segment.writer[off].any():
                    raise Fault(f"{text} reads as constant what this launch wrote, in {segment.what}")
            view, index = segment.view(dtype), off // size
            for n in range(count):
                if here is None:
                    out[n] = view[index + n]
                else:
                    out[n][here] = view[index + n]
        return out

    def store(self, at: np.ndarray, values: list[np.ndarray], dtype: Any, block: np.ndarray, text: str) -> None:
        size = np.dtype(dtype).itemsize
        for segment, here, off in self._places(at, size * len(values), text):
            if segment.constant is not None and segment.constant[off].any():
                raise Fault(f"{text} writes what this launch read as constant, in {segment.what}")
            if segment.writer is None:
                segment.writer = zeros(len(segment.bytes), np.int32)
            view, index, mine = segment.view(dtype), off // size, (block if here is None else block[here]) + 1
            for n, value in enumerate(values):
                value = (value if here is None else value[here]).astype(dtype, copy=False)
                before, place = segment.writer[off + n * size], index + n
                clash = (before != 0) & (before != mine)
                if clash.any() and not same(view[place][clash], value[clash]):
                    raise Fault(f"{text}: two blocks write different values to byte {int((off + n * size)[clash][0])} of {segment.what}")
                view[place] = value
                if not same(view[place], value):
                    raise Fault(f"{text}: two threads write different values to one place of {segment.what}")
                segment.writer[off + n * size] = mine

    def atomic(self, at: np.ndarray, combine: Any, dtype: Any, text: str) -> np.ndarray:
        """Each thread's turn, one after another: the values that they found."""
        old = np.empty(len(at), dtype)
        for n in range(len(at)):
            (segment, _, off), = self._places(at[n:n + 1], np.dtype(dtype).itemsize, text)
            view, index = segment.view(dtype), int(off[0]) // np.dtype(dtype).itemsize
            old[n] = view[index]
            view[index] = combine(view[index], n)
        return old


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((np.ascontiguousarray(a).view(np.uint8) == np.ascontiguousarray(b).view(np.uint8)).all())


class Local:
    """Local memory: each thread its own."""

    def __init__(self, threads: int, nbytes: int) -> None:
        self.nbytes = -(-nbytes // 16) * 16
        self.bytes = np.full(threads * self.nbytes, POISON, np.uint8)

    def _index(self, at: np.ndarray, thread: np.ndarray, dtype: Any, count: int, text: str) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        at = at & WITHIN
        if (at & u64(size * count - 1)).any():
            raise Fault(f"misaligned: {text}")
        if int(at.max()) + size * count > self.nbytes:
            raise Fault(f"out of bounds: {text} at byte {int(at.max())} of {self.nbytes} bytes of local memory")
        return (thread * self.nbytes + at.astype(i64)) // size

    def load(self, at, thread, dtype, count, text):
        index = self._index(at, thread, dtype, count, text)
        return [self.bytes.view(dtype)[index + n] for n in range(count)]

    def store(self, at, thread, values, dtype, text):
        index = self._index(at, thread, dtype, len(values), text)
        for n, value in enumerate(values):
            self.bytes.view(dtype)[index + n] = value.astype(dtype, copy=False)


class Shared:
    """Shared memory of all blocks, watched in words of four bytes.

    Two accesses of one word, one of them a write that changes it, need a barrier of their block between them, or, within a warp, an
    instruction at which the warp meets. `block_turn` and `warp_turn` count those; a word remembers the turns of its last writer and readers.
    """

    WORD = 4

    def __init__(self, blocks: int, threads_per_block: int, nbytes: int) -> None:
        self.nbytes, self.per_block, self.warps = -(-nbytes // 16) * 16, threads_per_block, -(-threads_per_block // 32)
        words = blocks * self.nbytes // self.WORD
        self.bytes = np.full(blocks * self.nbytes, POISON, np.uint8)
        self.written = np.zeros(words, bool)
        self.block_turn, self.warp_turn = np.zeros(blocks, i64), np.zeros(blocks * self.warps, i64)
        self.writer, self.writer_block, self.writer_warp = np.full(words, -1, i64), np.full(words, -1, i64), np.zeros(words, i64)
        self.reader_low, self.reader_high = np.zeros(words, i64), np.full(words, -1, i64)
        self.reader_block, self.reader_warp = np.full(words, -1, i64), np.zeros(words, i64)

    def _warp(self, thread: np.ndarray) -> np.ndarray:
        block, within = np.divmod(thread, self.per_block)
        return block * self.warps + within // 32

    def _index(self, at: np.ndarray, thread: np.ndarray, size: int, text: str) -> np.ndarray:
        """Bytes of the whole; at are offsets or addresses in the window."""
        at = at & WITHIN
        if (at & u64(size - 1)).any():
            raise Fault(f"misaligned: {text} at byte {int(at[(at & u64(size - 1)) != 0][0])} of shared memory")
        if int(at.max()) + size > self.nbytes:
            raise Fault(f"out of bounds: {text} at byte {int(at.max())} of {self.nbytes} bytes of shared memory")
        if size < self.WORD:
            raise Fault(f"an access of {size} bytes of shared memory is not watched: {text}")
        return thread // self.per_block * self.nbytes + at.astype(i64)

    def _clash(self, other_low, other_high, other_block, other_warp, thread, warp):
        """Is someone else's access (by threads low .. high, at those turns) not ordered before this one?"""
        block = thread // self.per_block
        unordered = (other_block == self.block_turn[block]) & ((other_low != thread) | (other_high != thread))
        within = (self._warp(np.maximum(other_low, 0)) == warp) & (self._warp(np.maximum(other_high, 0)) == warp)
        return unordered & ~(within & (other_warp < self.warp_turn[warp]))

    def _read(self, word, thread, warp, text):
        if not self.written[word].all():
            raise Fault(f"{text} reads shared memory that nobody wrote, at byte {int(word[~self.written[word]][0]) * self.WORD % self.nbytes}")
        clash = self._clash(self.writer[word], self.writer[word], self.writer_block[word], self.writer_warp[word], thread, warp)
        if clash.any():
            n = int(np.flatnonzero(clash)[0])
            raise Fault(f"race: {text}: thread {thread[n] % self.per_block} reads byte {word[n] * self.WORD % self.nbytes} of shared memory, "
                        f"which thread {self.writer[word[n]] % self.per_block} wrote, with no barrier between")
        turn = self.block_turn[thread // self.per_block]
        stale = word[self.reader_block[word] != turn]
        self.reader_low[stale], self.reader_high[stale] = 1 << 60, -1
        self.reader_block[word], self.reader_warp[word] = turn, self.warp_turn[warp]
        np.minimum.at(self.reader_low, word, thread)
        np.maximum.at(self.reader_high, word, thread)

    def _write(self, word, thread, warp, changes, text):
        by_writer = self._clash(self.writer[word], self.writer[word], self.writer_block[word], self.writer_warp[word], thread, warp)
        readers = self.reader_high[word] >= 0
        by_reader = readers & self._clash(self.reader_low[word], self.reader_high[word], self.reader_block[word], self.reader_warp[word],
                                          thread, warp)
        clash = changes & (by_writer & self.written[word] | by_reader)
        if clash.any():
            n = int(np.flatnonzero(clash)[0])
            raise Fault(f"race: {text}: thread {thread[n] % self.per_block} writes byte {word[n] * self.WORD % self.nbytes} of shared memory, "
                        "which another thread used, with no barrier between")
        mine = changes | ~self.written[word]
        word, thread, warp = word[mine], thread[mine], warp[mine]
        self.written[word] = True
        self.writer[word], self.writer_block[word], self.writer_warp[word] = thread, self.block_turn[thread // self.per_block], self.warp_turn[warp]

    def _words(self, index: np.ndarray, size: int):
        for n in range(size // self.WORD):
            yield index // self.WORD + n

    def load(self, at, thread, dtype, count, text):
        size = np.dtype(dtype).itemsize
        index, warp = self._index(at, thread, size * count, text), self._warp(thread)
        for word in self._words(index, size * count):
            self._read(word, thread, warp, text)
        return [self.bytes.view(dtype)[index // size + n] for n in range(count)]

    def store(self, at, thread, values, dtype, text):
        size = np.dtype(dtype).itemsize
        index, warp = self._index(at, thread, size * len(values), text), self._warp(thread)
        data = np.stack([np.ascontiguousarray(v.astype(dtype, copy=False)) for v in values], axis=1).view(np.uint32).reshape(len(at), -1)
        self._put(index, data, thread, warp, text)

    def _put(self, index, data, thread, warp, text):
        memory = self.bytes.view(np.uint32)
        for n, word in enumerate(self._words(index, self.WORD * data.shape[1])):
            self._write(word, thread, warp, memory[word] != data[:, n], text)
            memory[word] = data[:, n]
            if not (memory[word] == data[:, n]).all():
                raise Fault(f"race: {text}: two threads write different values to one word of shared memory")

    # ---- copies that arrive later ----

    def promise(self, at, thread, size, text) -> np.ndarray:
        """A copy is on its way: until it arrives nobody may look, and whoever used the place before must be done."""
        index, warp = self._index(at, thread, size, text), self._warp(thread)
        for word in self._words(index, size):
            self._write(word, thread, warp, np.ones(len(word), bool), text)
            self.written[word] = False
        return index

    def arrive(self, index, data, thread, text) -> None:
        for word in self._words(index, 4 * data.shape[1]):
            self.written[word] = False
        self._put(index, data, thread, self._warp(thread), text)
