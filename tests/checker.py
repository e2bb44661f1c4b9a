"""The checker of annotations that tests run under, see conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import beartype

_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
_checked: dict[Any, Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its arguments checked.

    What jaxtyping has checked is a stand-in of no body. That of a function inside a function
    comes anew at every call of the outer one, and making a checker takes milliseconds: those of
    the same names and annotations share theirs.
    """
    if "<locals>" not in function.__qualname__:
        return _check(function)
    code = function.__code__
    signature = (code.co_varnames, code.co_argcount, code.co_kwonlyargcount, code.co_flags)
    hints = tuple(function.__annotations__.items())
    key = (function.__module__, function.__qualname__, signature, hints)
    if key not in _checked:
        _checked[key] = _check(function)
    return _checked[key]
