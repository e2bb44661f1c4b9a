"""Adapters that a config names by their folders, and the base that they say they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.experiments.assembly import say
from ecomjax.experiments.files import read_json
from ecomjax.hf.checkpoints import Identity
from ecomjax.hf.files import sha256_of
from ecomjax.hf.peft import CONFIG, WEIGHTS, read_adapter, read_base
from ecomjax.typing import Adapter


@dataclasses.dataclass(frozen=True)
class Given:
    """An adapter.

    Attributes:
        folder: where it lies.
        base: which base it says that it belongs to, if it does.
        adapter: its kernels.
        sha256: of the files of its config and weights.
    """

    folder: Path
    base: Identity | None
    adapter: Adapter
    sha256: str

    @property
    def name(self) -> str:
        return name_of(self.folder)

    @property
    def ranks(self) -> list[int]:
        return sorted({leaf.a.shape[-1] for leaf in trees.flatten(self.adapter).values()})


def find_adapter(path: str) -> Path:
    """The folder of an adapter, given that or the run folder that holds it."""
    folder = Path(path).expanduser().resolve()
    for found in (folder, folder / "adapter"):
        if (found / CONFIG).is_file():
            return found
    raise UserError(
        "no adapter" if folder.is_dir() else "no such folder",
        path,
        f"name a folder with {CONFIG}, or a run folder that holds adapter/",
    )


def name_of(folder: Path) -> str:
    """What an adapter is called: its run folder, where it lies in one, else its own."""
    return (folder.parent if folder.name == "adapter" else folder).name


def read_given(
    folder: Path, shape: Any, base: Identity | None = None, any_base: bool = False
) -> Given:
    """The adapter in a folder that `find_adapter` found, see `hf.peft.read_adapter`."""
    adapter = read_adapter(folder, shape, base, any_base)
    return Given(folder, read_base(folder), adapter, sha256_of_adapter(folder))


def common_base(folders: Sequence[Path], own: Identity | None, any_base: bool) -> Identity | None:
    """The base of all adapters, as far as they say; it has to be `own`, where that is known.

    Adapters of PEFT do not say, and pass with a note.
    """
    found = {folder: read_base(folder) for folder in folders}
    named = {str(folder): base for folder, base in found.items() if base is not None}
    if len(named) < len(found):
        silent = next(folder for folder, base in found.items() if base is None)
        say(f"{silent} does not say which base it belongs to")
    if own is not None:
        named = {"the model": own} | named
    if not named:
        return None
    (first, base), *others = named.items()
    for where, other in others:
        if other.fingerprint != base.fingerprint and not any_base:
            raise UserError(
                f"{first} is of base {base.name!r} from {base.source!r}, {where} of "
                f"{other.name!r} from {other.source!r}, with other weights",
                "config.adapters",
                "merge adapters of one base, or set config.any_base=True",
            )
    return base


def sha256_of_adapter(folder: Path) -> str:
    """Of all that says what an adapter computes."""
    return sha256_of([folder / CONFIG, folder / WEIGHTS])


def check_unchanged(record: Path, folders: Sequence[Path]) -> None:
    """UserError where what is done was done with other adapters than there are now."""
    for folder, merged in zip(folders, read_json(record)["adapters"], strict=True):
        if sha256_of_adapter(folder) != merged["sha256"]:
            raise UserError(
                "the adapter has changed since it was read", str(folder), "use another --workdir"
            )
