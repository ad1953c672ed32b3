"""Chat templates: messages to a prompt, as the model was trained to see them.

Templates are Jinja programs inside model files, so they are untrusted: they run in the sandbox of formats/sandbox.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyggml.errors import ModelError, PyggmlError
from pyggml.formats import sandbox

if TYPE_CHECKING:
    from pyggml.tokenizers import Tokenizer

MAX_TEMPLATE = 1 << 20          # characters of a template
KEY = "tokenizer.chat_template"

# What llama.cpp takes for a model without a template
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


class ChatTemplate:
    """A compiled template. bos_token and eos_token are the texts that it may put into the prompt."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        import jinja2

        if len(source) > MAX_TEMPLATE:
            raise ModelError(f"the chat template has {len(source)} characters, more than {MAX_TEMPLATE}; "
                             "give another one (--chat-template-file)")
        self.source, self._tokens = source, {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = sandbox.environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template is no valid Jinja (line {error.lineno}: {_one_line(error)}); "
                             "give another one (--chat-template-file)") from error
        except RecursionError as error:
            raise ModelError("the chat template is nested too deeply; give another one (--chat-template-file)") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt for these messages (`{"role": ..., "content": ...}`); it says which special tokens it holds by their texts.

        add_generation_prompt: end it where the assistant's answer starts. variables: what else the template asks for, such as tools.
        """
        import jinja2

        given = {**variables, **self._tokens, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return sandbox.render(self._template, given)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
                OverflowError) as error:
            raise PyggmlError(f"the chat template fails on these messages: {_one_line(error)}") from error


def chat_template(kv: Mapping[str, Any], tokenizer: Tokenizer, name: str | None = None) -> ChatTemplate:
    """The file's template; `name` picks one of several (`tool_use`, ...). A file without any gets ChatML."""
    key = f"{KEY}.{name}" if name else KEY
    source = kv.get(key, None if name else CHATML)
    if not isinstance(source, str):
        known = ", ".join(other[len(KEY) + 1:] for other in kv if other.startswith(KEY + ".")) or "none"
        raise ModelError(f"{key} is {type(source).__name__}, not a template; named templates of this file: {known}" if source is not None
                         else f"this file has no chat template named {name!r}; it has: {known}")

    def text(id: int | None) -> str:
        return "" if id is None else tokenizer.piece(id).decode("utf-8", "replace")

    return ChatTemplate(source, bos_token=text(tokenizer.bos), eos_token=text(tokenizer.eos))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
