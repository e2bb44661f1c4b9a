"""The jinja environment that templates of strangers run in, with bounds on time and memory.

The sandbox of jinja keeps a template from Python's internals, not from work without end: one
`'x' * 10**9`, `'%0999999999d' % 1` or loop in a `{% set %}` block fills any memory. Here
everything that a template builds is measured: no value may be larger than `MAX_CHARACTERS`, all
of them together than `MAX_BUILT`, and whatever repeats looks at the clock. What can build much
from little is measured before it runs, or is not there: of the filters and of the methods of
strings those remain that chat templates use.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from types import GeneratorType
from typing import Any, ClassVar

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 200_000
"""Longest template, in characters."""
MAX_CHARACTERS = 2_000_000
"""Longest conversation, and largest value in one: characters of strings, items of lists."""
MAX_BUILT = 50_000_000
"""Sum of the sizes of all values that are built for one conversation."""
MAX_SECONDS = 5.0
"""Longest time a template may take for one conversation."""
_MAX_NEEDLE = 1000
"""Longest string that another is searched for, or split at: some searches are quadratic."""
_MAX_INDENT = 16
_MAX_BITS = 10_000
_ITEMS = list | tuple | KeysView | ValuesView | ItemsView

_FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first"),
    *("float", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max"),
    *("min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select"),
    *("selectattr", "sort", "string", "title", "tojson", "trim", "truncate", "unique", "upper"),
)
_METHODS = {
    str: (
        *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha"),
        *("isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper"),
        *("join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace"),
        *("rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines"),
        *("startswith", "strip", "swapcase", "title", "upper"),
    ),
    dict: ("copy", "get", "items", "keys", "values"),
    list: ("count", "index"),
    tuple: ("count", "index"),
    int: (),
    float: (),
}


class Environment(ImmutableSandboxedEnvironment):
    """The environment that transformers renders in, within the bounds.

    `begin` has to be called before each conversation; no two may be rendered at once.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=_finalize,
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: self._within_bounds(name) for name in self.filters}
        self.filters |= {"metered": self._metered, "measured": self._measured}
        self.filters["concatenated"] = self._concatenated
        self.concat: Any = self._concatenated
        kept = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals = kept | {"raise_exception": _raise, "strftime_now": time.strftime}
        # What is constant is not computed while a template is compiled: time is up until `begin`.
        self._deadline, self._built = 0.0, 0

    def parse_within_bounds(self, source: str) -> nodes.Template:
        """The syntax tree of a template, led through the bounds."""
        if len(source) > MAX_SOURCE:
            raise SecurityError(f"it has more than {MAX_SOURCE} characters")
        return _Metering().visit(self.parse(source))

    def begin(self) -> None:
        """Starts the clock and the count of what is built."""
        self._deadline, self._built = time.monotonic() + MAX_SECONDS, 0

    def check(self, size: int = 0) -> None:
        """Raises where the time is up, or where a value of this size is too large."""
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")
        if size > MAX_CHARACTERS:
            raise SecurityError(f"it makes more than {MAX_CHARACTERS} characters at once")

    def _measured(self, value: Any) -> Any:
        """The value itself, counted among those that were built."""
        size = _size(value)
        self.check(size)
        self._built += size
        if self._built > MAX_BUILT:
            raise SecurityError(f"it builds more than {MAX_BUILT} characters in all")
        return value

    def _metered(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.check()
            yield item

    def _concatenated(self, pieces: Iterable[Any]) -> str:
        """What `~` makes of its operands, and a block or macro of what it writes."""
        pieces = list(self._metered(pieces))
        self.check(_size(pieces))
        return self._measured("".join(map(str, pieces)))

    def _within_bounds(self, name: str) -> Callable[..., Any]:
        """The filter of a name, which measures what it takes and what it gives."""
        original = self.filters[name]

        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            if name not in _FILTERS:
                raise SecurityError(f"the filter {name!r} is not allowed")
            given = [self._listed(arg) if name == "join" else arg for arg in args]
            self.check(_size([*given, *kwargs.values()]))
            if name == "replace":
                self._check_replacing(*given[1:], **kwargs)
            elif name == "join":
                self._check_joining(*given[1:], **kwargs)
            elif name in ("indent", "tojson"):
                _check_widths([*given[1:], *kwargs.values()])
            result = original(*given, **kwargs)
            if isinstance(result, GeneratorType):
                return self._metered(result)
            return self._measured(result)

        return run

    def _listed(self, value: Any) -> Any:
        return list(self._metered(value)) if isinstance(value, GeneratorType) else value

    def _check_replacing(self, text: Any, old: str, new: str, *_: Any, **__: Any) -> None:
        self.check(len(str(text)) + str(text).count(str(old)) * len(str(new)))

    def _check_joining(self, items: Any, separator: Any = "", *_: Any, **named: Any) -> None:
        between = str(named.get("d", separator))
        self.check(_size(items) + len(items if hasattr(items, "__len__") else ()) * len(between))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, allowed in _METHODS.items():
            if isinstance(obj, kind):
                return attr in allowed and super().is_safe_attribute(obj, attr, value)
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """None: `format` is not among the methods that are allowed."""

    def call(__self, __context, __obj, *args, **kwargs):
        __self.check(_size([*args, *kwargs.values()]))
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            if __obj.__name__ == "replace":
                __self._check_replacing(text, *args, **kwargs)
            elif __obj.__name__ == "join":
                args = [__self._listed(arg) for arg in args]
                __self._check_joining(*args, separator=text)
            elif any(isinstance(arg, str) and len(arg) > _MAX_NEEDLE for arg in args):
                raise SecurityError(f"it searches for more than {_MAX_NEEDLE} characters")
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(result, Namespace) else __self._measured(result)

    def call_binop(self, context, operator, left, right):
        if operator == "%" and not isinstance(left, int | float):
            raise SecurityError("'%' is for numbers")
        if operator == "**" and not (isinstance(right, int | float) and abs(right) <= 64):
            raise SecurityError("it raises a number to a power beyond 64")
        if operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, str | list | tuple) and isinstance(times, int):
                    self.check(_size(items) * max(times, 0))
        return self._measured(super().call_binop(context, operator, left, right))


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says; it renders as its content."""

    tags: ClassVar = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metering(NodeTransformer):
    """Leads what loops run over, and what is built without a call, through the environment."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "metered")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "concatenated")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "measured") if isinstance(node.arg, nodes.Slice) else node

    def _visit_literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        # Of names that are assigned to, a tuple is no value.
        return node if getattr(node, "ctx", "load") != "load" else _filtered(node, "measured")

    visit_List = visit_Tuple = visit_Dict = _visit_literal


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _size(value: Any) -> int:
    """Characters and items that a value holds, counted until they are too many."""
    total, waiting = 0, [value]
    while waiting and total <= MAX_CHARACTERS:
        value = waiting.pop()
        total += 1
        if isinstance(value, str | dict | _ITEMS):
            total += len(value)
        if isinstance(value, _ITEMS) and total <= MAX_CHARACTERS:
            waiting.extend(value)
        elif isinstance(value, dict) and total <= MAX_CHARACTERS:
            waiting.extend(value.items())
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise SecurityError(f"it makes a number of more than {_MAX_BITS} bits")
        elif isinstance(value, Namespace):
            raise SecurityError("a namespace is used as a value")
    return total


def _check_widths(widths: Iterable[Any]) -> None:
    """What stands before or behind every item, as a number or as text, is short."""
    for width in widths:
        if isinstance(width, list | tuple):
            _check_widths(width)
        elif (width if isinstance(width, int) else _size(width)) > _MAX_INDENT + 1:
            raise SecurityError(f"it indents by more than {_MAX_INDENT}")


def _finalize(value: Any) -> Any:
    """What is written; the text of a namespace that holds others has no bound."""
    if isinstance(value, Namespace):
        raise SecurityError("a namespace is used as a value")
    return value


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without the HTML escapes of jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise SecurityError(message)
