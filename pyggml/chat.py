"""Chat templates: messages to a prompt, as the model was trained to see them.

Templates are Jinja programs inside model files, so they are untrusted: they run in Jinja's immutable sandbox, see nothing but
the messages and two functions, and their size, their steps, the strings they build and their output are bounded.
"""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyggml.errors import ModelError, PyggmlError

if TYPE_CHECKING:
    from pyggml.tokenizers import Tokenizer

MAX_TEMPLATE = 1 << 20          # characters of a template
MAX_OUTPUT = 8 << 20            # characters of a prompt, and of a string or list that + * ~ make on the way
MAX_STEPS = 500_000             # turns of loops and calls of macros in one rendering
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
            self._template = _environment().from_string(source)
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
            return _join(self._template.generate(given | {_STEP: itertools.count(1)}))
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


# ---- the sandbox ------------------------------------------------------------------------------------------------------------------------
_STEP = "pyggml.step"           # where a rendering counts its steps: no name in a template has a dot


def _environment() -> Any:
    """Jinja as Hugging Face's templates expect it: block trimming, break and continue, tojson without HTML escapes, `generation`."""
    from jinja2 import nodes, pass_context
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training masks; a prompt needs only what is inside."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _size_of(operator, left, right) > MAX_OUTPUT:
                raise SecurityError(f"{operator} makes a value of more than {MAX_OUTPUT} elements or digits")
            return super().call_binop(context, operator, left, right)

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            """The syntax tree, with a step counted at every turn of a loop and every call of a macro, and `~` made bounded."""
            tree = super()._parse(source, name, filename)
            loops: list[Any] = [*tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))]
            for loop in loops:
                call = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
                loop.body.insert(0, nodes.ExprStmt(call, lineno=loop.lineno))
            return _Concats().visit(tree).set_environment(self)

    class _Concats(NodeTransformer):
        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return nodes.Call(nodes.EnvironmentAttribute("bounded_concat"), node.nodes, [], None, None, lineno=node.lineno)

    @pass_context
    def count_step(context: Any) -> None:
        if next(context[_STEP]) > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")

    def bounded_concat(*values: Any) -> str:
        texts = [str(value) for value in values]
        if sum(map(len, texts)) > MAX_OUTPUT:
            raise SecurityError(f"~ makes a string of more than {MAX_OUTPUT} characters")
        return "".join(texts)

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
               sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment: Any = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], cache_size=0)
    del environment.globals["lipsum"]
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    environment.count_step, environment.bounded_concat = count_step, bounded_concat
    return environment


def _size_of(operator: str, left: Any, right: Any) -> int:
    """About how large the result of an arithmetic operation on sequences or large numbers is."""
    if operator == "+":
        return len(left) + len(right) if hasattr(left, "__len__") and hasattr(right, "__len__") else 0
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(times, int):
            return len(sequence) * times
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * (right if operator == "**" else 1)
    return 0


def _join(parts: Iterable[str]) -> str:
    """The template's output, stopped where it becomes too long."""
    whole, size = [], 0
    for part in parts:
        size += len(part)
        if size > MAX_OUTPUT:
            raise ValueError(f"the prompt is longer than {MAX_OUTPUT} characters")
        whole.append(part)
    return "".join(whole)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
