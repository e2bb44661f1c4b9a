"""`base.json`, which says of an adapter what PEFT has no fields for: whose it is, and, where the
base has experts, how they are named and what the joined tensors were made of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecomjax.errors import UserError
from ecomjax.hf.checkpoints import Identity
from ecomjax.hf.files import read_json, replace_file

BASE = "base.json"

FUSED, MODULES = "transformers-5", "transformers-4"
"""Experts named as parameters of all of them, which is written, or as a module each."""

_ORIGIN = ("name", "source", "sha256", "fingerprint")


@dataclasses.dataclass(frozen=True)
class Record:
    """The content of the file."""

    base: Identity | None
    """Without its path, which is not kept; None where it is not known."""
    naming: str | None = None
    """`FUSED` or `MODULES`, where the base has experts."""
    dropout: float | None = None
    """That of training, since PEFT has none beside parameters."""
    ranks: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)
    """Ranks by layer of the kernels that are parts of one parameter; 0 if not adapted."""

    def part_ranks(self, paths: tuple[str, ...], layer: int) -> list[int] | None:
        """Ranks in a layer of the parts of one parameter, if they are all known."""
        known = [self.ranks[path][layer : layer + 1] for path in paths if path in self.ranks]
        ranks = [rank for own in known for rank in own]
        return ranks if len(ranks) == len(paths) else None


def write_record(folder: Path, record: Record) -> None:
    """Writes the file, unless there is nothing to say."""
    content: dict[str, Any] = {}
    if record.base is not None:
        content |= {key: getattr(record.base, key) for key in _ORIGIN}
    if record.naming is not None:
        content |= {"naming": record.naming, "dropout": record.dropout, "ranks": record.ranks}
    if content:
        replace_file(folder / BASE, json.dumps(content, indent=2))


def read_record(folder: Path) -> Record | None:
    """The record of an adapter, if it has one; those of PEFT have none."""
    if not (folder / BASE).is_file():
        return None
    content = read_json(folder / BASE)
    origin: list[Any] = [content.get(key) for key in _ORIGIN]
    naming, ranks = content.get("naming"), content.get("ranks", {})
    dropout, unknown = content.get("dropout"), not content.keys() & set(_ORIGIN)
    sound = (
        (unknown or all(isinstance(value, str) for value in origin))
        and naming in (None, FUSED, MODULES)
        and (dropout is None or type(dropout) in (int, float))
        and isinstance(ranks, dict)
        and all(isinstance(own, list) for own in ranks.values())
        and all(type(rank) is int and rank >= 0 for own in ranks.values() for rank in own)
    )
    if not sound:
        raise UserError(
            "not the record of an adapter, or of a newer version",
            str(folder / BASE),
            "fetch the adapter again",
        )
    name, source, sha256, fingerprint = origin
    base = None if unknown else Identity(name, source, "", sha256, fingerprint)
    return Record(base, naming, dropout, ranks)
