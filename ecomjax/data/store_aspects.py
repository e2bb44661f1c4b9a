"""Aspects of the products of the synthetic shop: judged in varied words, and read back."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Mapping

from ecomjax.data import catalogue
from ecomjax.data.catalogue import Kind, Pool, as_list, home_by_place
from ecomjax.data.store_aspect_words import ASPECTS, EVERY_TRAIT, SAYINGS, TRAITS

COMMON_SHARE = 0.4
"""How often an aspect is judged in words that every aspect can be judged in."""


@dataclasses.dataclass(frozen=True, eq=False)
class Aspect:
    """Something that can be good or bad about a product.

    Attributes:
        names: what it is called.
        summaries: how a summary puts that it is good (True) or bad (False).
        sayings: what a review can say of it when it is good or bad.
        home: the split that alone has the last name and the last sayings.
    """

    names: list[str]
    summaries: Mapping[bool, str]
    sayings: Mapping[bool, list[str]]
    home: str


Judgement = tuple[Aspect, bool]
"""An aspect, and whether it is good."""


@functools.cache
def aspects() -> dict[str, list[Aspect]]:
    """The aspects of each trait; those of every third are at home in validation."""
    homes = itertools.cycle(("test", "test", "validation"))
    return {
        trait: [
            Aspect(
                as_list(names),
                {True: good, False: bad},
                {True: as_list(praise), False: as_list(blame)},
                next(homes),
            )
            for names, good, bad, praise, blame in listed
        ]
        for trait, listed in ASPECTS.items()
    }


@functools.cache
def aspects_of(kind: Kind) -> list[Aspect]:
    """What the products of a type are judged by."""
    traits = TRAITS[kind.aisle][kind.accessory].split()
    return [aspect for trait in (*traits, EVERY_TRAIT) for aspect in aspects()[trait]]


@functools.cache
def names(split: str, aspect: Aspect) -> Pool:
    """What a split can call an aspect."""
    return _all_but_the_last(split, aspect.names, aspect.home)


@functools.cache
def sayings(split: str, aspect: Aspect, good: bool) -> Pool:
    """What a split can say of this aspect alone."""
    return _all_but_the_last(split, aspect.sayings[good], aspect.home)


@functools.cache
def common_sayings(split: str, good: bool) -> Pool:
    """What a split can say of any aspect."""
    listed = as_list(SAYINGS[good])
    return catalogue.pool(split, listed, lambda saying: home_by_place(listed.index(saying)))


def _all_but_the_last(split: str, listed: list[str], home: str) -> Pool:
    return catalogue.pool(split, listed, lambda word: home if word == listed[-1] else "train")


def say(rng: random.Random, split: str, judgement: Judgement) -> str:
    """A clause that judges an aspect, such as "the battery drains within an hour"."""
    common = rng.random() < COMMON_SHARE
    pool = common_sayings(split, judgement[1]) if common else sayings(split, *judgement)
    return f"the {names(split, judgement[0]).draw(rng)} {pool.draw(rng)}"


def judgements(kind: Kind, text: str) -> list[Judgement]:
    """The judgements in a text on a product of this type, in the order of the text."""
    known, pattern = _clauses(kind)
    return list(dict.fromkeys(known[clause] for clause in pattern.findall(text.lower())))


@functools.cache
def _clauses(kind: Kind) -> tuple[dict[tuple[str, str], Judgement], re.Pattern[str]]:
    """The judgement of each name and saying, and a pattern that finds the two."""
    known = {
        (name, saying.lower()): (aspect, good)
        for aspect in aspects_of(kind)
        for good in (True, False)
        for name in aspect.names
        for saying in (*aspect.sayings[good], *as_list(SAYINGS[good]))
    }
    parts = [
        "|".join(sorted(set(part), key=len, reverse=True)) for part in zip(*known, strict=True)
    ]
    return known, re.compile(rf"\bthe ({parts[0]}) ({parts[1]})\b")
