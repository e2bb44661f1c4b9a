import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data.encoded import (
    Encoded,
    EncodedSet,
    Joined,
    fit_window,
    key_of,
    read_set,
    shared_prefix,
    write_set,
)
from ecomjax.errors import UserError

TEXT = st.text(max_size=5)


@st.composite
def sets(draw):
    """(id, prompt, answer) of few tokens, so that prompts often share a beginning."""
    tokens = st.lists(st.integers(1, 2), max_size=4)
    opening, last = draw(tokens), st.integers(1, 2)
    rows = st.tuples(TEXT, tokens, last, tokens)
    return [(name, [*opening, *p, end], [*a, 9]) for name, p, end, a in draw(st.lists(rows))]


def encode(rows):
    return [Encoded(name, (*p, *a), len(p), key_of(name)) for name, p, a in rows]


@given(sets(), sets())
def test_a_set_is_a_sequence_of_what_it_was_made_of(rows, others):
    examples = encode(rows)
    made = EncodedSet.of(examples)
    assert list(made) == examples
    assert made.lengths.tolist() == [len(e.tokens) for e in examples]
    back = made[np.arange(len(made))[::-1]]
    assert list(back) == examples[::-1] and list(made[1:]) == examples[1:]
    joined = Joined([made, EncodedSet.of(encode(others))])
    assert list(joined) == examples + encode(others)
    assert joined.lengths.tolist() == [len(e.tokens) for e in joined]
    assert joined.groups.tolist() == [0] * len(rows) + [1] * len(others)


@given(rows=sets())
def test_what_is_written_is_read(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("set")
    write_set(folder, encode(rows), {"rows": len(rows)})
    found, about = read_set(folder)
    assert list(found) == encode(rows)
    assert about == {"rows": len(rows)}


def test_a_set_on_disk_is_mapped_and_not_read(tmp_path):
    write_set(tmp_path, (Encoded(str(i), (1, 2, i), 2) for i in range(1000)), {})
    found, _ = read_set(tmp_path)
    assert isinstance(found.flat, np.memmap)
    assert found[777] == Encoded("777", (1, 2, 777), 2)


def test_keys_tell_texts_apart():
    texts = ["", "a", "A", "a ", "\ud800", "é", "e\u0301"]
    assert len({key_of(text) for text in texts}) == len(texts)
    assert key_of("red shoe") == key_of("red shoe")


@given(sets().filter(bool))
def test_shared_prefix_is_the_longest_that_leaves_a_prompt_token(rows):
    sequences = EncodedSet.of(encode(rows))
    common = shared_prefix(sequences)
    assert 0 <= common < min(s.prompt for s in sequences)
    assert len({s.tokens[:common] for s in sequences}) == 1
    longer = {s.tokens[: common + 1] for s in sequences}
    assert len(longer) > 1 or common + 1 == min(s.prompt for s in sequences)


def test_shared_prefix_stops_before_the_answer():
    """Two equal prompts: the last token stays with each example, for it predicts the answer."""

    def shared(*examples):
        return shared_prefix(EncodedSet.of(examples))

    same = [Encoded("a", (1, 2, 3, 7), 3), Encoded("b", (1, 2, 3, 8), 3)]
    assert shared(*same) == 2
    assert shared(same[0]) == 2
    assert shared() == 0
    early = Encoded("c", (1, 9, 3, 4, 5, 6, 7), 6)
    late = Encoded("d", (1, 2, 3, 4, 5, 6, 7), 6)
    assert shared(late, early) == 1


@pytest.fixture
def lengths_4_5_6():
    return EncodedSet.of(Encoded(f"of {n}", (1,) * n, 1) for n in (4, 5, 6))


def test_too_long_is_dropped_and_told(lengths_4_5_6):
    kept = fit_window(lengths_4_5_6, 5, "drop", "train")
    assert list(kept.sequences) == list(lengths_4_5_6)[:2]
    assert (kept.dropped, kept.truncated, kept.tokens_lost) == (("of 6",), (), 6)
    assert fit_window(lengths_4_5_6, 6, "raise", "train").dropped == ()


def test_too_long_is_refused(lengths_4_5_6):
    with pytest.raises(UserError, match=r"2 of 3 examples longer .* 4 tokens: train.* of 5; "):
        fit_window(lengths_4_5_6, 4, "raise", "train")


@pytest.mark.parametrize("policy", ["drop", "truncate", "raise"])
def test_nothing_left_is_refused(lengths_4_5_6, policy):
    with pytest.raises(UserError, match="window of 3 tokens: train"):
        fit_window(lengths_4_5_6, 3, policy, "train")
    with pytest.raises(UserError, match="no example fits"):
        fit_window(EncodedSet.of([]), 3, policy, "train")


def test_truncation_cuts_the_beginning_of_the_own_input():
    """The instruction (1, 2) and the answer (9) stay, as does what predicts the answer."""
    short = Encoded("short", (1, 2, 3, 9), 3)
    long = Encoded("long", (1, 2, 4, 5, 6, 7, 9), 6)
    answer = Encoded("long answer", (1, 2, 5, 8, 8, 8, 8, 9), 3)
    kept = fit_window(EncodedSet.of([short, long, answer]), 5, "truncate", "train")
    assert list(kept.sequences) == [short, Encoded("long", (1, 2, 6, 7, 9), 4)]
    assert (kept.dropped, kept.truncated) == (("long answer",), ("long",))
    assert kept.tokens_lost == 2 + 8
    assert shared_prefix(kept.sequences) == 2


@given(sets().filter(bool), st.integers(1, 12))
def test_no_answer_is_ever_cut(rows, window):
    examples = {i: e for i, e in enumerate(encode(rows))}
    named = [dataclasses.replace(e, id=str(i)) for i, e in examples.items()]
    try:
        kept = fit_window(EncodedSet.of(named), window, "truncate", "train")
    except UserError:
        assert all(len(e.tokens) > window for e in named)
        return
    common = shared_prefix(EncodedSet.of(named))
    for found in kept.sequences:
        whole = examples[int(found.id)]
        assert len(found.tokens) == min(len(whole.tokens), window)
        assert found.tokens[found.prompt :] == whole.tokens[whole.prompt :]
        assert found.tokens[: min(common, found.prompt)] == whole.tokens[:common]
        assert found.tokens[found.prompt - 1] == whole.tokens[whole.prompt - 1]
    left = sum(len(e.tokens) for e in kept.sequences)
    assert left + kept.tokens_lost == sum(len(e.tokens) for e in named)
