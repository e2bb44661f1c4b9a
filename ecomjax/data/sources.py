"""Where rows come from: a folder of JSON lines, the Hugging Face Hub or the synthetic shop.

All of them hand out the same columns, named as in the folder form
`<folder>/<task>/{train,validation,test}.jsonl`: for `esci` those of the Shopping Queries
data, for `queryner` example_id, tokens and ner_tags. What the columns must hold is the
task's to say; a row remembers where it stands so that the task can point there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ecomjax.data import store
from ecomjax.errors import UserError

SPLITS = ("train", "validation", "test")

HUB_NAMES = {"esci": "tasksource/esci", "queryner": "bltlab/queryner"}

HELD_OUT = 1000
"""One in so many training queries is validation where the Hub has no such split."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        values: column name to value.
        where: where the row stands, e.g. `data/esci/train.jsonl:12`.
    """

    values: Mapping[str, Any]
    where: str


@runtime_checkable
class Source(Protocol):
    """A place that holds the rows of tasks.

    Attributes:
        name: short name for reports.
    """

    name: str

    def rows(self, task: str, split: str) -> Sequence[Row]:
        """All rows of one of `SPLITS`, in a fixed order; UserError if there are none."""
        ...

    def fingerprint(self, task: str, split: str) -> str:
        """sha256 (hex) of the content of a split."""
        ...


class LocalSource:
    """JSON lines in UTF-8: `<folder>/<task>/<split>.jsonl`, one object a line.

    Lines end at \\n alone (a \\r before it is dropped, U+2028 and the like are text), a
    byte-order mark before a line and blank lines are skipped.
    """

    def __init__(self, folder: str | Path):
        self.name = "local"
        self.folder = Path(folder)

    def rows(self, task: str, split: str) -> list[Row]:
        path = self._path(task, split)
        with path.open("rb") as file:
            rows = [
                Row(_parse(line, f"{path}:{number}"), f"{path}:{number}")
                for number, line in enumerate(file, start=1)
                if line.strip()
            ]
        if not rows:
            raise UserError("file holds no rows", str(path), "give one JSON object a line")
        return rows

    def fingerprint(self, task: str, split: str) -> str:
        with self._path(task, split).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _path(self, task: str, split: str) -> Path:
        _check_split(split, SPLITS, self.name)
        for folder in (self.folder, self.folder / task):
            if not folder.is_dir():
                raise UserError(
                    "no such folder",
                    str(folder),
                    f"data is read from <folder>/{task}/{split}.jsonl; {_present(folder.parent)}",
                )
        path = self.folder / task / f"{split}.jsonl"
        if not path.is_file():
            raise UserError("no such file", str(path), _present(path.parent))
        return path


def _present(folder: Path) -> str:
    """What a folder holds, for the remedy of an error."""
    if not folder.is_dir():
        return f"{folder} does not exist either"
    names = sorted(path.name for path in folder.iterdir())
    return f"present in {folder}: {', '.join(names[:20]) or 'nothing'}"


def _parse(line: bytes, where: str) -> dict[str, Any]:
    """The object on one line of a file."""
    try:
        text = line.decode("utf-8-sig")  # files joined from several have a mark in the middle
    except UnicodeDecodeError as error:
        problem = f"line is not UTF-8 (byte {error.start + 1} is {error.object[error.start]:#04x})"
        raise UserError(problem, where, "save the file as UTF-8") from None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).split(": line 1 ")[0]
        raise UserError(
            f"line is not JSON ({reason})", where, "write one JSON object a line"
        ) from None
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise UserError(f"line is no JSON object but a {kind}", where, "write {column: value, ...}")
    if r"\ud" in text.lower():
        try:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                "text holds half a surrogate pair", where, "remove the lone \\ud8xx escape"
            ) from None
    return values


class HubSource:
    """Data sets of the Hugging Face Hub, mapped to the columns of the folder form.

    Where a data set has no validation split (`tasksource/esci`), one training query in
    `HELD_OUT`, chosen by a hash of its text, is validation and no longer training.

    Args:
        names: task to data set name, or to a local mirror of it; `HUB_NAMES` by default.
        revision: commit, tag or branch of the data set; None is its newest version.
    """

    def __init__(self, names: Mapping[str, str] | None = None, revision: str | None = None):
        self.name = "hub"
        self.names = dict(HUB_NAMES if names is None else names)
        self.revision = revision
        self._tables: dict[str, Mapping[str, Any]] = {}

    def rows(self, task: str, split: str) -> Sequence[Row]:
        if task not in self.names:
            raise UserError(
                f"task '{task}' has no data set name", "hub source", f"known: {_list(self.names)}"
            )
        name = self.names[task]
        if name not in self._tables:
            tables = self._load(name)
            missing = task == "esci" and "validation" not in tables
            self._tables[name] = _hold_out(tables) if missing else tables
        tables = self._tables[name]
        _check_split(split, tables, name)
        if not len(tables[split]):
            raise UserError("split holds no rows", f"{name} {split}", f"known: {_list(tables)}")
        return _HubRows(tables[split], name, split)

    def fingerprint(self, task: str, split: str) -> str:
        return _digest(self.rows(task, split))

    def _load(self, name: str) -> Mapping[str, Any]:
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            tables: Any = datasets.load_dataset(name, revision=self.revision)
            return tables
        except (OSError, ValueError, DatasetsError) as error:
            # OSError is what no network, offline mode and an unknown name or revision end
            # in, ValueError a name that cannot be one, DatasetsError a damaged file.
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"data set cannot be loaded ({reason})",
                f"{name}@{self.revision or 'newest'}",
                "check the name and the network, unset HF_HUB_OFFLINE, or read a folder with "
                "the local source",
            ) from error


class _HubRows(Sequence[Row]):
    """Rows of a `datasets.Dataset`, read when asked for.

    Their ids are their places where the data set has none.
    """

    def __init__(self, table: Any, name: str, split: str):
        self.table, self.name, self.split = table, name, split
        self.tags = getattr(getattr(table.features.get("ner_tags"), "feature", None), "names", None)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        values = {"example_id": f"{self.split}-{index + 1}", **self.table[index]}
        if self.tags is not None:
            values["ner_tags"] = [self.tags[tag] for tag in values["ner_tags"]]
        return Row(values, f"{self.name}/{self.split}:{index + 1}")


def _hold_out(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables with a validation split taken from train, whole queries at a time."""
    places: tuple[list[int], list[int]] = [], []
    for place, query in enumerate(tables["train"]["query"]):
        digest = hashlib.sha256(str(query).encode("utf-8", "replace")).digest()
        places[int.from_bytes(digest[:8], "big") % HELD_OUT == 0].append(place)
    train, validation = (tables["train"].select(chosen) for chosen in places)
    return {**tables, "train": train, "validation": validation}


class SyntheticSource:
    """Rows of the seeded synthetic shop, generated anew: no file and no network.

    Args:
        seed: equal seeds give equal rows.
        sizes: numbers of rows by split.
    """

    def __init__(self, seed: int = 0, sizes: store.Sizes | None = None):
        self.name = "synthetic"
        self.seed = seed
        self.sizes = sizes or store.Sizes()

    def rows(self, task: str, split: str) -> list[Row]:
        _check_split(split, SPLITS, self.name)
        values = store.rows(task, split, self.seed, getattr(self.sizes, split))
        if not values:
            raise UserError("split of size 0", f"synthetic {split}", "ask for at least one row")
        return [
            Row(columns, f"synthetic/{task}/{split}:{number}")
            for number, columns in enumerate(values, start=1)
        ]

    def fingerprint(self, task: str, split: str) -> str:
        return _digest(self.rows(task, split))


def _digest(rows: Iterable[Row]) -> str:
    """sha256 of the values of rows, as JSON lines."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.values, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _check_split(split: str, known: Iterable[str], where: str) -> None:
    if split not in known:
        raise UserError(f"unknown split '{split}'", where, f"known: {_list(known)}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))
