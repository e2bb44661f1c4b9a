"""Large matrices worked on in blocks that fit a processor's cache, on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

BLOCK = 2**17
"""Entries of a block: several of them, in float32, stay in the cache of a core."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def row_blocks(shape: tuple[int, ...], entries: int = BLOCK) -> list[slice]:
    """Slices of whole rows, at most about so many entries each."""
    rows = max(1, entries // shape[1])
    return [slice(start, start + rows) for start in range(0, shape[0], rows)]


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results in the order of the items; numpy lets go of the interpreter while it counts."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, items))
