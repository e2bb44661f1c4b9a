"""Stop strings: an answer ends where one of them first appears in its text."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

STRIDE = 16
"""Tokens between the places where the text of an unfinished answer is looked at."""


class Stopped(NamedTuple):
    """Where an answer was stopped."""

    kept: int
    """Tokens whose text ends before the stop string; the string begins in the next one."""
    text: str
    """All that comes before the stop string, be it half of a token."""


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """Strings that end an answer.

    Text is of whole answers, since the text of a token depends on those before it. It is looked
    at after every `STRIDE` tokens of an answer and after its last, whenever the caller comes to
    it, so that what is found is a matter of the tokens alone.

    Attributes:
        strings: any of them ends an answer.
        decode: from token ids to text.
    """

    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]

    def find(self, tokens: Sequence[int], looked: int, finished: bool) -> Stopped | None:
        """The first place where a stop string appears.

        Args:
            tokens: of the answer so far, end token left out.
            looked: how many of them have been looked at before, a multiple of `STRIDE`.
            finished: whether no more of them follow.
        """
        places = [*range(looked, len(tokens) + 1, STRIDE)]
        if finished:
            places.append(len(tokens))
        for before, after in itertools.pairwise(places):
            if self._appears(self.decode(tokens[:after])) is None:
                continue
            for count in range(before + 1, after + 1):
                text = self.decode(tokens[:count])
                start = self._appears(text)
                if start is not None:
                    return Stopped(self._within(tokens[:count], start), text[:start])
        return None

    def _appears(self, text: str) -> int | None:
        """Where the first of the strings begins."""
        return min((at for at in map(text.find, self.strings) if at >= 0), default=None)

    def _within(self, tokens: Sequence[int], characters: int) -> int:
        """How many of the tokens, the last left out, have so short a text."""
        counts = range(len(tokens) - 1, 0, -1)
        return next((n for n in counts if len(self.decode(tokens[:n])) <= characters), 0)
