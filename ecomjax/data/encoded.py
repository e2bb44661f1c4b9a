"""Tokenized examples: held in flat arrays, in memory or mapped from files.

Text is tokenized once and kept: a folder of plain arrays, mapped into memory when read, so
that millions of examples cost no more memory than the pages that are looked at.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt64

from ecomjax.errors import UserError

TooLong = Literal["drop", "truncate", "raise"]

ENTRY = np.dtype([("end", "<i8"), ("prompt", "<i4"), ("id_end", "<i8"), ("key", "<u8")])
"""What is kept of an example beside its tokens: where they and the id end, and so on."""

NO_CLASS = -1
"""Class of a token that has none."""

AT_ONCE = 2**16
"""Examples held in memory at once while a set is written or compared."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A tokenized example: `tokens[prompt:]` is what the model learns to say.

    What an encoder reads is all prompt, and what it learns stands at its tokens.

    Attributes:
        id: the example's id.
        tokens: prompt, answer and end token; of an encoder-decoder the prompt is the source.
        prompt: number of prompt tokens, at least 1.
        key: digest of the input text, by which equal inputs are found; see `key_of`.
        marks: for an encoder, type and class of each token; `NO_CLASS` where it has none.
        lost: tokens, or words, that were cut off before.
    """

    id: str
    tokens: tuple[int, ...]
    prompt: int
    key: int = 0
    marks: tuple[tuple[int, int], ...] = ()
    lost: int = 0


def key_of(text: str) -> int:
    """64 bits of a digest of a text."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSet(Sequence[Encoded]):
    """Tokenized examples as slices of one flat array.

    Attributes:
        flat: tokens of all examples, one after the other.
        starts, ends: slice of each example.
        prompts: number of prompt tokens of each example, cut or not.
        keys: see `Encoded.key`.
        ids: id of each example.
        head: tokens that `cuts` spare at the beginning of every example.
        cuts: tokens left out of each example, those after the head.
        marks: see `Encoded.marks`; None where examples have none.
    """

    flat: Int[np.ndarray, "tokens"]
    starts: Int[np.ndarray, "n"]
    ends: Int[np.ndarray, "n"]
    prompts: Int[np.ndarray, "n"]
    keys: UInt64[np.ndarray, "n"]
    ids: Sequence[str]
    head: int
    cuts: Int[np.ndarray, "n"]
    marks: Int[np.ndarray, "tokens 2"] | None = None

    @classmethod
    def of(cls, examples: Iterable[Encoded]) -> EncodedSet:
        """A set in memory."""
        given = list(examples)
        flat = np.fromiter(itertools.chain.from_iterable(e.tokens for e in given), np.int32)
        marks = [mark for e in given for mark in e.marks]
        ends = np.cumsum([len(e.tokens) for e in given], dtype=np.int64)
        return cls(
            flat,
            np.concatenate([np.zeros(1, np.int64), ends])[: len(given)],
            ends,
            np.array([e.prompt for e in given], np.int64),
            np.array([e.key for e in given], np.uint64),
            [e.id for e in given],
            0,
            np.zeros(len(given), np.int64),
            np.array(marks, np.int32) if marks else None,
        )

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """Number of tokens of each example."""
        return self.ends - self.starts - self.cuts

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        """The example at an index; of a slice or an array of indices, the set."""
        if isinstance(index, slice | np.ndarray):
            places = np.arange(len(self))[index]
            return dataclasses.replace(
                self,
                starts=self.starts[places],
                ends=self.ends[places],
                prompts=self.prompts[places],
                keys=self.keys[places],
                ids=_Chosen(self.ids, places),
                cuts=self.cuts[places],
            )
        start, end, cut = int(self.starts[index]), int(self.ends[index]), int(self.cuts[index])
        tokens = self.flat[start:end].tolist()
        del tokens[self.head : self.head + cut]
        name: Any = self.ids[index]
        marks = () if self.marks is None else tuple(map(tuple, self.marks[start:end].tolist()))
        prompt, key = int(self.prompts[index]) - cut, int(self.keys[index])
        return Encoded(name, tuple(tokens), prompt, key, marks)


@dataclasses.dataclass(frozen=True)
class _Chosen(Sequence[str]):
    """Some of the ids of a set."""

    ids: Sequence[str]
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        return self.ids[int(self.places[index])]


@dataclasses.dataclass(frozen=True)
class _MappedIds(Sequence[str]):
    """Ids out of one array of UTF-8 bytes."""

    text: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index]
        start = int(self.ends[place - 1]) if place else 0
        return bytes(self.text[start : int(self.ends[place])]).decode("utf-8", "surrogatepass")


class Joined(Sequence[Encoded]):
    """Several sets as one, the examples of the first set first.

    Attributes:
        groups: which set each example is of.
        lengths: number of tokens of each example.
    """

    def __init__(self, sets: Sequence[EncodedSet]):
        self.sets = list(sets)
        self.groups = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
        self.lengths = np.concatenate([s.lengths for s in sets])
        self._firsts = np.cumsum([0, *(len(s) for s in sets)])

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Encoded:
        group = int(self.groups[index])
        return self.sets[group][int(index) - int(self._firsts[group])]


