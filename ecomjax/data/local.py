"""Data in a folder: JSON lines, csv, parquet, one JSON file a row, or the official ESCI tables."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ecomjax.data import subsets
from ecomjax.data.cache import Cache
from ecomjax.data.esci_tables import EXAMPLES, PRODUCTS, EsciTables
from ecomjax.data.jsonl import JsonFolder, JsonLines, unpack
from ecomjax.data.progress import converting
from ecomjax.data.rows import SPLITS, STAND_INS, Rows, check_split
from ecomjax.data.tables import ArrowRows, csv_batches, parquet_batches, write
from ecomjax.errors import UserError

FORMS = (".jsonl", ".jsonl.gz", ".csv", ".parquet", "")
"""Endings of the file of a split; none is a folder of one JSON file a row."""


class LocalSource:
    """`<folder>/<name>/<split>` in one of `FORMS`, or the official tables in `<folder>/esci`.

    Text is UTF-8. csv has a header, and all of its cells are text, an empty one null. csv,
    parquet and packed files are converted once to files of their own in the cache. Where
    there is no validation split, a part of train that is always the same is validation and
    no longer train, see `subsets`.

    Args:
        folder: the data folder; nothing outside it is read.
        cache: folder of converted files, see `Cache`.
        version: "large" or "small" for that version of the official ESCI tables.
        locale: such as "us", for the products of that locale in the official ESCI tables.
    """

    def __init__(
        self,
        folder: str | Path,
        cache: str | Path | None = None,
        version: str = "",
        locale: str = "",
    ):
        self.name = "local"
        self.folder = Path(folder)
        self._cache = Cache(cache)
        self._filters = version, locale

    def rows(self, name: str, split: str) -> Rows:
        return subsets.rows(self._data(name, split), name, split)

    def fingerprint(self, name: str, split: str) -> str:
        return subsets.digest(self._data(name, split), name, split)

    def _data(self, name: str, split: str) -> subsets.DataSet:
        check_split(split, SPLITS, self.name)
        named = [
            _inside(self.folder, self.folder / each) for each in (name, STAND_INS.get(name, name))
        ]
        path = next((path for path in named if path.is_dir()), named[0])
        for folder in (self.folder, path):
            if not folder.is_dir():
                form = f"data is read from <folder>/{name}/{split}.jsonl"
                raise UserError("no such folder", str(folder), f"{form}; {_present(folder.parent)}")
        if (path / EXAMPLES).exists() or (path / PRODUCTS).exists():
            examples, products = (
                _inside(self.folder, path / table) for table in (EXAMPLES, PRODUCTS)
            )
            return EsciTables(examples, products, self._cache, *self._filters)
        if any(self._filters) and path.name == "esci":
            raise UserError(
                "version and locale are columns of the official tables alone",
                str(path),
                f"give {EXAMPLES} and {PRODUCTS}",
            )
        return SplitFiles(path, self.folder, self._cache)


class SplitFiles:
    """The splits of a folder, each a file or folder in one of `FORMS`."""

    def __init__(self, path: Path, root: Path, cache: Cache):
        self._path, self._cache = path, cache
        self.splits: dict[str, Path] = {}
        for split in SPLITS:
            named = [path / f"{split}{form}" for form in FORMS]
            found = [_inside(root, each) for each in named if each.exists()]
            if len(found) > 1:
                names = ", ".join(each.name for each in found)
                raise UserError(f"split in {len(found)} forms", f"{path}: {names}", "keep one")
            if found:
                self.splits[split] = found[0]

    def rows(self, split: str) -> Rows:
        path = self._file(split)
        rows = self._open(path)
        if not len(rows):
            raise UserError("file holds no rows", str(path), "give at least one")
        return rows

    def digest(self, split: str) -> str:
        path = self._file(split)
        if path.is_file():
            return self._cache.digest(path)
        files = [path / name for name in JsonFolder(path).names]
        parts = [f"{file.name} {self._cache.digest(file)}" for file in files]
        return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()

    def _file(self, split: str) -> Path:
        if split not in self.splits:
            path = self._path / f"{split}.jsonl"
            raise UserError("no such file", str(path), _present(self._path))
        return self.splits[split]

    def _open(self, path: Path) -> Rows:
        if path.is_dir():
            return JsonFolder(path)
        if path.suffix == ".jsonl":
            return JsonLines(path)
        name = "rows.jsonl" if path.suffix == ".gz" else "rows.arrow"

        def make(folder: Path) -> None:
            if path.suffix == ".gz":
                unpack(path, folder / name)
            else:
                batches = csv_batches if path.suffix == ".csv" else parquet_batches
                with converting(path) as on_done:
                    on_done(write(folder / name, batches(path), path))

        made = self._cache.made(path.suffix[1:], [self._cache.digest(path)], make) / name
        return JsonLines(made, path) if path.suffix == ".gz" else ArrowRows(made, str(path))


def _inside(root: Path, path: Path) -> Path:
    """A path below the root; UserError where it is not, or is a link to elsewhere."""
    if root.resolve() not in path.resolve().parents:
        raise UserError("path leaves the data folder", str(path), "name what is below it, no link")
    return path


def _present(folder: Path) -> str:
    """What a folder holds, for the remedy of an error."""
    if not folder.is_dir():
        return f"{folder} does not exist either"
    names = sorted(path.name for path in folder.iterdir())
    return f"present in {folder}: {', '.join(names[:20]) or 'nothing'}"
