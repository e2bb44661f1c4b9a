"""Reading and writing small files: whole or not at all, and JSON that every reader takes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecomjax.errors import UserError


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file by `data`; whoever reads it meets the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of the text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by the indented JSON of `value`, see `jsonable`."""
    text = json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_jsonl(path: Path, values: Sequence[Any]) -> None:
    """Replaces a file by one line of JSON for each value, see `jsonable`."""
    write_bytes(path, lines_of(values))


def lines_of(values: Sequence[Any]) -> bytes:
    """One line of JSON for each value, see `jsonable`."""
    lines = (json.dumps(jsonable(v), ensure_ascii=False, allow_nan=False) for v in values)
    return "".join(line + "\n" for line in lines).encode("utf-8")


def jsonable(value: Any) -> Any:
    """`value` in the types of JSON: dataclasses, numpy and paths resolved, NaN and inf as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"unreadable file ({error})", str(path), "restore it, or write to another folder"
        ) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error of a folder or file that the system refuses to write."""
    return UserError(
        f"cannot write ({error.strerror or error})",
        str(path),
        "give a --workdir on a disk with room where you may write",
    )


def read_jsonl(path: Path) -> list[Any]:
    """The values of the lines of a file that `write_jsonl` wrote.

    Raises:
        UserError: it cannot be read, or a line is no JSON.
    """
    try:
        # Not splitlines: JSON texts may hold line separators other than \n.
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]
    except (OSError, ValueError) as error:
        raise UserError(
            f"unreadable file ({error})", str(path), "restore it, or write to another folder"
        ) from error
