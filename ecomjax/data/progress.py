"""How long work is told about while it is done."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, cast


@contextlib.contextmanager
def counting(total: int | None, what: str, unit: str = "row") -> Iterator[Callable[[int], None]]:
    """A progress bar with time left; yields the function that adds to its count.

    Where the total is None, there is only the count.
    """
    from tqdm import tqdm

    # A file would otherwise fill with bars: there, a line every half minute will do.
    pause = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(
        total=total, desc=what, unit=unit, unit_scale=True, mininterval=pause, delay=1, leave=False
    ) as bar:
        yield cast(Callable[[int], Any], bar.update)


@contextlib.contextmanager
def converting(what: object) -> Iterator[Callable[[int], None]]:
    """Tells how long a conversion took; yields the function that takes its number of rows."""
    start, rows = time.monotonic(), []
    yield rows.append
    seconds = time.monotonic() - start
    print(
        f"converted {what}: {sum(rows):,} rows in {seconds:.1f} s "
        f"({sum(rows) / seconds:,.0f} rows/s)",
        file=sys.stderr,
        flush=True,
    )
