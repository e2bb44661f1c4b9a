"""The catalogue of the synthetic shop: its product types, and what each split may draw.

Aisles and the values of open axes each have a home by a fixed rule. What is at home in training
is drawn by all splits, what is at home in validation or test there alone.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from ecomjax.data.store_words import (
    AISLES,
    ASKED,
    DEPARTMENTS,
    HELD_OUT_AXES,
    PRAISE,
    SECTIONS,
    SPLITS,
    TEMPLATES,
    UNITS,
)

HELD_OUT_SHARE = 0.5
"""How often validation and test draw an aisle or open word of their own, not one of training."""

PLACES = ("before", "after", "title")
"""Where a value is written: before or after the type of a query, or in a product title."""

ALL_AXES = frozenset({"fits", *ASKED}.union(*SECTIONS.values()))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A product type and its place in the shop."""

    name: str
    section: str
    aisle: int
    accessory: bool

    @property
    def axes(self) -> tuple[str, ...]:
        """What its products can differ in; accessories also in the type they are made for."""
        return (*SECTIONS[self.section], *(("fits",) if self.accessory else ()))


@dataclasses.dataclass(frozen=True)
class Pool:
    """What a split draws from: things that all splits have, and things of its own."""

    shared: Sequence[Any]
    own: Sequence[Any]

    @property
    def everything(self) -> list[Any]:
        return [*self.shared, *self.own]

    def draw(self, rng: random.Random) -> Any:
        own = self.own and rng.random() < HELD_OUT_SHARE
        return rng.choice(self.own if own else self.shared)


def as_list(text: str) -> list[str]:
    return text.split(", ")


@functools.cache
def kinds() -> dict[str, Kind]:
    """Every product type by its name."""
    return {
        name: Kind(name, section, aisle, accessory)
        for aisle, (section, *sides) in enumerate(AISLES)
        for accessory, side in zip((False, True), sides, strict=True)
        for name in as_list(side)
    }


def aisle_side(aisle: int, accessory: bool) -> list[Kind]:
    """The types of an aisle that can stand in for one another."""
    return [kinds()[name] for name in as_list(AISLES[aisle][1 + accessory])]


@functools.cache
def aisles(split: str) -> Pool:
    """The aisles of a split."""
    return pool(split, range(len(AISLES)), home_by_place)


@functools.cache
def values(split: str, axis: str, section: str, aisle: int) -> Pool:
    """The values that a split has on an axis for the products of an aisle."""
    if axis == "fits":
        return Pool([kind.name for kind in aisle_side(aisle, accessory=False)], [])
    listed = as_list(ASKED.get(axis) or SECTIONS[section][axis])
    if axis == "creator":
        return pool(split, listed, lambda value: home_by_place(listed.index(value)))
    return pool(split, listed, _home_by_word if axis in HELD_OUT_AXES else lambda _: "train")


def pool(split: str, things: Sequence[Any], home: Callable[[Any], str]) -> Pool:
    """What a split draws of the things, given where each is at home."""
    shared = [thing for thing in things if home(thing) == "train"]
    return Pool(shared, [thing for thing in things if home(thing) == split != "train"])


def home_by_place(place: int) -> str:
    """Aisles and the brands of a section: every fourth for test, every eighth for validation."""
    return "test" if place % 4 == 3 else "validation" if place % 8 == 2 else "train"


def _home_by_word(word: str) -> str:
    """Words that several sections or axes may have: a fifth for test, a tenth for validation."""
    bucket = zlib.crc32(word.encode()) % 10  # Python's own hash differs between processes.
    return "test" if bucket >= 8 else "validation" if bucket == 7 else "train"


@functools.cache
def templates(split: str, kind: Kind, of_products: bool) -> list[tuple[str, ...]]:
    """Templates that make sense for a type; for products, those that name and constrain it."""
    known = {*kind.axes, *(() if of_products else ASKED)}
    sensible = [t for t in map(str.split, TEMPLATES[split]) if not (ALL_AXES - known) & set(t)]
    return [tuple(t) for t in sensible if not of_products or ("type" in t and known & set(t))]


@functools.cache
def strangers(split: str, kind: Kind) -> tuple[list[Kind], list[Kind]]:
    """Types of other aisles: those that share a word with `kind`, and those of its section."""
    here = aisles(split).everything
    others = [k for k in kinds().values() if k.aisle in here and k.aisle != kind.aisle]
    words = set(kind.name.split())
    return (
        [other for other in others if words & set(other.name.split())],
        [other for other in others if other.section == kind.section],
    )


@functools.cache
def spellings(axis: str, value: str, place: str) -> list[str]:
    """How a value is written at one of `PLACES`."""
    title, after = place == "title", place != "before"
    match axis:
        case "department":
            return [DEPARTMENTS[value][1]] if after else as_list(DEPARTMENTS[value][0])
        case "fits":
            return [f"for {value}"]
        case "quantity":
            return [f"pack of {value}"] if title else [f"pack of {value}", f"{value} pack"]
        case "UoM" if not title and (unit := value.split()[-1]) in UNITS:
            return [value, value.replace(unit, UNITS[unit])]
        case "occasion" if after:
            return [f"for {value}"]
        case "creator" if after and not title:
            return [value, f"by {value}"]
        case "color" if after and not title:
            return [value, f"in {value}"]
    return [value]


def held_out_words(split: str) -> frozenset[str]:
    """Words that the queries and titles of `split` can have and those of no other split."""
    return _words(split) - frozenset().union(*(_words(s) for s in SPLITS if s != split))


@functools.cache
def _words(split: str) -> frozenset[str]:
    phrases = [*PRAISE, *TEMPLATES[split]]
    for kind in kinds().values():
        if kind.aisle in aisles(split).everything:
            phrases.append(kind.name)
            for axis in (*kind.axes, *ASKED):
                for value in values(split, axis, kind.section, kind.aisle).everything:
                    phrases += [text for place in PLACES for text in spellings(axis, value, place)]
    return frozenset(" ".join(phrases).lower().split())
