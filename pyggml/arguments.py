"""Arguments that users of llama_cpp.Llama pass: which are taken, which only with their default value, and which are unknown."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from pyggml.errors import ParameterError
from pyggml.sampling import SamplingParams

LogitsProcessor = Callable[[np.ndarray, np.ndarray], np.ndarray]        # token ids so far, logits (n_vocab) -> logits
StoppingCriteria = Callable[[np.ndarray, np.ndarray], bool]             # token ids so far, logits (n_vocab) -> stop now?


class LogitsProcessorList(list):
    """Processors applied one after the other."""

    def __call__(self, input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class StoppingCriteriaList(list):
    """Criteria of which any one stops."""

    def __call__(self, input_ids: np.ndarray, scores: np.ndarray) -> bool:
        return any(stop(input_ids, scores) for stop in self)


# Constructor arguments that are taken with these values only ...
CONSTRUCTOR: dict[str, tuple[Any, ...]] = {
    "split_mode": (1,), "tensor_split": (None,), "kv_overrides": (None,),
    "rope_scaling_type": (None, -1), "pooling_type": (-1,), "attention_type": (-1,), "rope_freq_base": (0.0,), "rope_freq_scale": (0.0,),
    "yarn_ext_factor": (-1.0,), "yarn_attn_factor": (1.0,), "yarn_beta_fast": (32.0,), "yarn_beta_slow": (1.0,), "yarn_orig_ctx": (0,),
    "embedding": (False,), "lora_base": (None,), "lora_scale": (1.0,), "lora_path": (None,), "numa": (False,), "chat_format": (None,),
    "chat_handler": (None,), "tokenizer": (None,), "spm_infill": (False,),
}
# ... and those that choose between ways to compute the same thing on other machines, so that any value will do.
NO_EFFECT = {"offload_kqv", "op_offload", "flash_attn", "swa_full", "no_perf"}

# Sampling arguments -> SamplingParams' names, and those that are taken with one value only
_SAMPLING = {**{name: name for name in ("top_k", "top_p", "min_p", "typical_p", "temp", "repeat_penalty", "frequency_penalty",
                                        "presence_penalty", "mirostat_tau", "mirostat_eta", "logit_bias")},
             "mirostat_mode": "mirostat"}
_SAMPLING_ONLY: dict[str, tuple[Any, ...]] = {"tfs_z": (1.0,), "penalize_nl": (True,), "grammar": (None,)}

# Chat arguments that are taken with these values only
CHAT: dict[str, tuple[Any, ...]] = {"functions": (None,), "function_call": (None,), "tools": (None,), "tool_choice": (None, "none"),
                                    "response_format": (None, {"type": "text"})}


def refuse(given: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """TypeError for names that are not in `only`, ParameterError for values that pyggml has no feature for."""
    for name, value in given.items():
        if name not in only:
            raise TypeError(f"{where} has no argument {name!r}")
        if value not in only[name]:
            raise ParameterError(f"{name}={value!r} is not supported; leave it at {only[name][0]!r}")


def whole(name: str, value: Any) -> int:
    """A whole number given as any kind of integer; ParameterError for what would have to be rounded."""
    try:
        return operator.index(value)
    except TypeError:
        raise ParameterError(f"{name}={value!r} is not a whole number") from None


def token_ids(prompt: Iterable[Any]) -> list[int]:
    """The ids of a prompt that is no text."""
    if isinstance(prompt, (bytes, bytearray)):          # its bytes would pass for ids
        raise ParameterError("the prompt is bytes; decode it to text, or give token ids")
    return [whole("a token of the prompt", token) for token in prompt]


def sampling_params(seed: int, repeat_last_n: int, **given: Any) -> SamplingParams:
    """SamplingParams from llama_cpp's names."""
    known = {_SAMPLING[name]: value for name, value in given.items() if name in _SAMPLING}
    refuse({name: value for name, value in given.items() if name not in _SAMPLING}, _SAMPLING_ONLY, "sampling")
    wanted = known.pop("logit_bias", None) or {}
    try:
        bias = {int(token): float(value) for token, value in wanted.items()}
    except (AttributeError, TypeError, ValueError):
        raise ParameterError(f"logit_bias={wanted!r} does not map token ids to numbers; use a dict such as {{15043: -1.5}}") from None
    return SamplingParams(**known, logit_bias=bias, seed=seed, repeat_last_n=repeat_last_n)


def one_callable(given: Any, kind: Callable[[Iterable], Any]) -> Any:
    """One callable from a callable, several (which `kind` makes one) or None."""
    return given if given is None or callable(given) else kind(given)
