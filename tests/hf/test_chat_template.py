"""Chat templates: rendered as transformers does, and kept within limits."""

import time

import pytest

from ecomjax.errors import UserError
from ecomjax.hf import chat_template
from ecomjax.hf.chat_template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "You <b>sell</b> shoes."},
    {"role": "user", "content": "größe 42?\n  ja"},
    {"role": "assistant", "content": "Yes."},
]

ORDINARY = {
    "blocks": "{% for m in messages %}\n  {{ m['role'] }}: {{ m.content }}\n{% endfor %}\nend",
    "loop": (
        "{% for m in messages %}{% if loop.first %}{{ loop.length }}{% endif %}{{ loop.index0 }}"
        "{% if not loop.last %},{% endif %}{% endfor %}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }}"
        "{% if m.role == 'assistant' %}{% break %}{% endif %}{% endfor %}"
    ),
    "else": "{% for m in [] %}x{% else %}none{% endfor %}",
    "filtered loop": "{% for m in messages if m.role != 'user' %}{{ loop.index }}{% endfor %}",
    "namespace": (
        "{% set ns = namespace(n=0, text='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.text = ns.text ~ m.role ~ '|' %}{% endfor %}{{ ns.n }} {{ ns.text }}"
    ),
    "json": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
    "generation": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    ),
    "tokens": "{{ bos_token }}{{ messages[0].content | trim | upper }}{{ messages[1:] | length }}",
    "macro": "{% macro f(m) %}[{{ m.role }}]{% endmacro %}{{ f(messages[0]) }}{{ f(messages[1]) }}",
    "prompt": "{% if add_generation_prompt %}>{% else %}.{% endif %}{{ tools is none }}",
    "items": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
}


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers(backend, name, prompt):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>"
    )
    theirs.chat_template = ORDINARY[name]
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
    ours = ChatTemplate(ORDINARY[name], {"bos_token": "<|im_start|>"}, "test")
    assert ours.render(MESSAGES, prompt) == expected


HOSTILE = {
    "class": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{% for c in ''.__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}",
    "globals": "{{ raise_exception.__globals__.keys() }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "mutation": "{{ messages.append(1) }}",
    "own message": "{{ raise_exception('roles must alternate') }}",
    "endless loop": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "endless recursion": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "big range": "{% for a in range(10**9) %}{% endfor %}",
    "big output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "big product": "{{ 'x' * 10**9 }}",
    "big list": "{{ ([0] * 10**9) | length }}",
    "big power": "{{ 10 ** 999999999 }}",
    "doubling": (
        "{% set ns = namespace(x='xx') %}"
        "{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    ),
    "adding": (
        "{% set ns = namespace(x='xx') %}"
        "{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
    ),
    "type": "{{ messages + 1 }}",
    "undefined": "{{ nothing.here }}",
    "division": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_one_line(name, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(UserError, match="chat template cannot be rendered"):
        ChatTemplate(HOSTILE[name], {}, "there").render(MESSAGES, True)
    assert time.monotonic() - start < 3.0


def test_broken_syntax():
    with pytest.raises(UserError, match=r"chat template cannot be rendered.*there"):
        ChatTemplate("{% for m in %}", {}, "there")
