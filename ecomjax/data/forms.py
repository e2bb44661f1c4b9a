"""What answers are allowed, where that can be told before one is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple


class Edge(NamedTuple):
    """A piece of an answer, and the state after it."""

    text: str
    target: int


@dataclasses.dataclass(frozen=True)
class Form:
    """The allowed answers: the texts along the ways from the first state to one without edges.

    An edge without text says that its state may go on as its target does. Ways that share
    states share what is computed of them, so the answers may be very many.

    Attributes:
        states: edges of each state. They lead to states further on, so that every answer ends;
            every state but the first is the target of one.
    """

    states: tuple[tuple[Edge, ...], ...]

    def __post_init__(self):
        reached = {0}
        for state, edges in enumerate(self.states):
            for edge in edges:
                if not state < edge.target < len(self.states):
                    raise ValueError(f"edge {edge} of state {state} does not lead further on")
                reached.add(edge.target)
        if len(reached) < len(self.states) or not self.states:
            raise ValueError("no state, or one that no edge leads to")


def one_of(texts: Iterable[str]) -> Form:
    """The form of answers that are one of the texts."""
    return Form((tuple(Edge(text, 1) for text in texts), ()))
