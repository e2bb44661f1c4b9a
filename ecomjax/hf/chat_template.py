"""Rendering chat templates, which are untrusted programs that come with weights."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ecomjax.errors import UserError

MAX_CHARACTERS = 2_000_000
"""Longest conversation, and longest string that an operator of a template may build."""
MAX_SECONDS = 5.0
"""Longest time a template may take for one conversation."""

_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template can raise while it runs."""


class ChatTemplate:
    """A compiled template; `render` turns messages into the text of a conversation."""

    def __init__(self, source: str, variables: Mapping[str, str], where: str):
        """Compiles `source`; `variables` are names it may use, such as `eos_token`."""
        self.source, self._variables, self._where = source, dict(variables), where
        self._environment = _Environment()
        try:
            tree = _Metering().visit(self._environment.parse(source))
            code = self._environment.compile(tree)
        except jinja2.TemplateError as error:
            raise self._failed(error) from None
        self._template = jinja2.Template.from_code(
            self._environment, code, self._environment.make_globals(None)
        )

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The conversation as text, special tokens spelt out."""
        self._environment.deadline = time.monotonic() + MAX_SECONDS
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._variables,
            ):
                length += len(piece)
                self._environment.check(length)
                pieces.append(piece)
        except _FAULTS as error:
            raise self._failed(error) from None
        return "".join(pieces)

    def _failed(self, error: Exception) -> UserError:
        return UserError(
            f"chat template cannot be rendered: {error or type(error).__name__}",
            self._where,
            "correct the template or use the prompt format alpaca",
        )


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says; it renders as its content."""

    tags: ClassVar = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metering(NodeTransformer):
    """Leads what loops run over, and joined strings, through the limits."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "metered", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "bounded", [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """The environment that transformers renders in, with limits on time and size.

    Whatever can repeat (loops, calls) looks at the clock, and whatever can grow a string
    (operators, output) is measured, so that no template runs on without end.
    """

    intercepted_binops = frozenset(["+", "*", "**"])

    def __init__(self):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        self.deadline = 0.0
        self.filters |= {"metered": self._metered, "bounded": self._bounded, "tojson": _to_json}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": time.strftime}

    def check(self, length: int = 0) -> None:
        """Raises where the time is up or `length` characters are too many."""
        if time.monotonic() > self.deadline:
            raise jinja2.TemplateError(f"it takes more than {MAX_SECONDS:g} seconds")
        if length > MAX_CHARACTERS:
            raise jinja2.TemplateError(f"it makes more than {MAX_CHARACTERS} characters")

    def _metered(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.check()
            yield item

    def _bounded(self, text: str) -> str:
        self.check(len(text))
        return text

    def call(self, __context, __obj, *args, **kwargs):
        self.check()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context, operator, left, right):
        if operator == "**" and isinstance(right, int) and right > 64:
            raise jinja2.TemplateError("it raises a number to a power beyond 64")
        if operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, (str, list, tuple)) and isinstance(times, int):
                    self.check(len(items) * max(times, 0))
        result = super().call_binop(context, operator, left, right)
        self.check(len(result) if isinstance(result, (str, list, tuple)) else 0)
        return result


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without the HTML escapes of jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
