"""The token sequences of allowed answers, as states between which a model decides.

A model has been trained on answers tokenized as a whole, so a piece of an answer has the
tokens that it has there, merges across its borders included, and not those that it has by
itself. Where tokens are cut is not looked up but found, for any tokenizer, by comparing the
tokens of whole answers that differ in one place.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from graphlib import TopologicalSorter
from typing import NamedTuple

from ecomjax.data.forms import Form
from ecomjax.errors import UserError

WIDTH = 4
"""Most tokens that a state appends, unless no decision follows; a longer run goes on in more
states. All rows of a batch take as many slots as the one that appends most, so that few tokens
at a time waste less."""

SAMPLES = 8
"""Answers of a form that are tokenized as a whole to check the pieces that they consist of."""


class State(NamedTuple):
    """A place in an answer where a model decides, and the tokens that lead there."""

    chunk: tuple[int, ...]
    """Appended when the state is entered; nothing in it is left to decide."""
    choices: tuple[int, ...]
    """Tokens of which one comes next, in ascending order; none at the end of the answer. The
    chunk of the state that a token leads to opens with it."""
    targets: tuple[int, ...]
    """The state that each choice leads to."""


class Piece(NamedTuple):
    """An edge of a form with its tokens: those from the cut of its state to that of its target.

    A cut need not lie at the borders of the texts, so that the tokens may spell less than the
    text at one end and more at the other.
    """

    tokens: tuple[int, ...]
    text: str
    target: int


@dataclasses.dataclass(frozen=True)
class Automaton:
    """Accepts the tokens of all answers of a form, each followed by the end token, and no others.

    Attributes:
        states: the first is the start.
        pieces: edges of each state of the form.
    """

    states: tuple[State, ...]
    pieces: tuple[tuple[Piece, ...], ...]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest answer, end token included."""
        return self._heaviest([len(state.chunk) for state in self.states])

    @cached_property
    def rounds(self) -> int:
        """Most states between the start and the end of an answer, neither counted."""
        return max(self._heaviest([int(bool(state.choices)) for state in self.states]) - 1, 0)

    def _heaviest(self, weights: Sequence[int]) -> int:
        """The largest sum of weights along a way from the start."""
        order = TopologicalSorter({i: state.targets for i, state in enumerate(self.states)})
        sums = dict.fromkeys(range(len(weights)), 0)
        for i in order.static_order():  # targets first
            sums[i] = weights[i] + max((sums[j] for j in self.states[i].targets), default=0)
        return sums[0]

    def text(self, tokens: Sequence[int]) -> str:
        """The answer of the form that has these tokens, the end token included.

        The text is the form's own, also where a tokenizer loses some of it. Of answers with
        the same tokens it is the first. ValueError where there is none.
        """
        written = tuple(tokens)
        seen, open_ways = set(), [(0, 0, "")]
        while open_ways:
            state, place, text = open_ways.pop()
            if not self.pieces[state] and place == len(written):
                return text
            if (state, place) in seen:
                continue
            seen.add((state, place))
            for piece in reversed(self.pieces[state]):
                stop = place + len(piece.tokens)
                if written[place:stop] == piece.tokens:
                    open_ways.append((piece.target, stop, text + piece.text))
        raise ValueError("no answer of the form has these tokens")


def from_form(
    form: Form,
    encode: Callable[[Sequence[str]], Iterable[Sequence[int]]],
    end: int,
    where: str,
    width: int = WIDTH,
) -> Automaton:
    """The automaton of a form's answers, in the tokens that each has as a whole.

    Args:
        form: the answers.
        encode: token ids of whole answers.
        end: id of the token that ends an answer.
        where: what the form is of, for error messages.
        width: most tokens that a state appends before a decision.

    Raises:
        UserError: the tokens of a piece depend on what stands further away than the next piece.
            That is certain to be found for the pieces beside the first edges of states, and
            else for those in a few answers drawn at random.
    """
    pieces = _pieces(form, encode, end, where)
    return Automaton(_split(_determinize(pieces), width), pieces)


