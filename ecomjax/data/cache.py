"""Files made from other files: made once, found again by content, made anew when damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ecomjax.errors import UserError

VERSION = 1
"""Raised when what is written changes, so that older files are not read."""

SMALL = 2**24
"""Bytes below which a file is always read, as that takes no time."""

SETTLED = 2 * 10**9
"""Nanoseconds after which a change must show in a file's times, on any file system."""

ABANDONED = 24 * 3600
"""Seconds after which an unfinished folder is what a killed process left behind."""

MOST_GROWN = 100
"""How often its size a file may hold when unpacked: real text stays below 20."""

GROWTH_FREE = 2**26
"""Bytes up to which nothing is asked about growth."""


class Cache:
    """A folder of derived files. It may be deleted at any time.

    What is derived stands in a folder named by the content of its sources, so a changed
    source never meets what was made from the old one, and two processes that make the same
    thing at once both end with a whole one: each makes its own and renames it.

    Args:
        folder: where; None is `$XDG_CACHE_HOME/ecomjax` or `~/.cache/ecomjax`.
    """

    def __init__(self, folder: str | Path | None = None):
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = Path(folder) if folder else Path(home) / "ecomjax"

    def digest(self, path: Path) -> str:
        """sha256 (hex) of a file's content.

        A large file is read again only if its size, times or inode are not those it had when it was
        read, or if it was read so soon after a change that another may not show in its times.
        """
        stamp = _stamp(path)
        if stamp["size"] < SMALL:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        note = self.folder / "digests" / f"{stamp['device']}-{stamp['inode']}.json"
        known = _read_json(note)
        if known.get("stamp") == stamp and known.get("settled"):
            return known["sha256"]
        settled = time.time_ns() - max(stamp["mtime_ns"], stamp["ctime_ns"]) > SETTLED
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if _stamp(path) != stamp:
            raise UserError("file changes while it is read", str(path), "wait until it is written")
        with contextlib.suppress(OSError):  # it is only read again, then
            note.parent.mkdir(parents=True, exist_ok=True)
            _write_json(note, {"stamp": stamp, "settled": settled, "sha256": sha256})
        return sha256

    def made(self, what: str, digests: Iterable[str], make: Callable[[Path], None]) -> Path:
        """The folder of files that `make` writes, from here or made now.

        Args:
            what: kind of the files, and the beginning of the folder's name.
            digests: all that the files depend on.
            make: writes them into the empty folder it is given.
        """
        folder = self.folder / f"{what}-{_sha256(' '.join([str(VERSION), *digests]))[:32]}"
        if self._whole(folder):
            return folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".making-") as scratch:
                new = Path(scratch) / "new"
                new.mkdir()
                make(new)
                files = {path.name: _content(self, path) for path in sorted(new.iterdir())}
                _write_json(new / "files.json", files)
                if not self._whole(folder):
                    with contextlib.suppress(FileNotFoundError):
                        folder.rename(Path(scratch) / "damaged")
                    with contextlib.suppress(OSError):  # another process was first
                        new.rename(folder)
        except OSError as error:
            raise UserError(
                f"cannot write the cache ({error.strerror or error})",
                str(self.folder),
                "free space there, or name another folder for the cache",
            ) from error
        if not self._whole(folder):
            raise UserError("cache is damaged", str(folder), "delete it")
        return folder

    def _whole(self, folder: Path) -> bool:
        """Whether the folder's files are as they were when they were made."""
        files = _read_json(folder / "files.json")
        try:
            return bool(files) and all(
                _content(self, folder / name) == content for name, content in files.items()
            )
        except OSError:
            return False

    def _sweep(self) -> None:
        """Removes what killed processes left behind."""
        for path in self.folder.glob(".making-*"):
            with contextlib.suppress(OSError):
                times = [inner.stat().st_mtime for inner in [path, *path.rglob("*")]]
                if time.time() - max(times) > ABANDONED:
                    shutil.rmtree(path, ignore_errors=True)


def check_growth(source: Path, written: int) -> None:
    """UserError where a compressed file holds so much that it must be meant to fill the disk."""
    if written > max(GROWTH_FREE, MOST_GROWN * source.stat().st_size):
        raise UserError(
            f"file holds more than {MOST_GROWN} times its size",
            str(source),
            "unpack it yourself if that is right",
        )


def _content(cache: Cache, path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": cache.digest(path)}


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "device": stat.st_dev,
        "inode": stat.st_ino,
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file of ours; empty where there is none or it is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=".", suffix=".json", delete=False
    ) as file:
        json.dump(values, file)
    os.replace(file.name, path)
