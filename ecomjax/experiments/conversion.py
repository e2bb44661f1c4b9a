"""Plain values to frozen dataclasses, checked by their annotations and told by their path."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from ecomjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Interval:
    """A range of numbers; ends are included unless said to be open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        below = x < self.high if self.open_high else x <= self.high
        return above and below and math.isfinite(x)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.open_low else f"{self.low:g} or more"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


class Filled:
    """Marks a tuple that holds something."""


class Regex:
    """Marks a string that has to compile as a regular expression."""


def section_of(value: Any, path: str) -> Mapping[str, Any]:
    """The value itself, if it is a section of keys."""
    if isinstance(value, Mapping):
        return value
    raise UserError(f"a value {value!r}", path, "a section of keys is wanted here")


def convert(value: Any, wanted: Any, path: str) -> Any:
    """`value` as the annotated type `wanted`: a dataclass, Literal, tuple, dict or plain type.

    Raises:
        UserError: it cannot be that; the error names `path`, or the path of a part of it.
    """
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if dataclasses.is_dataclass(wanted):
        return _convert_section(section_of(value, path), typing.cast(type, wanted), path)
    if origin is Annotated:
        return _convert_checked(value, arguments[0], arguments[1], path)
    if wanted is Any:
        return tuple(value) if isinstance(value, list) else value
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(str(a) for a in arguments)
            raise UserError(f"unknown value {value!r}", path, f"choose one of {choices}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong_type(value, "tuple", path)
        return tuple(convert(v, arguments[0], f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        plain = section_of(value, path)
        return {str(k): convert(v, arguments[1], f"{path}.{k}") for k, v in plain.items()}
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise _wrong_type(value, wanted.__name__, path)
    return value


def _convert_section(section: Mapping[str, Any], wanted: type, path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(wanted)}
    for key in section:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)[0]
            raise UserError(
                "unknown key",
                f"{path}.{key}",
                f"did you mean {path}.{near}? The keys are {', '.join(fields)}",
            )
    hints = typing.get_type_hints(wanted, include_extras=True)
    values = {}
    for name, field in fields.items():
        if name in section:
            values[name] = convert(section[name], hints[name], f"{path}.{name}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise UserError("missing key", f"{path}.{name}", "give it a value")
    return wanted(**values)


def _convert_checked(value: Any, wanted: Any, check: Interval | Regex | Filled, path: str) -> Any:
    value = convert(value, wanted, path)
    if isinstance(check, Filled) and not value:
        raise UserError("an empty tuple", path, "name one or more")
    if isinstance(check, Interval) and value not in check:
        raise UserError(f"value {value!r}", path, f"it has to be {check}")
    if isinstance(check, Regex):
        try:
            re.compile(value)
        except (re.error, RecursionError) as error:
            raise UserError(
                f"bad regular expression {value!r} ({error})", path, "mend the expression"
            ) from error
    return value


def _wrong_type(value: Any, wanted: str, path: str) -> UserError:
    return UserError(
        f"value {value!r} of type {type(value).__name__}", path, f"it has to be of type {wanted}"
    )
