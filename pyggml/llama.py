"""`Llama`: the high-level class, with the names that users of llama-cpp-python know.

    llm = Llama("model.gguf", n_ctx=2048)
    llm("Once upon a time", max_tokens=64)["choices"][0]["text"]

What pyggml has no use for is refused in a sentence unless it has its default value: nothing is silently ignored.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml import completion, formats, tokenizers
from pyggml.answers import ChatAnswer, TextAnswer
from pyggml.arguments import (
    CHAT,
    CONSTRUCTOR,
    NO_EFFECT,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    one_callable,
    refuse,
    sampling_params,
    token_ids,
    whole,
)
from pyggml.context import Context
from pyggml.errors import ContextOverflow, ParameterError
from pyggml.model import Model
from pyggml.sampling import RANDOM_SEED, Sampler, SamplingParams
from pyggml.speculate import DraftModel, OtherDrafts, PromptLookup, Speculation
from pyggml.types import tensor_type


@dataclass(frozen=True)
class LlamaState:
    """What `save_state` keeps."""

    input_ids: np.ndarray           # int32 (n)
    cache: list[np.ndarray]         # the cells of these tokens
    row: np.ndarray | None          # logits after the newest token, float32 (n_vocab)
    scores: np.ndarray | None       # with `logits_all` those after every token, float32 (n, n_vocab)


class Llama:
    """A model with one context. Arguments are llama_cpp.Llama's; `n_ctx` 0 takes the model's training context.

    logits_all keeps the logits of every position in `scores`; log-probabilities do not need it. draft_model guesses tokens for the
    model to check several at once (see pyggml/speculate.py), which changes the speed and not what is generated: a PromptLookup, a
    smaller model's file, or a callable from token ids to token ids. deterministic: the same bits for any number of threads and batches.
    n_gpu_layers: layers on a GPU, -1 or "all" for all of them, "auto" for as many as fit; device: "cuda0", ..., instead of the number
    main_gpu.
    """

    def __init__(self, model_path: str | os.PathLike[str], *, n_ctx: int = 512, n_batch: int = 512, n_ubatch: int = 512,
                 n_threads: int | None = None, n_threads_batch: int | None = None, seed: int = RANDOM_SEED, logits_all: bool = False,
                 vocab_only: bool = False, use_mmap: bool = True, use_mlock: bool = False, last_n_tokens_size: int = 64,
                 type_k: int | str | None = None, type_v: int | str | None = None, draft_model: Any = None, deterministic: bool = False,
                 n_gpu_layers: int | str = 0, main_gpu: int = 0, device: str | None = None, verbose: bool = False, **others: Any) -> None:
        self._arguments = {k: v for k, v in locals().items() if k not in ("self", "others")} | others
        refuse({k: v for k, v in others.items() if k not in NO_EFFECT}, CONSTRUCTOR, "Llama()")
        self.model_path, self.verbose = os.fspath(model_path), verbose
        self._last_n = last_n_tokens_size
        self.set_seed(seed)
        self._model: Any = None
        self._context: Any = None
        if vocab_only:
            self._file = formats.open(model_path, use_mmap=use_mmap)
            self._tokenizer = tokenizers.load(self._file.kv, self._file.path)
        else:
            self._model = Model.load(model_path, use_mmap=use_mmap, use_mlock=use_mlock)
            self._file, self._tokenizer = self._model.file, self._model.tokenizer
        self._pieces = completion.Pieces(self._tokenizer)
        if vocab_only:
            return
        self._context = Context(self._model, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=min(n_ubatch, n_batch), n_threads=n_threads,
                                n_threads_batch=n_threads_batch, type_k=_type_name(type_k), type_v=_type_name(type_v),
                                deterministic=deterministic, n_gpu_layers=n_gpu_layers, main_gpu=main_gpu, device=device)
        self.n_batch = n_batch
        self.input_ids = np.zeros(self._context.n_ctx, np.int32)
        if draft_model is not None:
            self._context = Speculation(self._context, self._drafter(draft_model, n_threads, n_threads_batch), ids=self.input_ids)
        self._all_scores = np.zeros((self._context.n_ctx, self.n_vocab()), np.float32) if logits_all else None
        self._row: np.ndarray | None = None         # logits after the newest token, float32 (n_vocab)
        self._sampler: Sampler | None = None
        if verbose:
            print(f"{self.model_path}: {self._model.describe()}, context {self.n_ctx()}", file=sys.stderr)

    def _drafter(self, draft_model: Any, n_threads: int | None, n_threads_batch: int | None) -> Any:
        if isinstance(draft_model, (str, os.PathLike)):
            drafter = DraftModel(Context(Model.load(draft_model), n_ctx=self._context.n_ctx, n_threads=n_threads,
                                         n_threads_batch=n_threads_batch))
            drafter.check(self._model)
            return drafter
        if not callable(draft_model):
            raise ParameterError(f"draft_model={draft_model!r} is not a PromptLookup, a model file or a callable from token ids to token ids")
        return draft_model if isinstance(draft_model, PromptLookup) else OtherDrafts(draft_model, self._model.n_vocab)

    # ---- facts ----

    @property
    def metadata(self) -> dict[str, str]:
        """The file's scalar metadata as strings."""
        def text(value: Any) -> str:
            return str(value).lower() if isinstance(value, bool) else f"{value:.6f}" if isinstance(value, float) else str(value)

        return {key: text(value) for key, value in self._file.kv.items() if isinstance(value, (str, bool, int, float))}

    def n_ctx(self) -> int:
        return self._ctx.n_ctx

    def n_vocab(self) -> int:
        return self._model.n_vocab if self._model is not None else self._tokenizer.n_vocab

    def n_embd(self) -> int:
        return int(self._file.kv[f"{self._file.kv['general.architecture']}.embedding_length"])

    def token_bos(self) -> int:
        """The id of the token that begins a text, -1 where the vocabulary has none; likewise the two below."""
        return _id(self._tokenizer.bos)

    def token_eos(self) -> int:
        return _id(self._tokenizer.eos)

    def token_nl(self) -> int:
        return _id(self._tokenizer.nl)

    def tokenizer(self) -> Any:
        return self._tokenizer

    # ---- text and tokens ----

    def tokenize(self, text: bytes | str, add_bos: bool = True, special: bool = False) -> list[int]:
        """Ids of a text. special: texts of control tokens become those tokens."""
        return self._tokenizer.encode(text, add_special=add_bos, parse_special=special)

    def detokenize(self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False) -> bytes:
        """Bytes of tokens; control tokens only when `special` is set. The space that a vocabulary puts before a text goes when the
        tokens begin with bos. `prev_tokens`, where a continuation follows them, keeps that space."""
        pieces = [self._tokenizer.piece(t) if special else self._pieces.bytes(t) for t in tokens]
        text = b"".join(pieces)
        return text[1:] if len(tokens) and tokens[0] == self.token_bos() and not prev_tokens and text[:1] == b" " else text

    # ---- evaluation ----

    @property
    def _ctx(self) -> Any:
        if self._context is None:
            raise ParameterError(f"{self.model_path} was opened with vocab_only=True or is closed; open it again to run it")
        return self._context

    @property
    def n_tokens(self) -> int:
        """Tokens in the cache. Setting a smaller number forgets the others."""
        return self._ctx.n_past

    @n_tokens.setter
    def n_tokens(self, n: int) -> None:
        if n != self._ctx.n_past:
            self._row = None
        self._ctx.truncate(n)

    @property
    def scores(self) -> np.ndarray:
        """Logits, float32: with `logits_all` (n_ctx, n_vocab), row i after token i; otherwise (1, n_vocab), after the newest token."""
        return self._newest()[None] if self._all_scores is None else self._all_scores

    @property
    def eval_tokens(self) -> list[int]:
        return self.input_ids[:self.n_tokens].tolist()

    @property
    def eval_logits(self) -> np.ndarray:
        """The rows of `scores` that belong to a token in the cache."""
        return self.scores[:self.n_tokens]

    def reset(self) -> None:
        """Forget every token."""
        self._ctx.reset()
        self._row = None

    def eval(self, tokens: Sequence[int]) -> None:
        """Append tokens and compute `scores`. ContextOverflow names both sizes when they do not fit."""
        if self.n_tokens + len(tokens) > self.n_ctx():
            raise ContextOverflow(f"{self.n_tokens} + {len(tokens)} tokens do not fit into the context of {self.n_ctx()}; make it larger with n_ctx")
        for at in range(0, len(tokens), self.n_batch):
            self._append(tokens[at:at + self.n_batch], every=self._all_scores is not None)

    def _append(self, tokens: Sequence[int], every: bool) -> np.ndarray:
        """Append one batch. Returns logits after each token (`every`) or after the last, float32 (rows, n_vocab); the next call overwrites them."""
        start, self._row = self.n_tokens, None
        rows = self._ctx.eval(tokens, logits="all" if every else "last")
        self.input_ids[start:start + len(tokens)] = tokens
        if self._all_scores is not None:
            self._all_scores[start:start + len(tokens)] = rows
        self._row = rows[-1]
        return rows

    def _newest(self) -> np.ndarray:
        """Logits after the newest token, float32 (n_vocab)."""
        if self._row is None:
            raise ParameterError("there are no logits; call eval() with at least one token first")
        return self._row

    # ---- sampling ----

    def set_seed(self, seed: int) -> None:
        self._seed = seed

    def _sampling(self, seed: int | None = None, **sampling: Any) -> SamplingParams:
        return sampling_params(self._seed if seed is None else seed, self._last_n, **sampling)

    def _processed(self, processor: LogitsProcessor | None, row: np.ndarray) -> np.ndarray:
        return row if processor is None else np.asarray(processor(self.input_ids[:self.n_tokens], row.copy()), np.float32)

    def sample(self, *, idx: int | None = None, logits_processor: LogitsProcessor | None = None, **sampling: Any) -> int:
        """A token from the newest logits, or from row `idx` of `scores`. The same arguments go on with the same random numbers."""
        params = self._sampling(**sampling)
        if self._sampler is None or self._sampler.params != params:
            self._sampler = Sampler(params, self.model_path)
        self._sampler.forget()
        self._sampler.accept(*self.eval_tokens)
        row = self._newest() if idx is None else self.scores[idx]
        return self._sampler.sample(self._processed(one_callable(logits_processor, LogitsProcessorList), row))

    def generate(self, tokens: Sequence[int], *, reset: bool = True, logits_processor: LogitsProcessor | None = None,
                 stopping_criteria: StoppingCriteria | None = None, **sampling: Any) -> Generator[int, Sequence[int] | None, None]:
        """Tokens that continue `tokens`, without end (the context's end raises ContextOverflow); `send` appends tokens of your own.

        What the cache has in common with `tokens` is not computed again. reset=False appends to the cache instead.
        """
        sampler = Sampler(self._sampling(**sampling), self.model_path)
        return self._generate(list(tokens), reset, sampler, one_callable(logits_processor, LogitsProcessorList),
                              one_callable(stopping_criteria, StoppingCriteriaList))

    def _generate(self, tokens: list[int], reset: bool, sampler: Sampler, processor: LogitsProcessor | None,
                  stopping: StoppingCriteria | None) -> Generator[int, Sequence[int] | None, None]:
        sampler.accept(*tokens)
        ahead = self._ctx if isinstance(self._ctx, Speculation) else None
        if ahead is not None:
            ahead.use(sampler.params)
        else:
            self._ctx.greedy = sampler.params.plain and processor is None
        if reset:
            tokens = tokens[self._reuse(tokens):]
        while True:
            if tokens:
                self.eval(tokens)
            row = self._newest()
            ready = self._processed(processor, row)
            token = sampler.sample(ready) if ahead is None else ahead.choose(sampler, ready)
            if stopping is not None and stopping(self.input_ids[:self.n_tokens], row):
                return
            more = yield token
            tokens = [token, *(more or ())]
            sampler.accept(*tokens)

    def _reuse(self, tokens: list[int]) -> int:
        """Cut the cache back to what it has in common with `tokens`; returns how many tokens that is.

        The last token is computed again unless its logits are still there.
        """
        n = min(self.n_tokens, len(tokens))
        differs = np.flatnonzero(self.input_ids[:n] != np.asarray(tokens[:n], np.int32))
        common = int(differs[0]) if differs.size else n
        if common == len(tokens) and (self._row is None or common < self.n_tokens):
            common = max(0, common - 1)
        self.n_tokens = common
        return common

    # ---- completion ----

    def create_completion(self, prompt: str | Sequence[int], suffix: str | None = None, max_tokens: int | None = 16,
                          temperature: float = 0.8, *, logprobs: int | None = None, echo: bool = False, stop: str | Sequence[str] | None = (),
                          stream: bool = False, seed: int | None = None, model: str | None = None, logits_processor: LogitsProcessor | None = None,
                          stopping_criteria: StoppingCriteria | None = None, **sampling: Any) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Continue `prompt` (text or tokens): a dict as of the OpenAI completions API, or its chunks with `stream`.

        max_tokens: None or 0 goes on until the context is full; finish_reason "length" says that a limit ended the text.
        logprobs: for each token the log-probabilities of it and of so many alternatives; with `echo` for the prompt too.
        sampling: top_k, top_p, min_p, typical_p, repeat_penalty, frequency_penalty, presence_penalty, mirostat_mode, mirostat_tau,
        mirostat_eta, logit_bias.
        """
        if suffix is not None:
            raise ParameterError("suffix is not supported: pyggml continues texts and does not fill gaps; leave it out")
        tokens = self.tokenize(prompt, special=True) if isinstance(prompt, str) else token_ids(prompt)
        text = prompt if isinstance(prompt, str) else self.detokenize(tokens).decode("utf-8", "replace")
        return self._complete(TextAnswer(model or self.model_path, logprobs is not None), tokens, text, echo, max_tokens, logprobs, stop, stream,
                              logits_processor, stopping_criteria, self._sampling(seed, temp=temperature, **sampling))

    __call__ = create_completion

    def create_chat_completion(self, messages: Sequence[Mapping[str, Any]], *, temperature: float = 0.2, max_tokens: int | None = None,
                               logprobs: bool | None = None, top_logprobs: int | None = None, stop: str | Sequence[str] | None = (),
                               stream: bool = False, seed: int | None = None, model: str | None = None,
                               logits_processor: LogitsProcessor | None = None, **others: Any) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Answer the last of `messages` ({"role": ..., "content": ...}): a dict as of the OpenAI chat API, or its chunks with `stream`.

        The prompt is what the model file's chat template makes of the messages. others: sampling arguments as for completions.
        """
        from pyggml.chat import chat_template

        refuse({name: value for name, value in others.items() if name in CHAT}, CHAT, "create_chat_completion()")
        sampling = self._sampling(seed, temp=temperature, **{name: value for name, value in others.items() if name not in CHAT})
        prompt = chat_template(self._file.kv, self._tokenizer).render(messages)
        tokens = self.tokenize(prompt, add_bos=False, special=True)
        first = self.tokenize("")
        if tokens[:len(first)] != first:            # many templates write the token that begins a text themselves
            tokens = first + tokens
        n_top = (top_logprobs or 0) if logprobs else None
        return self._complete(ChatAnswer(model or self.model_path, n_top), tokens, "", False, max_tokens, n_top, stop, stream,
                              logits_processor, None, sampling)

    def _complete(self, answer: TextAnswer | ChatAnswer, tokens: list[int], text: str, echo: bool, max_tokens: int | None, logprobs: int | None,
                  stop: str | Sequence[str] | None, stream: bool, processor: LogitsProcessor | None, criteria: StoppingCriteria | None,
                  sampling: SamplingParams) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Complete `tokens`, which are `text`, into `answer`. Whatever is wrong with the request is raised here, before a stream begins."""
        if not tokens:
            if self._tokenizer.bos is None:
                raise ParameterError("the prompt is empty, and the vocabulary has no token to begin with; give it some text")
            tokens = [self._tokenizer.bos]
        most = 0 if max_tokens is None else whole("max_tokens", max_tokens)
        room = self.n_ctx() - len(tokens)
        if room <= 0:
            raise ContextOverflow(f"the prompt of {len(tokens)} tokens leaves no room in the context of {self.n_ctx()}; make it larger with n_ctx")
        if logprobs is not None and not 0 <= whole("logprobs", logprobs) <= self.n_vocab():
            raise ParameterError(f"logprobs={logprobs} is out of range; use 0 to {self.n_vocab()}")
        generator = self._generate(tokens, True, Sampler(sampling, self.model_path), one_callable(processor, LogitsProcessorList),
                                   one_callable(criteria, StoppingCriteriaList))
        generated = completion.parts(((token, self._newest()) for token in generator), self._pieces, self._tokenizer.eog,
                                     completion.stop_strings(stop), min(room, most) if most > 0 else room,
                                     logprobs, len(text))
        parts = itertools.chain(self._echo(tokens, text, logprobs), generated) if echo else generated
        return answer.stream(parts) if stream else answer.whole(completion.join(parts), len(tokens))

    def _echo(self, tokens: list[int], text: str, logprobs: int | None) -> Iterator[completion.Part]:
        """The prompt as a part of the answer."""
        yield completion.Part(text, [] if logprobs is None else self._prompt_logprobs(tokens, logprobs, len(text)))

    def _prompt_logprobs(self, tokens: list[int], n: int, end: int) -> list[completion.TokenLogprobs]:
        """Entries for a prompt of `end` characters, whose logits are computed for this; the cache then holds the prompt."""
        self.reset()
        rows = (row for at in range(0, len(tokens), self.n_batch) for row in self._append(tokens[at:at + self.n_batch], every=True))
        return completion.prompt_logprobs(self._pieces, tokens, rows, n, end)

    # ---- states ----

    def save_state(self) -> LlamaState:
        """The tokens so far with their cache and the newest logits."""
        return LlamaState(self.input_ids[:self.n_tokens].copy(), self._ctx.save(), None if self._row is None else self._row.copy(),
                          None if self._all_scores is None else self._all_scores[:self.n_tokens].copy())

    def load_state(self, state: LlamaState) -> None:
        """Go back to a saved state, which may come from another Llama of the same model and cache types. `scores` that one without
        `logits_all` did not keep are NaN."""
        self._ctx.restore(state.cache)
        if self._all_scores is not None:
            self._all_scores[:len(state.input_ids)] = np.nan if state.scores is None else state.scores
        self.input_ids[:len(state.input_ids)] = state.input_ids
        self._row = state.row

    def close(self) -> None:
        """Let go of the model and its memory."""
        self._context = self._model = self._row = self._all_scores = None

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self._arguments, "state": self.save_state() if self._context is not None else None}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__init__(**saved["arguments"])     # type: ignore[misc]
        if saved["state"] is not None:
            self.load_state(saved["state"])


def _id(token: int | None) -> int:
    return -1 if token is None else token


def _type_name(kind: int | str | None) -> str:
    """The name of a cache type given by its number, its name or not at all."""
    return "F16" if kind is None else tensor_type(kind).name
