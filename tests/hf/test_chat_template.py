"""Chat templates: rendered as transformers does, and kept within limits."""

import time
import tracemalloc

import pytest

from ecomjax.errors import UserError
from ecomjax.hf import sandbox
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
    "reversed": "{% for m in messages[::-1] %}{{ loop.previtem.role if loop.index0 }}{% endfor %}",
    "methods": "{{ messages[1].content.split('?')[-1].lstrip('\n').replace('j', 'J').strip() }}",
    "filters": (
        "{{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='role') | join('+') }}"
        "{{ messages | selectattr('role', 'in', ['user', 'tool']) | list | length }}"
        "{{ messages[0].content | replace('sell', 'buy') | indent(2) }}{{ 7 % 4 }}"
    ),
    "block": "{% set x %}{% for m in messages %}{{ m.role }}{% endfor %}{% endset %}{{ x|title }}",
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
    "big padding": "{{ '%0999999999d' % 1 }}",
    "big format": "{{ '{:999999999}'.format(1) }}",
    "big width": "{{ 'x' | center(999999999) }}",
    "big indent": "{{ {'a': 1} | tojson(indent=999999999) }}",
    "big separators": "{{ range(9999) | list | tojson(separators=(MB, ':')) }}",
    "big bytes": "{{ (1).to_bytes(999999999) }}",
    "big number": (
        "{% set ns = namespace(n=10 ** 64) %}"
        "{% for a in range(64) %}{% set ns.n = ns.n * ns.n %}{% endfor %}"
    ),
    "replacing": "{{ MB.replace('x', MB) }}{{ MB | replace('x', MB) }}",
    "replacing by a filter": "{{ MB | replace('x', MB) }}",
    "joining": "{{ MB.join(range(9999) | map('string')) }}",
    "joining by a filter": "{{ range(9999) | map('replace', 0, MB) | join }}",
    "joining by a separator": "{{ range(9999) | join(d=MB) }}",
    "block": "{% set x %}{% for a in range(9999) %}{{ MB }}{% endfor %}{% endset %}",
    "macro": "{% macro f() %}{% for a in range(9999) %}{{ MB }}{% endfor %}{% endmacro %}{{ f() }}",
    "keeping": (
        "{% set ns = namespace(x=[]) %}"
        "{% for a in range(9999) %}{% set ns.x = ns.x + ['x' * 1000 * a] %}{% endfor %}"
    ),
    "building": "{% for a in range(99999) %}{% set x = MB + 'x' %}{% endfor %}",
    "literal": "{% set x = [" + "MB," * 999 + "] %}{{ x }}",
    "slices": "{% set x = [" + "MB[1:]," * 99 + "] %}" * 3,
    "nesting": (
        "{% set ns = namespace(x={}) %}"
        "{% for a in range(99) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}"
    ),
    "nesting of namespaces": (
        "{% set ns = namespace(x=0) %}{% set other = namespace(x=0, y=0) %}"
        "{% set other.x = ns %}{% set other.y = ns %}{{ other }}"
    ),
    "views": "{{ [dict(a=MB).items()] * 9999 }}",
    "comparing": "{{ MB + 'a' in [MB + 'b'] * 999999 }}",
    "sorting": "{{ ([MB + 'a', MB + 'b'] * 99999) | sort | length }}",
    "searching": "{{ ('x' * 999999).rfind('x' * 499999 ~ 'y' ~ 'x' * 499999) }}",
    "brackets": "{{" + "(" * 9999,
    "long": " " * 200_001,
    "type": "{{ messages + 1 }}",
    "undefined": "{{ nothing.here }}",
    "division": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_f48_hostile_templates_end_in_one_line(name, monkeypatch):
    """Soon, and without filling the memory first; MB is a string of a million signs."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)
    given = {"MB": "x" * 1_000_000}
    start = time.monotonic()
    with pytest.raises(UserError, match="chat template cannot be rendered"):
        template = ChatTemplate(HOSTILE[name], given, "there")
        tracemalloc.start()
        template.render(MESSAGES, True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - start < 3.0
    assert peak < 100e6


def test_broken_syntax():
    with pytest.raises(UserError, match=r"chat template cannot be rendered.*there"):
        ChatTemplate("{% for m in %}", {}, "there")
