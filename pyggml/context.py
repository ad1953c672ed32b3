"""Running a model: one conversation with it, its cache, plans, prefill and decode.

A context asks the architecture for its graph once, plans it for two kinds of batch (a few tokens; a full batch), and from
then on a token costs a few stores into input arrays and one native call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np

from pyggml import native
from pyggml.arch.blocks import Builder
from pyggml.backends.placement import Place
from pyggml.cache import CacheTensor, KVCache, host_tensor
from pyggml.crew import Crew
from pyggml.errors import Cancelled, ContextOverflow, ParameterError, PyggmlError
from pyggml.graph import Tensor
from pyggml.model import Model
from pyggml.shapes import OUTPUTS, TOKENS
from pyggml.sites import Site, find_sites

log = logging.getLogger("pyggml")
MAX_CELLS, MAX_THREADS = 2**31 - 1, 1024        # a cell is an int32 for the kernels; a pool beyond any machine is a slip of the pen


@cache
def tell_slow() -> None:
    """Say once that the kernels are missing, and why."""
    log.warning("no native kernels (%s): computing with numpy, which is slow; install a C compiler and reinstall pyggml", native.why_missing)


class Context:
    """One sequence of tokens with its cache. Not for two threads at once; `cancel` may come from anywhere.

    n_ctx       tokens it holds; 0 takes the model's training context
    n_batch     longest piece that `eval` takes at once (longer input is cut into such pieces)
    n_ubatch    tokens that one native call computes
    n_threads_batch     threads where there is more than one token at a time (None: n_threads)
    place       the processors of each of a number of threads (see backends/placement.py)
    exact       decoded weights, float activations: the definition of the model, slow
    deterministic   a token's logits have the same bits however the tokens before it were batched, with any number of threads, packed
                or not and wherever in the cache its sequence lies (on one instruction set)
    watch       called after every batch with each input of a matrix product and its values (see sites.py)
    n_gpu_layers    layers on a GPU, counted from the end with the output as one more (see offload.py): a number, "all" (or -1), or
                "auto" for as many as fit, where there is a GPU
    device, main_gpu    which GPU: "cuda0", "none", or its number

    Set `greedy` when the next token is always the one with the largest logit: a GPU then goes on without being asked.
    """

    def __init__(self, model: Model, *, n_ctx: int = 512, n_batch: int = 2048, n_ubatch: int = 512, n_threads: int | None = None,
                 n_threads_batch: int | None = None, place: Place | None = None, type_k: str = "F16",
                 type_v: str = "F16", repack: bool = True, exact: bool = False, deterministic: bool = False, timing: bool = False,
                 watch: Callable[[Site, np.ndarray, np.ndarray | None], None] | None = None, n_gpu_layers: int | str = 0,
                 device: str | None = None, main_gpu: int = 0) -> None:
        for name, value, low, high in (("n_ctx", n_ctx, 0, MAX_CELLS), ("n_batch", n_batch, 1, MAX_CELLS), ("n_ubatch", n_ubatch, 1, MAX_CELLS),
                                       ("n_threads", 1 if n_threads is None else n_threads, 1, MAX_THREADS),
                                       ("n_threads_batch", 1 if n_threads_batch is None else n_threads_batch, 1, MAX_THREADS)):
            if not low <= value <= high:
                raise ParameterError(f"{name} is {value}; it must be from {low} to {high}")
        c = model.config
        self.model = model
        self.n_ctx = n_ctx or c.n_ctx_train
        self.n_batch, self.n_ubatch = n_batch, min(n_ubatch, n_batch, self.n_ctx)
        self.n_past = 0
        self.greedy = False
        self._cache_types = type_k, type_v
        self._repack, self._exact, self._fixed, self._timing, self._watch = repack, exact, deterministic, timing, watch
        self._plans: dict[tuple[int, int], Any] = {}
        self._cancelled = False
        if native.lib is None:
            if deterministic:
                raise ParameterError(f"deterministic=True needs the native kernels, which are missing ({native.why_missing}); leave it out")
            tell_slow()
            self.pool = None
        else:
            from pyggml.backends.cpu import Pool

            self.pool = Pool(n_threads, place)
            self._batch_pool = self.pool if n_threads_batch in (None, self.pool.n_threads) else Pool(n_threads_batch, place)
        self._gpu = self._share(n_gpu_layers, device, main_gpu)
        self.cache = self._new_cache(host_tensor if self._gpu is None else self._gpu.cache_tensor)
        self._crew = Crew(n_threads is None and self.pool is not None and self.pool.n_threads > 1 and model.nbytes < Crew.SMALL_MODEL)
        # single tokens take the short way, `_follow`
        self._follows = self.pool is not None and self._gpu is None and watch is None and not timing
        self._one: Any = None
        self._logits = np.empty((0, model.n_vocab), np.float32)

    def _new_cache(self, new: Callable[..., Any]) -> KVCache:
        c = self.model.config
        return KVCache(c.n_layers, list(c.n_kv), c.head_dim, c.head_dim_v, self.n_ctx, *self._cache_types, new)

    def _share(self, n_gpu_layers: int | str, device: str | None, main_gpu: int) -> Any:
        """What a GPU computes (offload.Share), or None."""
        if n_gpu_layers == 0:
            return None
        from pyggml import offload

        if native.lib is None or self._exact or self._fixed:
            if offload.count(n_gpu_layers) is None:
                return None
            asked = "exact" if self._exact else "deterministic" if self._fixed else ""
            why = f"{asked}=True computes on the CPU" if asked else f"the native kernels are missing ({native.why_missing})"
            raise ParameterError(f"n_gpu_layers={n_gpu_layers} is not possible, as {why}; use 0")

        def build() -> Any:
            cache = self._new_cache(lambda layer, name, type, shape: CacheTensor(name, type, shape, np.empty(0, np.uint8)))
            builder = Builder(self.model.file, self.model.config, cache, self.n_ctx)
            return offload.Graph(self.model.graph(builder), builder.entering, cache.keys, cache.values, self.n_ubatch)

        return offload.choose(n_gpu_layers, device, main_gpu, build, self.model.weights_on)

    @property
    def gpu_layers(self) -> int:
        """Layers on a GPU, with the output as one more."""
        return 0 if self._gpu is None else self._gpu.forecast.layers

    def copy_bandwidth(self) -> float:
        """Bytes a second that the GPU at work reads and writes when it copies, measured now; 0 without one."""
        return 0.0 if self._gpu is None else self._gpu.device.copy_bandwidth()

    # ---- plans ---------------------------------------------------------------------------------------------------------------

    @cached_property
    def _graph(self) -> tuple[Tensor, Builder]:
        builder = Builder(self.model.file, self.model.config, self.cache, self.n_ctx)
        return self.model.graph(builder), builder

    @property
    def output(self) -> Tensor:
        """The logits node of this model's graph."""
        return self._graph[0]

    @cached_property
    def _sites(self) -> list[Site]:
        return find_sites(self.output) if self._watch is not None else []

    @property
    def _captured_nodes(self) -> list[Tensor]:
        return list({id(t): t for site in self._sites for t in (site.x, site.ids) if t is not None}.values())

    def _tell(self, values: Sequence[np.ndarray], sizes: dict[Any, int]) -> None:
        """Call `watch` with the values of every site, cut to this batch."""
        by_node = {id(t): v[:sizes[t.shape[0]]] for t, v in zip(self._captured_nodes, values, strict=True)}
        for site in self._sites:
            self._watch(site, by_node[id(site.x)], by_node[id(site.ids)] if site.ids is not None else None)  # type: ignore[misc]

    def plan(self, n_tokens: int, n_outputs: int) -> Any:
        """The plan for a batch of this size: small batches, batches with few logits, batches with all of them."""
        from pyggml.plan import SMALL

        if self._gpu is not None:
            from pyggml.offload import sizes

            limits = sizes(n_tokens, n_outputs, self.n_ubatch)
        else:
            limits = (SMALL, SMALL) if n_tokens <= SMALL else (self.n_ubatch, SMALL if n_outputs <= SMALL else self.n_ubatch)
        if limits not in self._plans:
            self._plans[limits] = self._new_plan({TOKENS: limits[0], OUTPUTS: limits[1]})
        return self._plans[limits]

    def _new_plan(self, limits: dict[Any, int]) -> Any:
        from pyggml.plan import Plan

        nodes = self._captured_nodes
        if self._gpu is not None and self._gpu.whole:
            return Plan(self.output, self._gpu.store, limits, self._timing, nodes)
        store = self.model.weights(repack=self._repack, exact=self._exact)
        if self._gpu is None:
            return Plan(self.output, store, limits, self._timing, nodes, self._fixed)
        from pyggml.offload import chain

        return chain(self.output, self._graph[1].entering[self._gpu.first], nodes, (store, self._gpu.store), limits, self._timing)

    @cached_property
    def _reference(self) -> Any:
        from pyggml.backends.reference import ReferencePlan

        return ReferencePlan([self.output, *self._captured_nodes])

    # ---- evaluation -----------------------------------------------------------------------------------------------------------

    def eval(self, tokens: Sequence[int] | np.ndarray, logits: str = "last") -> np.ndarray:
        """Append `tokens` and compute. Returns float32 logits (rows, n_vocab), a view that the next call overwrites.

        logits: "last" (one row, after the last token), "all" (a row for each token) or "none".
        Raises ContextOverflow when they do not fit, PyggmlError for an id outside the vocabulary, Cancelled after `cancel()`.
        Whatever ends it early, none of the tokens were appended.
        """
        if self._follows and len(tokens) == 1 and logits in ("last", "all") and isinstance(tokens[0], (int, np.integer)):
            token = int(tokens[0])
            if 0 <= token < self.model.n_vocab and self.n_past < self.n_ctx and not self._crew.trials_left:
                return self._follow(token)
        ids = np.asarray(tokens, np.int64).reshape(-1)
        if logits not in ("last", "all", "none"):
            raise PyggmlError(f"logits is {logits!r}; it must be last, all or none")
        if self.n_past + len(ids) > self.n_ctx:
            raise ContextOverflow(f"{self.n_past} + {len(ids)} tokens do not fit into the context of {self.n_ctx}; use a larger one (-c)")
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.model.n_vocab:
            bad = ids[(ids < 0) | (ids >= self.model.n_vocab)][0]
            raise PyggmlError(f"token {bad} is outside the vocabulary of {self.model.n_vocab}")
        self._cancelled = False
        rows = []
        start = self.n_past
        try:
            for at in range(0, len(ids), self.n_ubatch):
                piece = ids[at:at + self.n_ubatch]
                n = len(piece)
                wanted = range(n) if logits == "all" else [n - 1] if logits == "last" and at + n == len(ids) else []
                out = self._run(piece, wanted)
                if self._cancelled:
                    raise Cancelled(f"stopped after {at} of {len(ids)} tokens")
                self.n_past += n
                if len(wanted):
                    rows.append(out)
                    if at + n < len(ids):
                        rows[-1] = out.copy()
        except BaseException:           # Ctrl-C too: the caller does not know which tokens are in the cache
            self.n_past = start
            raise
        self._logits = rows[0] if len(rows) == 1 else np.concatenate(rows) if rows else self._logits[:0]
        return self._logits

    def _follow(self, token: int) -> np.ndarray:
        """`eval` of one token on the CPU, by the shortest way."""
        if self._one is None:
            plan = self.plan(1, 1)
            self._one = plan.program.token_by_token(plan.inputs, [symbol.slot for symbol in (TOKENS, OUTPUTS)]), plan.output[:1]
        one, row = self._one
        self._cancelled = False
        one.run(self.pool, token, self.n_past, self._crew.alone)
        self.model.file.verify()
        if self._cancelled:
            raise Cancelled("stopped before the token was done")
        self.n_past += 1
        return row

    def sequences(self, tokens: np.ndarray, start: int, wanted: Sequence[int]) -> np.ndarray:
        """Evaluate the tokens start..start+n of several independent sequences at once: tokens (sequences, n) -> logits (rows, n_vocab).

        Sequence s lives in its own share of the context, n_ctx // sequences tokens long. wanted: which of the n tokens of each
        sequence get a row of logits. The view is overwritten by the next call; Cancelled after `cancel()`.
        """
        count, n = tokens.shape
        share = self.n_ctx // count
        if start + n > share or tokens.size > self.n_ubatch:
            raise ContextOverflow(f"{count} sequences of {start + n} tokens do not fit into {self.n_ctx} cells and batches of {self.n_ubatch}")
        pos = np.tile(np.arange(start, start + n), count)
        first = np.repeat(np.arange(count) * share, n)
        rows = (np.arange(count)[:, None] * n + np.asarray(wanted, np.int64)).reshape(-1)
        self._cancelled = False
        out = self._batch(tokens.reshape(-1), pos, first + pos, first, rows)
        if self._cancelled:
            raise Cancelled(f"stopped in tokens {start} to {start + n}")
        return out

    def _run(self, ids: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
        """The tokens that follow n_past."""
        if self.greedy and self._gpu is not None and len(ids) == len(wanted) == 1 and self._watch is None:
            row = self.plan(1, 1).row(int(ids[0]), self.n_past)
            if row is not None:
                return row[None]
        cells = self.n_past if len(ids) == 1 else np.arange(self.n_past, self.n_past + len(ids))
        return self._batch(ids, cells, cells, 0, wanted)

    def _batch(self, ids: np.ndarray, pos: Any, cell: Any, first: Any, wanted: Any) -> np.ndarray:
        """Token i at position pos[i] is stored in cell[i] and sees the cells first[i]..cell[i]; one native call."""
        n, m = len(ids), len(wanted)
        sizes = {TOKENS: n, OUTPUTS: m}
        given = {"tokens": ids, "pos": pos, "cell": cell, "first": first, "wanted": wanted}
        if self.pool is None:
            out, *captured = self._reference.run({k: np.broadcast_to(np.asarray(v, np.int32), m if k == "wanted" else n) for k, v in given.items()})
            self._tell(captured, sizes)
            return out
        self._forget_ahead()
        plan = self.plan(n, m)
        plan.fill(given, {name: m if name == "wanted" else n for name in given})
        plan.abort(self._cancelled)
        if n == 1 and self._gpu is None:
            self._crew.run(lambda alone: plan.run(self.pool, sizes, alone))
        else:
            plan.run(self._batch_pool, sizes)
        self.model.file.verify()
        if self._watch is not None and not self._cancelled:
            self._tell(plan.captured, sizes)
        return plan.output[:m]

    def cancel(self) -> None:
        """Stop the running evaluation within milliseconds; callable from a signal handler or another thread."""
        self._cancelled = True
        for plan in self._plans.values():
            plan.abort(True)

    def truncate(self, n: int) -> None:
        """Keep the first `n` tokens."""
        if not 0 <= n <= self.n_past:
            raise PyggmlError(f"cannot keep {n} tokens of {self.n_past}")
        self.n_past = n

    def _forget_ahead(self) -> None:
        """What a GPU computed ahead rests on the cache as it was."""
        if self._gpu is not None:
            for plan in self._plans.values():
                plan.stop()

    def reset(self) -> None:
        self.n_past = 0

    def save(self) -> list[np.ndarray]:
        """The cache of the tokens so far, for `restore`."""
        return self.cache.copy(self.n_past)

    def restore(self, saved: list[np.ndarray]) -> None:
        """Go back to what `save` returned, here or in another context of the same model with the same cache types."""
        n = saved[0].shape[1]
        if n > self.n_ctx:
            raise ContextOverflow(f"the saved {n} tokens do not fit into the context of {self.n_ctx}; use a larger one (-c)")
        self._forget_ahead()
        self.cache.put(saved)
        self.n_past = n

    def op_times(self) -> list[Any]:
        """Every step's plan.StepTime, when made with timing=True."""
        return [row for plan in self._plans.values() for row in plan.op_times()]
