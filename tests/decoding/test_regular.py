"""Token tables of patterns, against `re` and every text that a small alphabet spells."""

import dataclasses
import itertools
import re

import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax.decoding.generate import GenerateOptions, generate
from ecomjax.decoding.regular import NEVER, from_regex
from ecomjax.errors import UserError

END = 2
PIECES = [
    None,
    b"",
    None,
    b"a",
    b"b",
    b"ab",
    b"ba",
    b"c",
    "\u00e9".encode(),
    b"\xc3",
    b"\xa9",
    b"d",
]
SPELLING = [token for token, piece in enumerate(PIECES) if piece]


def spelt(tokens):
    return b"".join(PIECES[token] for token in tokens)


@pytest.mark.parametrize(
    "pattern", ["(ab|a\u00e9)?c?", "[ab]{2,4}", "a(b|ba)*", "(c|\u00e9)+a", "d?"]
)
def test_a_token_is_allowed_where_a_match_goes_on(pattern):
    """Within the tokens that are left: all sequences of four tokens are looked at."""
    table, most = from_regex(pattern, PIECES, END), 4
    whole = set()
    for length in range(most):
        for tokens in itertools.product(SPELLING, repeat=length):
            try:
                matches = re.fullmatch(pattern, spelt(tokens).decode())
            except UnicodeDecodeError:
                continue
            if matches:
                whole.add((*tokens, END))
    assert whole and int(table.needed[0]) == min(map(len, whole))
    openings = {(): 0}
    for length in range(most):
        states = jnp.asarray(list(openings.values()), jnp.int32)
        left = jnp.full(states.shape, most - length, jnp.int32)
        rows = np.asarray(table.allowed(states, left))
        following = {}
        for (opening, state), row in zip(openings.items(), rows, strict=True):
            wanted = {one[length] for one in whole if one[:length] == opening and len(one) > length}
            assert set(np.flatnonzero(row)) == wanted
            for token in wanted - {END}:
                following[*opening, token] = int(table.targets[state, token])
        openings = following
        if not openings:
            break


def test_what_no_tokens_spell_is_no_way():
    table = from_regex("a|xa|bx", PIECES, END)
    assert np.flatnonzero(np.asarray(table.targets[0]) != NEVER).tolist() == [3]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a", "unreadable"),
        ("a(?=b)", "unreadable"),
        ("^a", "unreadable"),
        ("a)(b", "unreadable"),
        ("x+", "no tokens spell a match"),
        ("(a|b){50}", "states, more than 20"),
    ],
)
def test_refused_patterns(pattern, message):
    with pytest.raises(UserError, match=message) as caught:
        from_regex(pattern, PIECES, END, most_states=20)
    assert "\n" not in str(caught.value) and pattern in str(caught.value)


@pytest.fixture(scope="module")
def letters():
    """A vocabulary of the tiny model's size but two: letters and pairs of them."""
    texts = [*"abcdefghijkl0123456789-", *map("".join, itertools.product("abcdef", "ab01-"))]
    return [None, None, None, *(text.encode() for text in texts)]


@pytest.mark.parametrize("changes", [{}, {"temperature": 3.0, "samples": 2, "top_p": 0.9}])
def test_every_answer_matches(tiny, variables, prompts, letters, changes):
    """Also where the pattern would go on for ever, in rows that are refilled."""
    pattern = r"[a-f]+(-[01]{2})?"
    options = GenerateOptions(6, END, 3, **changes)

    def answers(**changed):
        found = generate(
            tiny.model,
            variables,
            prompts,
            dataclasses.replace(options, **changed),
            decode=lambda tokens: b"".join(letters[token] for token in tokens).decode(),
            table=from_regex(pattern, letters, END),
        )
        assert all(answer.ended and re.fullmatch(pattern, answer.text) for answer in found)
        return [answer.tokens for answer in found]

    found = answers()
    assert len(set(found)) > 3
    assert answers(batch_size=8) == found


def test_refusals(tiny, variables, letters):
    table = from_regex("l{9}", letters, END)
    with pytest.raises(UserError, match="shortest match has 10 tokens"):
        generate(tiny.model, variables, [[1]], GenerateOptions(9, END, 1), table=table)
    with pytest.raises(UserError, match="stop ids"):
        options = GenerateOptions(10, END, 1, stop_ids=(5,))
        generate(tiny.model, variables, [[1]], options, table=table)
