"""Answers that match a regular expression: which tokens may follow, as a table on device.

A pattern becomes an automaton over bytes, and that one over tokens by what their bytes lead to
(Willard and Louf 2023, arXiv 2307.09702, algorithm 3). Unlike `automaton`, which writes a form's
texts in their canonical tokens, it allows every sequence of tokens that spells a match.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ecomjax.errors import UserError

MOST_STATES = 1024
"""Of a pattern: the table has a row of the vocabulary's size for each."""

BEHIND = "\U0010ffff"
"""Stands behind every match. outlines-core 0.2.14 loses what leads from a text that matches to one
that does not yet, such as `b` after `a` in `a(bc)?`; so none matches before this character."""

NEVER = -1
"""Where a token leads that no match goes on with."""


class TokenTable(flax.struct.PyTreeNode):
    """Where tokens lead from each state; the first is the start, the last the end.

    Only the end token leads to the last state, from where a match is complete.
    """

    targets: Int[Array, "states V"]
    """NEVER where no match goes on with the token."""
    needed: Int[Array, "states"]
    """Fewest tokens from the state to the end, the end token included."""

    def allowed(self, state: Int[Array, "B"], left: Int[Array, "B"]) -> Bool[Array, "B V"]:
        """Which tokens may come next, such that the answer can end in `left` tokens more."""
        targets = self.targets[state]
        return (targets != NEVER) & (self.needed[targets] < left[:, None])


def from_regex(
    pattern: str, pieces: Sequence[bytes | None], end: int, most_states: int = MOST_STATES
) -> TokenTable:
    """The table of all token sequences that spell a text the whole of which matches.

    Args:
        pattern: in the syntax of Rust's regex crate, which is that of Python but for anchors,
            look-around and back references, which are refused. No text holds characters of
            the last plane of Unicode, U+100000 and beyond, which are for private use.
        pieces: what each token spells; None of one that spells nothing, as special tokens.
        end: id of the token that ends an answer.
        most_states: of the automaton over bytes.

    Raises:
        UserError: a pattern that cannot be read, has too many states, or that no tokens spell.
    """
    where = f"pattern {pattern!r}"
    steps, final = _of_bytes(pattern, most_states, where)
    states = len(final)
    targets = np.full((states + 1, len(pieces)), NEVER, np.int32)
    # The bytes at each place, of the tokens that are so long; the longest tokens come first.
    spelt = [(token, piece) for token, piece in enumerate(pieces) if piece and token != end]
    spelt.sort(key=lambda one: -len(one[1]))
    tokens = np.array([token for token, _ in spelt], np.int32)
    columns = [
        np.array([piece[place] for _, piece in spelt if len(piece) > place], np.uint8)
        for place in range(len(spelt[0][1]) if spelt else 0)
    ]
    for state in range(states):
        reached = np.full(len(spelt), state, np.int32)
        for column in columns:
            reached[: len(column)] = steps[reached[: len(column)], column]
        targets[state, tokens] = np.where(reached == states, NEVER, reached)
    # The end goes on as itself, so that there is a choice for rows that wait for others.
    targets[np.append(np.flatnonzero(final), states), end] = states
    needed = _to_end(targets)
    if needed[0] > states:
        raise UserError("no tokens spell a match", where, "use characters that the tokenizer has")
    unended = (targets != NEVER) & (needed[targets] > states)
    targets[unended] = NEVER
    return TokenTable(jnp.asarray(targets), jnp.asarray(needed))


def _of_bytes(
    pattern: str, most_states: int, where: str
) -> tuple[Int[np.ndarray, "states_1 256"], Bool[np.ndarray, "states"]]:
    """Where bytes lead from each state, and where a match may end.

    The state behind the last is that of texts which no match opens with.
    """
    # Loaded where it is used: most runs have no pattern.
    from outlines_core import Index, Vocabulary

    end = 256
    bytes_: dict[str | bytes, list[int]] = {bytes([value]): [value] for value in range(256)}
    try:
        Index(pattern, Vocabulary(end, bytes_))  # by itself, so that it closes no group of ours
        index = Index(f"(?:{pattern}){BEHIND}", Vocabulary(end, bytes_))
    except ValueError as error:
        told = " ".join(str(error).split())
        remedy = "describe whole answers, without anchors, look-around and back references"
        raise UserError(f"unreadable: {told}", where, remedy) from None
    transitions, ends = index.get_transitions(), index.get_final_states()
    behind = BEHIND.encode()
    names = [index.get_initial_state()]
    numbers = {names[0]: 0}
    for name in names:  # grows
        for value, target in transitions.get(name, {}).items():
            if value not in (end, behind[0]) and target not in numbers:
                numbers[target] = len(names)
                names.append(target)
    if len(names) > most_states:
        raise UserError(f"{len(names)} states, more than {most_states}", where, "repeat less of it")
    steps = np.full((len(names) + 1, 256), len(names), np.int32)
    final = np.zeros(len(names), bool)
    for number, name in enumerate(names):
        for value, target in transitions.get(name, {}).items():
            if value not in (end, behind[0]):
                steps[number, value] = numbers[target]
        last: int | None = name
        for value in behind:
            last = None if last is None else transitions.get(last, {}).get(value)
        final[number] = last in ends
    return steps, final


def _to_end(targets: Int[np.ndarray, "states V"]) -> Int[np.ndarray, "states"]:
    """Fewest tokens to the last state; more than there are states where there is no way."""
    states = len(targets)
    leads = [np.unique(row[row != NEVER]) for row in targets]
    needed = np.full(states, states + 1, np.int32)
    needed[-1] = 0
    for _ in range(states):
        shorter = [1 + needed[row].min(initial=states) for row in leads[:-1]]
        shorter = np.minimum(np.array([*shorter, 0], np.int32), states + 1)
        if (shorter == needed).all():
            break
        needed = shorter
    return needed
