"""Records that are kept as they are made, so that interrupted work goes on behind them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ecomjax.experiments.files import cannot_write, jsonable, lines_of, write_bytes


class Partial:
    """A file of JSON lines: what the records are of, then records, added a few at a time.

    Records that were being added when the process died are as if they had never been.
    """

    def __init__(self, path: Path, about: Any):
        """Nothing is read or written yet.

        Args:
            path: of the file.
            about: what the records depend on; those of anything else are thrown away.
        """
        self._path, self._about = path, jsonable(about)

    def read(self) -> list[Mapping[str, Any]]:
        """The records that were added, of these dependencies."""
        try:
            *lines, _ = self._path.read_bytes().split(b"\n")
            about, *records = map(json.loads, lines)
        except (OSError, ValueError):
            return []
        return records if about == self._about else []

    def start(self) -> list[Mapping[str, Any]]:
        """The records that are there already; the file is ready for more.

        Raises:
            UserError: it cannot be written.
        """
        records = self.read()
        write_bytes(self._path, lines_of([self._about, *records]))
        return records

    def add(self, records: Sequence[Any]) -> None:
        """Adds records, which survive what happens from then on.

        Raises:
            UserError: they cannot be written.
        """
        try:
            with open(self._path, "ab") as file:
                file.write(lines_of(records))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def remove(self) -> None:
        """Ends it; there may be no file."""
        self._path.unlink(missing_ok=True)