# --- Files ----------------------------------------------------------------------------


def write_set(folder: Path, examples: Iterable[Encoded], about: Mapping[str, Any]) -> None:
    """Writes a set into an empty folder, as its examples come.

    `about`, which may be filled while the examples come, is kept with it.
    """
    with (
        (folder / "tokens").open("wb") as tokens,
        (folder / "entries").open("wb") as entries,
        (folder / "ids").open("wb") as ids,
        (folder / "marks").open("wb") as marks,
    ):
        end = id_end = 0
        for example in examples:
            name = example.id.encode("utf-8", "surrogatepass")
            end, id_end = end + len(example.tokens), id_end + len(name)
            tokens.write(np.asarray(example.tokens, "<i4").tobytes())
            entries.write(np.array((end, example.prompt, id_end, example.key), ENTRY).tobytes())
            ids.write(name)
            marks.write(np.asarray(example.marks, "<i4").tobytes())
    (folder / "about.json").write_text(json.dumps(dict(about)), encoding="utf-8")


def read_set(folder: Path) -> tuple[EncodedSet, dict[str, Any]]:
    """The set in a folder, mapped into memory, and what is kept with it."""

    def mapped(name: str, dtype: Any) -> np.ndarray:
        path = folder / name
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)

    entries = mapped("entries", ENTRY)
    ends = entries["end"].astype(np.int64)
    marks = mapped("marks", "<i4")
    made = EncodedSet(
        mapped("tokens", "<i4"),
        np.concatenate([np.zeros(1, np.int64), ends])[: len(ends)],
        ends,
        entries["prompt"].astype(np.int64),
        entries["key"].astype(np.uint64),
        _MappedIds(mapped("ids", np.uint8), entries["id_end"]),
        0,
        np.zeros(len(ends), np.int64),
        marks.reshape(-1, 2) if len(marks) else None,
    )
    return made, json.loads((folder / "about.json").read_text(encoding="utf-8"))


# --- The window -----------------------------------------------------------------------


def shared_prefix(sequences: EncodedSet) -> int:
    """Length of the longest token prefix common to all prompts, short of their last token.

    The last prompt token predicts the first answer token, which differs between examples,
    so it stays in each example's own segment.
    """
    if not len(sequences):
        return 0
    common = int((sequences.prompts - sequences.cuts).min()) - 1
    if sequences.cuts.any():
        common = min(common, sequences.head)
    first = np.asarray(sequences[0].tokens[:common])
    for at in range(0, len(sequences), AT_ONCE):
        slots = sequences.starts[at : at + AT_ONCE, None] + np.arange(common)
        differs = (sequences.flat[slots] != first[:common]).any(axis=0)
        if differs.any():
            common = int(differs.argmax())
    return common


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is left of a data set after the window, and what was not.

    Attributes:
        sequences: the examples that fit.
        dropped: ids of those left out.
        truncated: ids of those whose input was cut.
        tokens_lost: tokens of both that are not in `sequences`.
    """

    sequences: EncodedSet
    dropped: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()
    tokens_lost: int = 0


def fit_window(sequences: EncodedSet, window: int, policy: TooLong, where: str) -> Kept:
    """Keeps the examples of at most `window` tokens, and does with the rest what the policy says.

    "drop" leaves them out. "truncate" cuts the beginning of their own input, that is what
    comes after the prefix that all prompts share; an answer is never cut, and an example
    that would keep nothing of its input is dropped. "raise" refuses them.

    Raises:
        UserError: the policy is "raise" and an example is too long, or none is left.
    """
    excess = np.maximum(sequences.lengths - window, 0)
    long = excess > 0
    if policy == "raise" and long.any():
        raise UserError(
            f"{long.sum()} of {len(sequences)} examples longer than the window of {window} tokens",
            f"{where}, first id {sequences.ids[int(long.argmax())]}",
            "raise row_length in the config or set too_long to drop or truncate",
        )
    fits, head = ~long, 0
    if policy == "truncate" and long.any():
        head = shared_prefix(sequences)
        fits = excess < sequences.prompts - head
    dropped, cut = np.flatnonzero(~fits), np.flatnonzero(fits & long)
    if not fits.any():
        raise UserError(
            f"no example fits the window of {window} tokens",
            where,
            "raise row_length in the config or give non-empty data",
        )
    kept = sequences if fits.all() else sequences[np.flatnonzero(fits)]
    return Kept(
        dataclasses.replace(kept, head=head, cuts=excess[fits]) if len(cut) else kept,
        tuple(sequences.ids[int(i)] for i in dropped),
        tuple(sequences.ids[int(i)] for i in cut),
        int(sequences.lengths[dropped].sum() + excess[cut].sum()),
    )