def _pieces(
    form: Form,
    encode: Callable[[Sequence[str]], Iterable[Sequence[int]]],
    end: int,
    where: str,
) -> tuple[tuple[Piece, ...], ...]:
    """The tokens of each edge.

    Every state has one text before it and one after it, along first edges. Answers with the
    same text before a state have the same first tokens, up to where they differ, and answers
    with the same text after it the same last ones. The cut of a state is where the former
    end: if the latter have begun there, tokens on either side do not depend on the other.
    """
    states = form.states
    before = {0: ""}
    for state, edges in enumerate(states):
        for edge in edges:
            before.setdefault(edge.target, before[state] + edge.text)
    after = [""] * len(states)
    for state in reversed(range(len(states))):
        if states[state]:
            first = states[state][0]
            after[state] = first.text + after[first.target]
    along = [before[state] + after[state] for state in range(len(states))]
    through = [
        [before[state] + edge.text + after[edge.target] for edge in edges]
        for state, edges in enumerate(states)
    ]
    sampled = _sample(form)
    spelt = ["".join(states[u][k].text for u, k in way) for way in sampled]

    texts = list(dict.fromkeys([*along, *(text for row in through for text in row), *spelt]))
    encoded = encode(texts)
    tokens = {text: (*ids, end) for text, ids in zip(texts, encoded, strict=True)}

    # Tokens from the cut of each state to the end.
    kept = [0] * len(states)
    for state in reversed(range(len(states))):
        whole = tokens[along[state]]
        for edge, text in zip(states[state], through[state], strict=True):
            other = tokens[text]
            differing = len(whole) - _common(whole, other)
            behind = len(whole) - (len(other) - kept[edge.target])
            kept[state] = max(kept[state], differing, behind)
    kept[0] = len(tokens[along[0]])

    pieces = []
    for state, edges in enumerate(states):
        cut, found = len(tokens[along[state]]) - kept[state], []
        for edge, text in zip(edges, through[state], strict=True):
            other, rest = tokens[text], tokens[along[edge.target]]
            stop = len(other) - kept[edge.target]
            if other[stop:] != rest[len(rest) - kept[edge.target] :] or cut < 0:
                raise _depends(text, where)
            found.append(Piece(other[cut:stop], edge.text, edge.target))
        pieces.append(tuple(found))
    for way, text in zip(sampled, spelt, strict=True):
        if tokens[text] != tuple(token for u, k in way for token in pieces[u][k].tokens):
            raise _depends(text, where)
    return tuple(pieces)


def _depends(text: str, where: str) -> UserError:
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return UserError(
        f"the tokens of parts of the answer {shown!r} depend on others far from them",
        f"the tokenizer, asked for answers to {where}",
        "use the method generate, or another model",
    )


def _sample(form: Form) -> list[list[tuple[int, int]]]:
    """Some answers at random, as the state and the number of each edge."""
    draw, ways = random.Random(0), []
    for _ in range(SAMPLES):
        state, way = 0, []
        while form.states[state]:
            way.append((state, draw.randrange(len(form.states[state]))))
            state = form.states[state][way[-1][1]].target
        ways.append(way)
    return ways


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens are equal."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(one), len(other)))


def _determinize(pieces: Sequence[Sequence[Piece]]) -> list[State]:
    """States for the sets of places in pieces that tokens written so far may have led to.

    Sets are compared, so that what may follow is built once however an answer came there.
    """
    flat: list[int] = []
    """Tokens of all pieces that have some; a place is an index into them."""
    leads: dict[int, int] = {}
    """The target of a piece, by the place of its last token."""
    entries: list[frozenset[int]] = [frozenset()] * len(pieces)
    """The places that each state of the form may go on with."""
    for state in reversed(range(len(pieces))):
        places: set[int] = set()
        for piece in pieces[state]:
            if piece.tokens:
                places.add(len(flat))
                flat += piece.tokens
                leads[len(flat) - 1] = piece.target
            else:
                places.update(entries[piece.target])
        entries[state] = frozenset(places)

    def by_token(places: Iterable[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for place in places:
            found.setdefault(flat[place], []).append(place)
        return found

    numbers = {entries[0]: 0}
    waiting, states = [entries[0]], []
    for begun in waiting:  # grows
        chunk, heads = [], by_token(begun)
        while len(heads) == 1:
            ((token, same),) = heads.items()
            chunk.append(token)
            following = set[int]()
            for place in same:
                following.update(entries[leads[place]] if place in leads else (place + 1,))
            heads = by_token(following)
        targets = []
        for token in sorted(heads):
            chosen = frozenset(heads[token])
            if chosen not in numbers:
                numbers[chosen] = len(waiting)
                waiting.append(chosen)
            targets.append(numbers[chosen])
        states.append(State(tuple(chunk), tuple(sorted(heads)), tuple(targets)))
    return states


def _split(states: Sequence[State], width: int) -> tuple[State, ...]:
    """The states with long chunks made several, but where no decision follows or none precedes."""
    made = list(states)
    for number in range(1, len(states)):
        chunk, choices, targets = made[number]
        while choices and len(chunk) > width:
            made[number] = State(chunk[:width], (chunk[width],), (len(made),))
            number, chunk = len(made), chunk[width:]
            made.append(State(chunk, choices, targets))
    return tuple(made)
