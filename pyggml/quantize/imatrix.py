"""Importance matrices: for each weight matrix, the mean square of every input column over some text.

Two file formats of llama.cpp are read and written.

GGUF       general.type = "imatrix"; for a weight NAME the tensors
             NAME.in_sum2   (matrices, columns) F32: sums of squares of the inputs
             NAME.counts    (matrices, 1) F32: how many inputs were summed
           and, beside them, what llama.cpp ignores: NAME.in_sum, NAME.in_abs (sums of values and of magnitudes) and
           NAME.in_absmax (largest magnitudes), all (matrices, columns).
legacy     i32 entries, then for each: i32 length, name, i32 calls, i32 values, f32[values]: mean of squares times calls;
           then i32 chunks, i32 length, name of the text. No counts for the experts of a layer.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyggml import formats
from pyggml.errors import GGUFError, PyggmlError
from pyggml.formats import Typed, show, sniff
from pyggml.formats.atomic import replacing
from pyggml.formats.gguf import MAGIC
from pyggml.formats.source import local
from pyggml.formats.tensorfile import PIECE
from pyggml.formats.values import printable

SUMS, MAXIMA = ("in_sum2", "in_sum", "in_abs"), ("in_absmax",)
STATISTICS = (*SUMS, *MAXIMA)
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
INTEGERS = ("u32", "i32", "u64", "i64")


@dataclass
class Entry:
    """What is known about the inputs of one weight: counts float64 (matrices); statistics float64 (matrices, columns) by suffix."""

    counts: np.ndarray
    stats: dict[str, np.ndarray]

    @property
    def n_columns(self) -> int:
        return self.stats["in_sum2"].shape[1]

    def importance(self) -> np.ndarray:
        """Mean squares, float32 (matrices, columns); ones for an expert that no input reached."""
        reached = self.counts[:, None] > 0
        return np.where(reached, self.stats["in_sum2"] / np.where(reached, self.counts[:, None], 1), 1).astype(np.float32)

    def add(self, other: Entry, what: str) -> None:
        """Add the inputs that `other` has seen; statistics that only one of the two has are dropped."""
        if other.stats["in_sum2"].shape != self.stats["in_sum2"].shape:
            raise PyggmlError(f'{what} has {other.stats["in_sum2"].shape} columns for it, the others {self.stats["in_sum2"].shape}; '
                              "combine importance matrices of one model only")
        self.counts = self.counts + other.counts
        self.stats = {k: np.maximum(v, other.stats[k]) if k in MAXIMA else v + other.stats[k] for k, v in self.stats.items() if k in other.stats}


@dataclass
class Imatrix:
    """The importance matrices of a model and where they come from."""

    entries: dict[str, Entry] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    n_chunks: int = 0
    chunk_size: int = 0             # tokens in a chunk; 0 when the file does not say
    path: str = ""
    sha256: str = ""                # of the file it was read from

    def importance(self, name: str, shape: Sequence[int]) -> np.ndarray | None:
        """float32 (matrices, columns) for the weight `name` of this numpy shape, or None when nothing is known about it."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        n_matrices = int(np.prod(shape[:-2], dtype=np.int64)) if len(shape) > 2 else 1
        found = entry.importance()
        if found.size != n_matrices * shape[-1]:
            raise PyggmlError(f'{self.path or "imatrix"}: {found.size} values for the tensor "{name}", whose inputs need {n_matrices * shape[-1]}; '
                              "the importance matrix is of another model")
        return found.reshape(n_matrices, shape[-1])

    def filtered(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Imatrix:
        """Only the weights whose names contain one of `include` (all when empty) and none of `exclude`."""
        kept = {name: entry for name, entry in self.entries.items()
                if (not include or any(part in name for part in include)) and not any(part in name for part in exclude)}
        return Imatrix(kept, self.datasets, self.n_chunks, self.chunk_size, self.path, self.sha256)

    def merge(self, other: Imatrix) -> None:
        """Add another importance matrix of the same model."""
        for name, entry in other.entries.items():
            if name in self.entries:
                self.entries[name].add(entry, f'{other.path or "imatrix"}: tensor "{name}"')
            else:
                self.entries[name] = Entry(entry.counts.copy(), dict(entry.stats))
        self.datasets += other.datasets
        self.n_chunks += other.n_chunks
        self.chunk_size = self.chunk_size or other.chunk_size

    # ---- files --------------------------------------------------------------------------------------------------------------

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Imatrix:
        """Read either format. GGUFError or PyggmlError says what is wrong with the file."""
        source, digest = local(path), hashlib.sha256()
        head = bytes(source.head(64)[:64])
        if head.startswith(MAGIC):
            imatrix = _from_gguf(path)
        else:
            try:
                imatrix = _from_legacy(printable(source.name), source.head(source.size))
            except GGUFError:               # not before: the number of entries, which comes first, can be any bytes
                if what := sniff.foreign(head, source.size):
                    raise GGUFError(f"{printable(source.name)}: offset 0x0: this is {what}") from None
                raise
        for start in range(0, source.size, PIECE):
            digest.update(source.array(start, min(PIECE, source.size - start)).data)
        source.verify()
        imatrix.path, imatrix.sha256 = os.fspath(path), digest.hexdigest()
        return imatrix

    def save(self, path: str | os.PathLike[str], format: str = "gguf") -> None:
        """Write `gguf` or `dat`, whole or not at all."""
        if not self.entries:
            raise PyggmlError(f"{os.fspath(path)}: there is nothing to write: no matrix has seen any input; use more text")
        if format == "gguf":
            kv = {"general.type": Typed("str", "imatrix"), DATASETS: Typed("str[]", list(self.datasets)), CHUNKS: Typed("u32", self.n_chunks),
                  CHUNK_SIZE: Typed("u32", self.chunk_size)}
            tensors: dict[str, Any] = {}
            for name, entry in sorted(self.entries.items()):
                tensors[f"{name}.in_sum2"] = entry.stats["in_sum2"].astype(np.float32)
                tensors[f"{name}.counts"] = entry.counts.astype(np.float32)[:, None]
                tensors |= {f"{name}.{key}": v.astype(np.float32) for key, v in entry.stats.items() if key != "in_sum2"}
            formats.write(path, kv, tensors)
        elif format == "dat":
            data = self._legacy()
            with replacing(path, len(data)) as out:
                out.write(data)
        else:
            raise PyggmlError(f"imatrix format {format!r} is unknown; known are gguf and dat")

    def _legacy(self) -> bytes:
        parts = [struct.pack("<i", len(self.entries))]
        for name, entry in sorted(self.entries.items()):
            calls = -(-int(entry.counts.max()) // max(1, self.chunk_size))
            values = (entry.importance().reshape(-1) * np.float32(calls)).astype("<f4")
            text = name.encode()
            parts.append(struct.pack("<i", len(text)) + text + struct.pack("<ii", calls, values.size) + values.tobytes())
        text = (self.datasets[-1] if self.datasets else "").encode()
        return b"".join(parts) + struct.pack("<ii", self.n_chunks, len(text)) + text


def _from_gguf(path: str | os.PathLike[str]) -> Imatrix:
    file = formats.open(path, use_mmap=False)
    kind = file.kv.get("general.type")
    if not (isinstance(kind, str) and kind == "imatrix") and not any(name.endswith(".in_sum2") for name in file.tensors):
        raise PyggmlError(f"{os.fspath(path)}: this is a GGUF file but not an importance matrix; make one with `pyggml imatrix`")
    entries = {}
    for name, tensor in file.tensors.items():
        weight, _, suffix = name.rpartition(".")
        if suffix != "in_sum2":
            continue
        found = {key: _floats(file, f"{weight}.{key}") for key in STATISTICS if f"{weight}.{key}" in file.tensors}
        counts = _floats(file, f"{weight}.counts").reshape(-1)
        rows = tensor.size // tensor.shape[-1] if tensor.size and tensor.shape else 0
        if not rows or any(v.size != tensor.size for v in found.values()) or len(counts) not in (1, rows):
            raise PyggmlError(f'{os.fspath(path)}: the statistics of "{weight}" have no or different shapes; the file is damaged, collect it again')
        entries[weight] = Entry(np.broadcast_to(counts, rows).copy(), {key: v.reshape(rows, -1) for key, v in found.items()})
    return Imatrix(entries, list(_value(file, DATASETS, ("str[]",), [])), _value(file, CHUNKS, INTEGERS, 0), _value(file, CHUNK_SIZE, INTEGERS, 0))


def _value(file: formats.TensorFile, key: str, kinds: tuple[str, ...], default: Any) -> Any:
    """The value of a key that may be missing; PyggmlError when its type is none of `kinds`."""
    if key in file.kv and file.kv.type(key) not in kinds:
        raise PyggmlError(f'{file.path}: the key "{key}" is {show.text(file.kv[key])} ({file.kv.type(key)}); it must be {" or ".join(kinds)}')
    return file.kv.get(key, default)


def _as_f64(values: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):         # NaN is told of by its place
        return values.astype(np.float64)


def _floats(file: Any, name: str) -> np.ndarray:
    tensor = file[name]
    if tensor.type.name != "F32":
        raise PyggmlError(f'{file.path}: the tensor "{name}" is {tensor.type}; an importance matrix holds F32')
    values = _as_f64(tensor.numpy())
    wrong = np.flatnonzero(~np.isfinite(values) | (values < 0 if not name.endswith(".in_sum") else False))
    if len(wrong):
        raise GGUFError(f'{printable(file.path)}: offset 0x{tensor.offset + 4 * int(wrong[0]):x}: the tensor "{printable(name)}" holds '
                        f"{values.reshape(-1)[wrong[0]]}; collect the importance matrix again")
    return values


def _from_legacy(path: str, data: Any) -> Imatrix:
    """path: as it is shown; data: a buffer with all of the file, of which only what is needed is looked at."""
    at = 0

    def integer(what: str, low: int, high: int) -> int:
        nonlocal at
        if len(data) - at < 4:
            raise GGUFError(f"{path}: offset 0x{at:x}: the file ends before the {what}; it is cut short, or not an importance matrix")
        value = struct.unpack_from("<i", data, at)[0]
        if not low <= value <= high:
            raise GGUFError(f"{path}: offset 0x{at:x}: the {what} is {value}; the file is damaged, or not an importance matrix")
        at += 4
        return value

    entries: dict[str, Entry] = {}
    for _ in range(integer("number of entries", 1, 1 << 24)):
        size = integer("length of a name", 1, len(data) - at - 4)
        name = data[at:at + size].decode("utf-8", "surrogateescape")
        at += size
        shown = show.text(name)
        calls = integer(f'number of calls of "{shown}"', 0, (1 << 31) - 1)
        n = integer(f'number of values of "{shown}"', 1, (len(data) - at - 4) // 4)
        values = _as_f64(np.frombuffer(data, "<f4", n, at))
        wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if len(wrong):
            raise GGUFError(f'{path}: offset 0x{at + 4 * int(wrong[0]):x}: "{shown}" holds {values[wrong[0]]}, which no mean of squares is; '
                            "collect the importance matrix again")
        at += 4 * n
        entries[name] = Entry(np.array([float(max(1, calls))]), {"in_sum2": values[None]})
    imatrix = Imatrix(entries)
    if at < len(data):
        imatrix.n_chunks = integer("number of chunks", 0, (1 << 31) - 1)
        size = integer("length of the text's name", 0, len(data) - at - 4) if at < len(data) else 0
        imatrix.datasets = [data[at:at + size].decode("utf-8", "surrogateescape")] if size else []
    return imatrix


def statistics(imatrix: Imatrix) -> list[Mapping[str, Any]]:
    """A row for each weight: layer, tensor, and how its importance is spread over the columns, as `--show-statistics` prints them."""
    rows = []
    for name, entry in imatrix.entries.items():
        seen = entry.counts > 0
        if not seen.any():
            continue
        x = (entry.stats["in_sum2"][seen] / entry.counts[seen][:, None]).reshape(-1)
        total, deviation = x.sum(), x.std()
        p = x[x > 0] / total if total > 0 else np.ones(1)
        parts = name.split(".")
        layer = int(parts[1]) if parts[0] == "blk" and len(parts) > 2 and parts[1].isdigit() else -1
        above = imatrix.entries.get(name.replace(f"blk.{layer}.", f"blk.{layer - 1}.", 1)) if layer > 0 else None
        entropy = float(-(p * np.log2(p)).sum())
        rows.append({"layer": layer, "tensor": parts[-2] if len(parts) > 1 else name, "sum": total, "min": x.min(), "max": x.max(),
                     "mean": x.mean(), "deviation": deviation, "active": float((x > 1e-5).mean()), "n": x.size, "entropy": entropy,
                     "evenness": entropy / np.log2(x.size) if x.size > 1 else 1.0,
                     "outliers": float(((x - x.mean()) > deviation).mean()) if deviation > 0 else 0.0,
                     "likeness": _cosine(entry, above) if above is not None else 0.0})
    return sorted(rows, key=lambda r: (r["tensor"], -r["sum"]))


def _cosine(a: Entry, b: Entry) -> float:
    """How alike two entries are, from 0 to 1; 0 when their shapes differ."""
    x, y = a.stats["in_sum2"].reshape(-1), b.stats["in_sum2"].reshape(-1)
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if x.size == y.size and norms else 0.0
