"""A folder that is there whole or not at all, and known to be as it was written.

It is made under a temporary name. The last file in it, manifest.json, holds the sha256 of all
others; then all of it is brought to the disk, and only then does it get its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from ecomjax.errors import UserError

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
"""What names of folders begin with that are not whole; a killed process leaves them behind."""


def make_room(temporary: Path) -> None:
    """An empty folder under a temporary name, and no other beside it."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for leftover in temporary.parent.glob(f"{TEMPORARY}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    temporary.mkdir()


def commit(temporary: Path, place: Path) -> None:
    """Adds the manifest to a folder that is else complete, and gives it its name."""
    text = json.dumps(_digests(temporary), indent=2)
    (temporary / MANIFEST).write_text(text, encoding="utf-8")
    _sync(temporary)
    remove(place)
    os.replace(temporary, place)
    _sync_folder(place.parent)


def damage(place: Path) -> str | None:
    """What is wrong with a folder; None: every file is as it was written, and there is no other.

    Raises:
        UserError: a file is there and cannot be read, which may be mended.
    """
    try:
        if json.loads((place / MANIFEST).read_bytes()) != _digests(place):
            return f"its files are not those of {MANIFEST}"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        return str(error)
    except OSError as error:
        what = f"cannot read a checkpoint ({error.strerror})"
        raise UserError(what, str(place), "mend the rights or the disk, and try again") from error
    return None


def remove(place: Path) -> None:
    """Deletes a folder; it loses its name first, so it is never met half deleted."""
    if place.exists():
        doomed = place.with_name(f"{TEMPORARY}old-{place.name}")
        os.replace(place, doomed)
        shutil.rmtree(doomed)


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, the manifest itself aside."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and path != folder / MANIFEST:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[path.relative_to(folder).as_posix()] = digest
    return digests


def _sync(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
