"""Reading and replacing small files, and replacing folders, all or nothing."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ecomjax.errors import UserError


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a UTF-8 file."""
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read ({error.strerror})", str(path), "check the path") from None
    except ValueError as error:  # bad JSON or bad UTF-8
        raise UserError(f"not a JSON file ({error})", str(path), "fetch it again") from None
    if not isinstance(value, dict):
        raise UserError("not a JSON object", str(path), "fetch the file again")
    return value


def replace_file(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text under a temporary name, then renames."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def replace_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `folder` when the block ends well.

    `folder` is at every moment complete, as it was or as it will be, or absent. A folder
    that holds files of other names than the new one is refused, not emptied.
    """
    target = Path(folder).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=_scratch(target), dir=target.parent))
    try:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        yield new
        for path in new.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            strangers = sorted({p.name for p in target.iterdir()} - {p.name for p in new.iterdir()})
            if strangers:
                raise UserError(
                    f"folder holds other files, {strangers[0]!r} for one",
                    str(folder),
                    "name another folder or remove them",
                )
            os.rename(target, old)
        os.rename(new, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes what `replace_folder` left beside `folder` when it was killed.

    For who knows that nobody else is writing there.
    """
    target = Path(folder).absolute()
    for path in target.parent.glob(f"{glob.escape(_scratch(target))}*"):
        shutil.rmtree(path)


def _scratch(target: Path) -> str:
    """How the names of folders begin that something is put together in."""
    return f".{target.name[:100]}.new-"


def sha256_of(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Hash of a file or, for several, of the list of their names and hashes."""
    digests = []
    for path in sorted(map(Path, paths)):
        with path.open("rb") as file:
            digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    if len(digests) == 1:
        return digests[0][1]
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests)
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()
