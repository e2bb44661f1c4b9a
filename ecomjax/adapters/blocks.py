"""Large matrices worked on in blocks that fit a processor's cache, on all cores."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

BLOCK = 2**17
"""Entries of a block: several of them, in float32, stay in the cache of a core."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def row_blocks(shape: tuple[int, ...], entries: int = BLOCK) -> list[slice]:
    """Slices of whole rows, at most about so many entries each."""
    rows = max(1, entries // shape[1])
    return [slice(start, start + rows) for start in range(0, shape[0], rows)]


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Iterator[Result]:
    """The results in the order of the items, computed on all cores or as many as are said.

    numpy lets go of the interpreter while it counts. Where there is nothing to share out no
    thread is started, which takes longer than a small matrix.
    """
    items = list(items)
    if threads == 1 or len(items) == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        yield from pool.map(function, items)


def one_core_each() -> AbstractContextManager[Any]:
    """Context in which a product or decomposition of matrices keeps to one core.

    For work that `in_threads` shares out. On several cores the QR decomposition of a few
    columns takes many times as long as on one: its steps are too short to be shared.
    """
    return _libraries().limit(limits=1, user_api="blas")


@functools.cache
def _libraries() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
