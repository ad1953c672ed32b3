"""Statistics about the inputs of every weight matrix, collected by running a model over a text: `collect` fills an Imatrix.

One pass serves all methods that need calibration. Each input is looked at once, however many matrices it multiplies (q, k and v
share one, gate and up another). Sums of squares are what encoders weight errors with (imatrix.py); sums of values, of magnitudes
and the largest magnitudes are kept beside them for methods that scale columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from pyggml.errors import Cancelled, PyggmlError
from pyggml.measure.chunks import Evaluator, split, tokenize
from pyggml.measure.perplexity import Perplexity
from pyggml.measure.scores import log_likelihood
from pyggml.model import Model
from pyggml.quantize.imatrix import Entry, Imatrix
from pyggml.sites import Site

OUTPUT = "output.weight"

# name in an Entry -> how a matrix of inputs (rows, columns) is summed up to (columns)
REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "in_sum2": lambda x: np.einsum("tc,tc->c", x, x),
    "in_sum": lambda x: x.sum(0),
    "in_abs": lambda x: np.abs(x).sum(0),
    "in_absmax": lambda x: np.abs(x).max(0),
}


class Collector:
    """Adds up what passes through a context that watches: `Context(model, watch=Collector(...))`.

    process_output: also the inputs of the output matrix, which encoders are better without.
    """

    def __init__(self, file: Any, *, process_output: bool = False) -> None:
        self.file, self.process_output = file, process_output
        self.entries: dict[str, Entry] = {}

    def wants(self, weight: str) -> bool:
        return weight.startswith("blk.") or self.process_output and weight == OUTPUT

    def __call__(self, site: Site, x: np.ndarray, ids: np.ndarray | None) -> None:
        names = [name for name in site.weights if self.wants(name)]
        if not names:
            return
        with np.errstate(all="ignore"):                 # what overflows is told of
            found = _reduce(x, ids, self.file[names[0]].shape)
        if not np.isfinite(found.stats["in_sum2"]).all():
            raise PyggmlError(f'{self.file.path}: the inputs of "{names[0]}" are not finite; the model is damaged, or its activations overflow')
        for name in names:
            if name in self.entries:
                self.entries[name].add(found, name)
            else:
                self.entries[name] = Entry(found.counts, dict(found.stats))


def _reduce(x: np.ndarray, ids: np.ndarray | None, shape: tuple[int, ...]) -> Entry:
    """The statistics of inputs x (T, columns), or of those that went to each expert: x (T, columns) or (T, used, columns), ids (T, used)."""
    if ids is None:
        return Entry(np.array([float(len(x))]), {key: f(x)[None].astype(np.float64) for key, f in REDUCTIONS.items()})
    n_experts = shape[0]
    counts = np.bincount(ids.reshape(-1), minlength=n_experts).astype(np.float64)
    stats = {key: np.zeros((n_experts, x.shape[-1])) for key in REDUCTIONS}
    for expert in np.flatnonzero(counts):
        t, u = np.nonzero(ids == expert)
        rows = x[t] if x.ndim == 2 else x[t, u]
        for key, f in REDUCTIONS.items():
            stats[key][expert] = f(rows)
    return Entry(counts, stats)


def collect(model: Model, text: str, *, dataset: str = "", n_ctx: int = 512, n_chunks: int = -1, skip_chunks: int = 0, parse_special: bool = False,
            process_output: bool = False, perplexity: bool = True, save: Callable[[Imatrix, int], None] | None = None,
            progress: Callable[[int, int, Perplexity | None], Any] | None = None, **options: Any) -> Imatrix:
    """Run the model over a text in chunks and return what its matrices have seen.

    dataset: the text's name, kept in the file. skip_chunks: chunks to leave out at the start. perplexity: also score the text.
    save(imatrix, chunks) is called after every group of chunks; progress(done, total, perplexity so far) may return False to cancel.
    """
    collector = Collector(model.file, process_output=process_output)
    tokens = tokenize(model, text, n_ctx, parse_special=parse_special)
    if len(tokens) < (skip_chunks + 2) * n_ctx:
        raise PyggmlError(f"the text has {len(tokens) // n_ctx} chunks; leaving out {skip_chunks} keeps too few; use more text or a smaller --chunk")
    chunks = split(tokens[skip_chunks * n_ctx:], n_ctx, n_chunks)
    evaluator = Evaluator(model, n_ctx, watch=collector, **options)
    imatrix = Imatrix(collector.entries, [os.fspath(dataset)] if dataset else [], 0, n_ctx)
    half = n_ctx // 2
    nll = np.empty((len(chunks), n_ctx - 1 - half))
    for group in evaluator.groups(chunks):
        logits = evaluator.logits(group, 0, last=True)          # every row, so that the last layer sees every token
        if perplexity:
            for i, target in enumerate(evaluator.targets(group, half)):
                nll[imatrix.n_chunks + i] = -log_likelihood(logits[i, half:n_ctx - 1], target)
        imatrix.n_chunks += len(group)
        if save is not None:
            save(imatrix, imatrix.n_chunks)
        so_far = Perplexity(nll[:imatrix.n_chunks].reshape(-1), imatrix.n_chunks) if perplexity else None
        if progress is not None and progress(imatrix.n_chunks, len(chunks), so_far) is False:
            raise Cancelled(f"stopped after {imatrix.n_chunks} of {len(chunks)} chunks")
    return imatrix
