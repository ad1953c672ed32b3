"""Chat templates: what Hugging Face's templates rely on, and what a hostile one must not get away with."""

import pytest

from pyggml import chat, tokenizers
from pyggml.chat import CHATML, ChatTemplate, chat_template
from pyggml.errors import ModelError, PyggmlError
from pyggml.formats import sandbox

MESSAGES = [{"role": "system", "content": "Be <brief>."}, {"role": "user", "content": " Hé! "}, {"role": "assistant", "content": "Yes?"}]
VOCAB = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"], "tokenizer.ggml.token_type": [2, 3, 3]}


@pytest.mark.parametrize("template, prompt", [
    ("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
     "<s>[system]Be <brief>.</s>[user]Hé!</s>[assistant]Yes?</s>"),
    ("{%- for m in messages %}\n    {%- if loop.index0 == 1 %}{% break %}{% endif %}\n{{ m.role ~ ':' ~ 1 }}\n{% endfor %}", "system:1\n"),
    ("{% for m in messages %}{% if m.role != 'assistant' %}{% continue %}{% endif %}"
     "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "Yes?"),
    ("{{ tools | tojson }}|{{ messages[1] | tojson(indent=1) }}", '[{"name": "é<"}]|{\n "role": "user",\n "content": " Hé! "\n}'),
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}{% endfor %}"
     "{{ ns.n }} {{ [1] * 3 }} {{ 2 ** 10 }}", "6 [1, 1, 1] 1024"),
    ("{% macro tag(x) %}<{{ x }}>{% endmacro %}{{ tag('a') }}{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}c{% endcall %}",
     "<a>[c]"),
    ("{{ '{0.__class__}'.format(1) }}{{ ''|attr('__class__') }}", ""),
    ("{% if add_generation_prompt %}>{% endif %}{{ missing is defined }}", ">False"),
])
def test_templates_render(template, prompt):
    rendered = ChatTemplate(template, bos_token="<s>", eos_token="</s>").render(MESSAGES, tools=[{"name": "é<"}])
    assert rendered == prompt


def test_chatml_is_what_a_file_without_a_template_gets():
    tokenizer = tokenizers.load(VOCAB)
    template = chat_template({}, tokenizer)
    assert template.source == CHATML
    assert template.render(MESSAGES[1:2]) == "<|im_start|>user\n Hé! <|im_end|>\n<|im_start|>assistant\n"
    assert template.render(MESSAGES[1:2], add_generation_prompt=False) == "<|im_start|>user\n Hé! <|im_end|>\n"


def test_a_file_may_have_several_templates():
    kv = {"tokenizer.chat_template": "{{ bos_token }}plain", "tokenizer.chat_template.tool_use": "tools{{ eos_token }}"}
    tokenizer = tokenizers.load(VOCAB)
    assert chat_template(kv, tokenizer).render([]) == "<s>plain"
    assert chat_template(kv, tokenizer, "tool_use").render([]) == "tools</s>"
    with pytest.raises(ModelError, match="no chat template named 'rag'; it has: tool_use"):
        chat_template(kv, tokenizer, "rag")
    with pytest.raises(ModelError, match="is int, not a template"):
        chat_template({"tokenizer.chat_template": 5}, tokenizer)


def test_today():
    assert len(ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render([])) == 10


@pytest.mark.parametrize("template, sentence", [
    ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
    ("{{ nothing.at_all }}", "'nothing' is undefined"),
    ("{{ messages[9].content }}", "no element 9"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ("{{ (''|attr('__class__')).x }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{{ lipsum() }}", "undefined"),
    ("{{ 'a' * 10 ** 10 }}", "more than"),
    ("{{ 7 ** (10 ** 9) }}", "more than"),
    ("{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "more than"),
    ("{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "more than"),
    ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "longer than"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
    ("{% for i in range(10 ** 9) %}{% endfor %}", "range"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
])
def test_failures_are_one_sentence(template, sentence, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_STEPS", 10_000)
    with pytest.raises(PyggmlError, match="the chat template fails") as error:
        ChatTemplate(template).render(MESSAGES)
    assert sentence in str(error.value).lower() and "\n" not in str(error.value)


@pytest.mark.parametrize("template, sentence", [
    ("{% if %}", "no valid Jinja"), ("{% generation %}", "no valid Jinja"), ("{{ x | no_such_filter }}", "no valid Jinja"),
    ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "nested too deeply"), ("x" * (chat.MAX_TEMPLATE + 1), "more than"),
])
def test_a_template_that_cannot_be_compiled(template, sentence):
    with pytest.raises(ModelError, match=sentence):
        ChatTemplate(template)
