"""What the weights of a model look like: for each tensor its spread, its outliers and a histogram.

Tensors are looked at side by side, a sample of rows of each, so that a survey takes seconds whatever the model's size.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pyggml.formats.tensorfile import OpaqueType, Tensor, TensorFile
from pyggml.quants import dequantize

SAMPLE = 1 << 18                                # weights of a tensor that are looked at
RANGE, BINS = 10.0, 200                         # the histogram: of weight / rms, from -RANGE to RANGE


@dataclass(frozen=True)
class Spread:
    """The weights of one tensor. Channels are the inputs (columns) that its rows multiply."""

    n: int                          # weights that were looked at
    bad: int                        # of them NaN or infinite: left out of the rest
    rms: float
    largest: float                  # magnitude
    where: tuple[int, int]          # row and column of the largest
    zeros: float                    # share of weights that are exactly 0
    channel: int                    # with the largest rms
    channel_ratio: float            # of its rms to the median channel's; NaN for vectors
    histogram: np.ndarray           # counts of BINS equal steps; what lies outside is in the first and last

    @property
    def outlier(self) -> float:
        """The largest weight in units of the rms; 2^18 of a normal distribution have 4.7."""
        return self.largest / self.rms if self.rms else math.nan


def survey(file: TensorFile, sample: int = SAMPLE) -> dict[str, Spread]:
    """The spread of every tensor whose type is known and that has weights."""
    tensors = [t for t in file.tensors.values() if t.size and not isinstance(t.type, OpaqueType)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = list(pool.map(lambda t: spread(t, sample), tensors))
    file.verify()
    return {t.name: s for t, s in zip(tensors, found, strict=True)}


def rows(t: Tensor, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and float32 weights (rows, columns): at most `sample` weights in rows evenly spaced over the tensor, in short tensors all.

    Of rows that are longer than that, the start.
    """
    assert not isinstance(t.type, OpaqueType)           # the caller has looked
    per_row = t.shape[-1] if t.shape else 1
    n_rows, columns = t.size // per_row, min(per_row, max(1, sample // t.type.block) * t.type.block)
    chosen = np.unique(np.linspace(0, n_rows - 1, min(n_rows, max(1, sample // columns))).astype(np.int64))
    row_bytes, part = t.type.row_bytes(per_row), t.type.row_bytes(columns)
    if len(chosen) == n_rows and columns == per_row:    # one read
        blocks = t.part(0, t.nbytes)
    else:
        blocks = np.concatenate([t.part(int(r) * row_bytes, part) for r in chosen])
    return chosen, dequantize(blocks.reshape(len(chosen), part), t.type, threads=1)


def spread(t: Tensor, sample: int = SAMPLE) -> Spread:
    """What about `sample` weights of a tensor look like."""
    numbers, x = rows(t, sample)
    sound = np.isfinite(x)
    bad = x.size - int(np.count_nonzero(sound))
    if bad:
        x = np.where(sound, x, np.float32(0))
    row, column = divmod(int(np.abs(x).argmax()), x.shape[1])
    squares = np.einsum("ij,ij->j", x, x, dtype=np.float64)
    rms = math.sqrt(float(squares.sum()) / max(1, x.size - bad))
    scaled = np.clip(x.reshape(-1) * np.float32(1 / rms if rms else 0), -RANGE, RANGE * (1 - 1e-6))
    counts = np.bincount(((scaled + np.float32(RANGE)) * np.float32(BINS / (2 * RANGE))).astype(np.int64), minlength=BINS)[:BINS]
    middle = float(np.median(squares))
    ratio = math.sqrt(float(squares.max()) / middle) if len(t.shape) > 1 and middle else math.nan
    zeros = (x.size - int(np.count_nonzero(x)) - bad) / max(1, x.size - bad)
    return Spread(x.size, bad, rms, abs(float(x[row, column])), (int(numbers[row]), column), zeros, int(squares.argmax()), ratio, counts)
