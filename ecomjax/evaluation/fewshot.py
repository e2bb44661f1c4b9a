"""Which demonstrations a prompt shows, and with which examples it must not be scored.

They depend on the seed, the training examples and, under some policies, the example that is
asked: never on the order of either, nor on what else is asked. As drawn, those for fewer shots
are the first of those for more.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from ecomjax.errors import UserError
from ecomjax.tasks.base import Example, Task

_HAN = r"\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = r"\u3040-\u30ff\uff66-\uff9f"
_RUNS = re.compile(rf"([{_HAN}{_KANA}]+)|[^\W{_HAN}{_KANA}]+")

Policy = Literal["fixed", "balanced", "random", "similar"]
Order = Literal["drawn", "reversed", "shuffled"]


class Chooser:
    """Chooses the demonstrations of each example.

    Policies:
        fixed: one draw, shared by all examples of a run, so that it is computed once.
        balanced: likewise, the labels of the task in turn.
        random: a draw for each example, seeded by its id.
        similar: for each example those whose inputs are most like its own by BM25 (Robertson
            and Zaragoza 2009, doi 10.1561/1500000019) over `terms`, the most similar first.

    Where all examples share the demonstrations, those that have the id or the input text of
    one must not be scored (`scorable`); elsewhere such a demonstration is passed over.

    Attributes:
        shared: whether all examples have the same demonstrations.
    """

    def __init__(
        self,
        task: Task,
        train: Sequence[Example],
        shots: int,
        seed: int,
        policy: Policy = "fixed",
        order: Order = "drawn",
    ):
        """Draws what is shared, or makes ready to choose.

        Args:
            task: of the examples.
            train: what is chosen from.
            shots: the largest number of demonstrations that will be asked for.
            seed: of the draws.
            policy: how they are chosen.
            order: how they are shown: as drawn, the other way round (so that the most similar
                stands next to the question), or shuffled.

        Raises:
            UserError: more shots than training examples, or a balance without labels.
        """
        if shots > len(train):
            raise UserError(
                f"{shots} demonstrations of {len(train)} training examples",
                "config.fewshot.shots",
                "use fewer shots or more training data",
            )
        if policy == "balanced" and task.labels is None:
            raise UserError(
                f"no labels to balance in task {task.name}",
                "config.fewshot.policy",
                "use fixed, random or similar",
            )
        self._task, self._seed, self._policy, self._order = task, seed, policy, order
        self._train = sorted(train, key=lambda example: example.id)
        self.shared = policy in ("fixed", "balanced")
        self._drawn: list[Example] = []
        if self.shared:
            drawn = list(self._train)
            random.Random(seed).shuffle(drawn)
            self._drawn = (_in_turn(drawn) if policy == "balanced" else drawn)[:shots]
        self._similar = _Similar(map(task.user, self._train)) if policy == "similar" else None
        self._shots = shots
        self._own: dict[tuple[str, str], list[Example]] = {}
        """Of each example asked for by id and text, since it is asked for with every number."""

    def of(self, example: Example, shots: int) -> list[Example]:
        """So many demonstrations for an example, in the order in which they are shown.

        Raises:
            UserError: too few training examples share nothing with the example.
        """
        if self.shared:
            chosen = self._drawn[:shots]
        else:
            asked = example.id, self._task.user(example)
            if asked not in self._own:
                self._own[asked] = list(itertools.islice(self._others(*asked), self._shots))
            chosen = self._own[asked][:shots]
            if len(chosen) < shots:
                raise UserError(
                    f"{shots} demonstrations, but only {len(chosen)} training examples with "
                    "another id and another input",
                    f"{self._task.name}, example {example.id}",
                    "use fewer shots or more training data",
                )
        if self._order == "reversed":
            chosen = chosen[::-1]
        if self._order == "shuffled":
            chosen = list(chosen)
            self._generator("" if self.shared else example.id, "order").shuffle(chosen)
        return chosen

    def scorable(self, examples: Sequence[Example]) -> list[Example]:
        """The examples that share neither id nor input text with a shared demonstration."""
        ids = {shown.id for shown in self._drawn}
        texts = {self._task.user(shown) for shown in self._drawn}
        return [e for e in examples if e.id not in ids and self._task.user(e) not in texts]

    def _others(self, id: str, text: str) -> Iterator[Example]:
        """Training examples that share neither id nor input with an example, the first choice
        first."""
        if self._similar is None:
            places = _drawn_places(len(self._train), self._generator(id, "draw"))
        else:
            places = iter(self._similar.places(text))
        for place in places:
            shown = self._train[place]
            if shown.id != id and self._task.user(shown) != text:
                yield shown

    def _generator(self, *what: str) -> random.Random:
        return random.Random("/".join([str(self._seed), *what]))


def _in_turn(examples: Sequence[Example]) -> list[Example]:
    """The examples with one of each label before a second of any, and so on."""
    seen: dict[Any, int] = {}
    turns = []
    for example in examples:
        turns.append(seen.get(example.target, 0))
        seen[example.target] = turns[-1] + 1
    return [examples[i] for i in sorted(range(len(examples)), key=turns.__getitem__)]


def _drawn_places(size: int, generator: random.Random) -> Iterator[int]:
    """All numbers below `size` in random order; the first of them cost little."""
    moved: dict[int, int] = {}
    for end in range(size, 0, -1):
        # Fisher and Yates's shuffle, of which only what was moved is kept.
        place, last = generator.randrange(end), end - 1
        yield moved.get(place, place)
        moved[place] = moved.get(last, last)


class _Similar:
    """Texts that can be asked which of them are most like another."""

    def __init__(self, texts: Iterable[str]):
        # Imported here: it starts the devices.
        import bm25s

        self._index = bm25s.BM25()
        self._index.index([terms(text) or [""] for text in texts], show_progress=False)

    def places(self, text: str) -> Sequence[int]:
        """The places of all texts, the most similar first, and of equals the first."""
        ids = self._index.get_tokens_ids(terms(text))
        scores = self._index.get_scores_from_ids(ids)
        return np.argsort(-scores, kind="stable").tolist()


def terms(text: str) -> list[str]:
    """What texts are compared by: words in small letters, signs left out.

    Of a run of Han characters or kana, where blanks do not tell words apart, each two that
    follow each other are a term, as in Lucene's CJKAnalyzer; a single one is itself a term. A
    text may have none.
    """
    found: list[str] = []
    for run in _RUNS.finditer(text.lower()):
        word = run[0]
        pairs = [word[i : i + 2] for i in range(len(word) - 1)] if run[1] else []
        found += pairs or [word]
    return found
