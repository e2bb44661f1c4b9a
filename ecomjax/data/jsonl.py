"""JSON read row by row: lines of a file, or a folder of one file a row."""

from __future__ import annotations

import gzip
import json
import math
import os
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ecomjax.data.cache import check_growth
from ecomjax.data.progress import counting
from ecomjax.data.rows import LONGEST_ROW, LazyRows, Row
from ecomjax.errors import UserError

CHUNK = 2**22

_SOLID = np.ones(256, bool)
_SOLID[list(b" \t\n\r\v\f")] = False

DEEPEST = 100
"""Levels of nesting; deeper values would exhaust the stack of whoever shows them."""


class JsonLines(LazyRows):
    """The objects on the lines of a file, each parsed when it is asked for.

    Lines end at \\n alone (a \\r before it is dropped, U+2028 and the like are text), a
    byte-order mark before a line and blank lines are skipped. What is kept in memory is 16
    bytes a line. The file is read, not mapped: one that is cut short meanwhile would
    otherwise end the process.

    Args:
        path: file in UTF-8.
        shown: what the file is called in errors, where it stands in for another.
    """

    def __init__(self, path: Path, shown: Path | None = None):
        self._path, self._shown = path, shown or path
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._starts, self._filled = _scan(self._file, str(self._shown))

    def __len__(self) -> int:
        return len(self._filled)

    def __reduce__(self) -> Any:
        return type(self), (self._path, self._shown)

    def row(self, index: int) -> Row:
        line = int(self._filled[index])
        start, end = (int(place) for place in self._starts[line : line + 2])
        where = f"{self._shown}:{line + 1}"
        return Row(_parse(_read(self._file, start, end, where), where, "line"), where)


class JsonFolder(LazyRows):
    """One JSON object a file, in the order of the file names.

    A file's name without its ending is the example_id of its row where it has none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = sorted(path.name for path in folder.glob("*.json"))

    def __len__(self) -> int:
        return len(self.names)

    def row(self, index: int) -> Row:
        path = self.folder / self.names[index]
        try:
            if path.resolve().parent != self.folder.resolve():
                raise UserError("link to another folder", str(path), "copy the file here")
            if path.stat().st_size > LONGEST_ROW:
                raise _too_long(path.stat().st_size, str(path))
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})", str(path), "mend it") from None
        values = _parse(content, str(path), "file")
        return Row({"example_id": path.stem, **values}, str(path))


def unpack(source: Path, target: Path) -> None:
    """Writes what a gzip file holds, in bounded memory and to a bounded size."""
    written = 0
    with target.open("wb") as file:
        for chunk in _unpacked(source):
            written += len(chunk)
            check_growth(source, written)
            file.write(chunk)


def _unpacked(source: Path) -> Iterator[bytes]:
    try:
        with (
            source.open("rb") as packed,
            gzip.GzipFile(fileobj=packed) as file,
            counting(source.stat().st_size, f"unpacking {source.name}", "B") as on_read,
        ):
            read = 0
            while chunk := file.read(CHUNK):
                yield chunk
                on_read(packed.tell() - read)
                read = packed.tell()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"not a whole gzip file ({error})", str(source), "fetch it again") from None


def _scan(file: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """The places where lines start, and where the last one ends; which of them are not blank."""
    size = os.fstat(file).st_size
    starts, filled = [np.zeros(1, np.int64)], []
    place, begun = 0, False  # begun: the line that goes on in the next chunk is not blank
    with counting(size, f"lines of {what}", "B") as on_read:
        while chunk := os.pread(file, CHUNK, place):
            read = np.frombuffer(chunk, np.uint8)
            ends = np.flatnonzero(read == ord("\n")) + 1
            cuts = np.concatenate([[0], ends])
            solid = np.logical_or.reduceat(_SOLID[read], cuts[cuts < len(read)])
            solid[0] |= begun
            begun = bool(solid[-1]) and len(solid) > len(ends)
            starts.append(ends + place)
            filled.append(solid[: len(ends)])
            place += len(chunk)
            on_read(len(chunk))
    if begun:
        starts.append(np.array([place]))
        filled.append(np.array([True]))
    return np.concatenate(starts), np.flatnonzero(np.concatenate(filled or [np.zeros(0, bool)]))


def _read(file: int, start: int, end: int, where: str) -> bytes:
    if end - start > LONGEST_ROW:
        raise _too_long(end - start, where)
    return os.pread(file, end - start, start)


def _too_long(size: int, where: str) -> UserError:
    return UserError(f"row of {size:,} bytes", where, f"a row may have up to {LONGEST_ROW:,}")


def _parse(content: bytes, where: str, unit: str) -> dict[str, Any]:
    """The object that a line or file holds."""
    try:
        text = content.decode("utf-8-sig")  # files joined from several have a mark in the middle
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is {error.object[error.start]:#04x}"
        raise UserError(f"{unit} is not UTF-8 ({byte})", where, "save the file as UTF-8") from None
    try:
        values = json.loads(text, parse_float=_finite, parse_constant=_no_constant)
        if text.count("[") + text.count("{") > DEEPEST and _is_deep(values, DEEPEST):
            raise ValueError(f"values nested more than {DEEPEST} levels deep")
    except (ValueError, RecursionError) as error:
        reason = str(error).split(": line 1 ")[0]
        raise UserError(
            f"{unit} is not JSON ({reason})", where, f"write one JSON object a {unit}"
        ) from None
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise UserError(
            f"{unit} is no JSON object but a {kind}", where, "write {column: value, ...}"
        )
    if r"\ud" in text or r"\uD" in text:
        try:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                "text holds half a surrogate pair", where, "remove the lone \\ud8xx escape"
            ) from None
    return values


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"number {text[:20]} is out of range")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no value of JSON, null is")


def _is_deep(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more than so many levels."""
    inner = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and (
        levels == 0 or any(_is_deep(child, levels - 1) for child in inner)
    )
