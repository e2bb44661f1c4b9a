"""Data sets of the Hugging Face Hub, or of a folder that mirrors one."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ecomjax.data import subsets
from ecomjax.data.cache import Cache
from ecomjax.data.progress import converting, counting
from ecomjax.data.rows import STAND_INS, LazyRows, Row, Rows, check_split, digest, listed
from ecomjax.data.tables import BATCH, ArrowRows, TableRows, write
from ecomjax.errors import UserError

HUB_NAMES = {"esci": "tasksource/esci", "queryner": "bltlab/queryner"}


class HubSource:
    """Data sets of the Hub, with the columns of the folder form.

    Where a data set has no validation split (`tasksource/esci`), a part of train that is
    always the same is validation and no longer train, see `subsets`.

    Args:
        names: name of the data to data set name, or to a local mirror of it; `HUB_NAMES` by
            default.
        revision: commit, tag or branch of the data set; None is its newest version.
        streaming: read rows from the network into our own cache, instead of the whole data
            set into that of `datasets`.
        limit: rows from which a streamed split is cut; 0 is all of them.
        cache: folder of streamed rows, see `Cache`.
    """

    def __init__(
        self,
        names: Mapping[str, str] | None = None,
        revision: str | None = None,
        streaming: bool = False,
        limit: int = 0,
        cache: str | Path | None = None,
    ):
        self.name = "hub"
        self.names = dict(HUB_NAMES if names is None else names)
        self.revision = revision
        self._streaming, self._limit, self._cache = streaming, limit, Cache(cache)
        self._data: dict[str, HubData | StreamedData] = {}

    def rows(self, name: str, split: str) -> Rows:
        return subsets.rows(self._open(name, split), name, split)

    def fingerprint(self, name: str, split: str) -> str:
        return subsets.digest(self._open(name, split), name, split)

    def commit(self, name: str) -> str:
        """The commit that a data set is read at; empty for a local mirror."""
        return self._load(name).commit

    def _open(self, name: str, split: str) -> HubData | StreamedData:
        data = self._load(name)
        held_out = {"validation"} if "train" in data.splits else set()
        check_split(split, {*data.splits, *held_out}, data.name)
        return data

    def _load(self, name: str) -> HubData | StreamedData:
        name = name if name in self.names else STAND_INS.get(name, name)
        if name not in self.names:
            raise UserError(
                f"'{name}' has no data set name", "hub source", f"known: {listed(self.names)}"
            )
        given = self.names[name]
        if given not in self._data:
            if self._streaming:
                data = StreamedData(given, self.revision, self._limit, self._cache)
            else:
                data = HubData(given, self.revision)
            self._data[given] = data
        return self._data[given]


class HubData:
    """A data set in the cache of `datasets`.

    Attributes:
        name: its name on the Hub, or its folder.
        commit: what it is read at; empty for a folder.
        splits: the names of its splits.
    """

    def __init__(self, name: str, revision: str | None):
        import datasets

        self.name = name
        with _told(name, revision):
            builder = datasets.load_dataset_builder(name, revision=revision)
            self.commit = _commit(builder)
            self._tables = self._read(builder)
        self.splits = list(self._tables)

    def _read(self, builder: Any) -> Mapping[str, Any]:
        builder.download_and_prepare()
        return builder.as_dataset()

    def rows(self, split: str) -> Rows:
        table = self._tables[split]
        batches = table.with_format("arrow")[:].to_batches()
        if not batches:
            raise UserError("split holds no rows", f"{self.name} {split}", "use another one")
        return HubRows(TableRows(batches, f"{self.name}/{split}"), table.features, split)

    def digest(self, split: str) -> str:
        if not self.commit:
            return digest(self.rows(split))
        return hashlib.sha256(f"{self.name}@{self.commit} {split}".encode()).hexdigest()


class StreamedData(HubData):
    """A data set whose splits are read from the network when they are first asked for.

    Args:
        name: its name on the Hub, or a folder.
        revision: commit, tag or branch.
        limit: most rows of a split; 0 is all of them.
        cache: folder of the rows.
    """

    def __init__(self, name: str, revision: str | None, limit: int, cache: Cache):
        super().__init__(name, revision)
        self._limit, self._cache = limit, cache

    def _read(self, builder: Any) -> Mapping[str, Any]:
        return builder.as_streaming_dataset()

    def rows(self, split: str) -> Rows:
        table = self._tables[split]

        def make(folder: Path) -> None:
            with converting(f"{self.name} {split}") as on_done:
                on_done(write(folder / "rows.arrow", self._batches(split)))

        made = self._cache.made("hub", self._key(split), make)
        rows = ArrowRows(made / "rows.arrow", f"{self.name}/{split}")
        if not len(rows):
            raise UserError("split holds no rows", f"{self.name} {split}", "use another one")
        return HubRows(rows, table.features, split)

    def digest(self, split: str) -> str:
        return hashlib.sha256(" ".join(self._key(split)).encode()).hexdigest()

    def _key(self, split: str) -> list[str]:
        """All that the rows depend on."""
        files = sorted(path for path in Path(self.name).rglob("*") if path.is_file())
        content = [] if self.commit else [self._cache.digest(path) for path in files]
        return [self.name, self.commit, split, str(self._limit), *content]

    def _batches(self, split: str) -> Iterator[Any]:
        table = self._tables[split].with_format("arrow")
        table = table.take(self._limit) if self._limit else table
        schema = table.features and table.features.arrow_schema
        with (
            _told(self.name, self.commit),
            counting(self._limit or None, f"streaming {self.name} {split}") as on_read,
        ):
            for part in table.iter(BATCH):
                schema = schema or part.schema
                yield from part.cast(schema).combine_chunks().to_batches()
                on_read(part.num_rows)


class HubRows(LazyRows):
    """Rows of a table of the Hub: classes by name, and places as ids where it has none."""

    def __init__(self, table: TableRows, features: Any, split: str):
        self._table, self._split = table, split
        self._names: dict[str, list[str]] = {}
        for column, feature in (features or {}).items():
            names = getattr(getattr(feature, "feature", feature), "names", None)
            self._names |= {column: names} if names else {}

    def __len__(self) -> int:
        return len(self._table)

    def row(self, index: int) -> Row:
        row = self._table.row(index)
        values = {"example_id": f"{self._split}-{index + 1}", **row.values}
        for column, names in self._names.items():
            values[column] = _named(values[column], names)
        return Row(values, row.where)

    def encoded(self, column: str) -> tuple[Int[np.ndarray, "n"], list[bytes]] | None:
        return None if column in self._names else self._table.encoded(column)


def _named(value: Any, names: Sequence[str]) -> Any:
    """A class, or a list of classes, by name; what is no class stays what it is."""
    if isinstance(value, list):
        return [_named(inner, names) for inner in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _commit(builder: Any) -> str:
    """The commit that `datasets` resolved a revision to, which names its folder in the cache."""
    return builder.hash if re.fullmatch("[0-9a-f]{40}", builder.hash or "") else ""


@contextlib.contextmanager
def _told(name: str, revision: str | None) -> Iterator[None]:
    """What can go wrong with the Hub, in one line."""
    import pyarrow as pa
    import yaml
    from datasets.exceptions import DatasetsError

    expected = (OSError, ValueError, RuntimeError, DatasetsError, pa.ArrowException, yaml.YAMLError)
    try:
        yield
    except expected as error:
        # OSError is what no network, offline mode and an unknown name or revision end in,
        # ValueError a name that cannot be one, RuntimeError a data set that comes as a program,
        # YAMLError a head of its README that is none, the others a damaged file.
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data set cannot be loaded ({reason})",
            f"{name}@{revision or 'newest'}",
            "check the name and the network, unset HF_HUB_OFFLINE, or read a folder with the "
            "local source",
        ) from error
