"""Rendering chat templates, which are untrusted programs that come with weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from ecomjax.errors import UserError
from ecomjax.hf.sandbox import Environment

_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a template can raise while it is compiled and while it runs."""


class ChatTemplate:
    """A compiled template; `render` turns messages into the text of a conversation."""

    def __init__(self, source: str, variables: Mapping[str, str], where: str):
        """Compiles `source`; `variables` are names it may use, such as `eos_token`."""
        self.source, self._variables, self._where = source, dict(variables), where
        self._environment = Environment()
        try:
            code = self._environment.compile(self._environment.parse_within_bounds(source))
        except _FAULTS as error:
            raise self._failed(error) from None
        self._template = jinja2.Template.from_code(
            self._environment, code, self._environment.make_globals(None)
        )

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The conversation as text, special tokens spelt out."""
        self._environment.begin()
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
