import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data.packing import Encoded, assemble, first_fit, fit_window, make_plan, shared_prefix
from ecomjax.errors import UserError
from ecomjax.typing import PADDING_SEGMENT, SHARED_SEGMENT

PACKINGS = ("shared_prefix", "plain", "pad")


@st.composite
def data_sets(draw):
    """(prompt, answer) of few tokens, so that prompts often share more than they are meant to."""
    tokens = st.lists(st.integers(1, 2), max_size=4)
    opening, last = draw(tokens), st.integers(1, 2)
    pairs = st.tuples(tokens, last, tokens).map(lambda x: ([*opening, *x[0], x[1]], [*x[2], 9]))
    return draw(st.lists(pairs, min_size=1, max_size=9))


def encode(pairs):
    """Made outside of strategies, for annotations are checked at random places."""
    return [Encoded(str(i), (*p, *answer), len(p)) for i, (p, answer) in enumerate(pairs)]


def plan_of(sequences, packing="shared_prefix", **changes):
    options = {"row_length": 16, "batch_size": 4, "epochs": 2, "seed": 0} | changes
    lengths = np.array([len(s.tokens) for s in sequences])
    return make_plan(lengths, prefix=shared_prefix(sequences), packing=packing, **options)


def held(step):
    return [i for row in step for i in row]


@given(data_sets())
def test_shared_prefix_is_the_longest_that_leaves_a_prompt_token(pairs):
    sequences = encode(pairs)
    common = shared_prefix(sequences)
    assert 0 <= common < min(s.prompt for s in sequences)
    assert len({s.tokens[:common] for s in sequences}) == 1
    longer = {s.tokens[: common + 1] for s in sequences}
    assert len(longer) > 1 or common + 1 == min(s.prompt for s in sequences)


def test_shared_prefix_stops_before_the_answer():
    """Two equal prompts: the last token stays with each example, for it predicts the answer."""
    same = [Encoded("a", (1, 2, 3, 7), 3), Encoded("b", (1, 2, 3, 8), 3)]
    assert shared_prefix(same) == 2
    assert shared_prefix(same[:1]) == 2
    assert shared_prefix([]) == 0
    early = Encoded("c", (1, 9, 3, 4, 5, 6, 7), 6)
    late = Encoded("d", (1, 2, 3, 4, 5, 6, 7), 6)
    assert shared_prefix([late, early]) == 1


@given(st.lists(st.integers(1, 10), max_size=20))
def test_first_fit(lengths):
    """Nothing lost or doubled, nothing over the brim, at most one row half empty."""
    rows = first_fit(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(total <= 10 for total in sums)
    assert sum(total <= 5 for total in sums) <= 1


def test_first_fit_takes_the_longest_first():
    assert first_fit([2, 6, 4, 5, 3], 10) == [[1, 2], [3, 4, 0]]


@given(data_sets(), st.sampled_from(PACKINGS), st.integers(1, 3))
def test_every_epoch_holds_every_example_once(pairs, packing, multiple):
    sequences = encode(pairs)
    plan = plan_of(sequences, packing, rows_multiple=multiple, epochs=3)
    start = 0
    for end in plan.epoch_ends:
        steps = plan.steps[start:end]
        assert sorted(i for step in steps for i in held(step)) == list(range(len(sequences)))
        assert [len(held(step)) for step in steps[:-1]] == [4] * (len(steps) - 1)
        start = end
    assert start == len(plan.steps)
    (rows,) = {len(step) for step in plan.steps}
    assert rows % multiple == 0


@given(data_sets())
def test_a_step_holds_the_same_examples_however_packed(pairs):
    sequences = encode(pairs)
    steps = {packing: plan_of(sequences, packing).steps for packing in PACKINGS}
    for shared, plain, pad in zip(*steps.values(), strict=True):
        assert sorted(held(shared)) == sorted(held(plain)) == sorted(held(pad))
        assert all(len(row) <= 1 for row in pad)


@given(data_sets(), st.sampled_from(PACKINGS))
def test_no_row_overflows(pairs, packing):
    sequences = encode(pairs)
    plan = plan_of(sequences, packing)
    assert plan.prefix == (shared_prefix(sequences) if packing == "shared_prefix" else 0)
    for row in (row for step in plan.steps for row in step):
        own = sum(len(sequences[i].tokens) - plan.prefix for i in row)
        assert plan.prefix + own <= plan.row_length


def test_a_plan_is_a_function_of_lengths_and_seed():
    rng = np.random.default_rng(0)
    sequences = [Encoded(str(i), (1,) * n, 1) for i, n in enumerate(rng.integers(2, 16, 40))]
    plan = plan_of(sequences)
    assert plan == plan_of(sequences)
    other = plan_of(sequences, seed=1)
    assert [held(s) for s in plan.steps] != [held(s) for s in other.steps]
    first, second = plan.steps[: plan.epoch_ends[0]], plan.steps[plan.epoch_ends[0] :]
    assert [set(held(s)) for s in first] != [set(held(s)) for s in second]


def test_without_a_seed_the_order_stays():
    sequences = [Encoded(str(i), (1,) * 8, 1) for i in range(10)]
    plan = plan_of(sequences, "pad", seed=None)
    assert [held(step) for step in plan.steps] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2


def test_sharing_the_prefix_saves_rows():
    sequences = [Encoded(str(i), (1, 2, 3, 4, 5, 10 + i, 20 + i), 6) for i in range(5)]
    rows = {p: len(plan_of(sequences, p, batch_size=5).steps[0]) for p in PACKINGS}
    assert rows == {"shared_prefix": 1, "plain": 3, "pad": 5}


@given(data_sets(), st.sampled_from(PACKINGS))
def test_every_example_is_written_as_if_alone(pairs, packing):
    """Slot by slot: what an example sees are its own tokens at the positions 0, 1, 2, ...

    Targets are the next tokens, and those with weight are the answer and the end token.
    """
    sequences = encode(pairs)
    plan = plan_of(sequences, packing)
    for step in plan.steps:
        batch = assemble(step, sequences, plan)
        assert batch.tokens.shape == (len(step), plan.row_length)
        used = batch.segment_ids != PADDING_SEGMENT
        for b, row in enumerate(step):
            shared = batch.segment_ids[b] == SHARED_SEGMENT
            assert shared.sum() == (plan.prefix if row else 0)
            assert set(batch.segment_ids[b][used[b] & ~shared]) == set(range(1, len(row) + 1))
            for segment, index in enumerate(row, start=1):
                sequence = sequences[index]
                seen = np.flatnonzero(shared | (batch.segment_ids[b] == segment))
                assert tuple(batch.tokens[b, seen]) == sequence.tokens
                np.testing.assert_array_equal(batch.positions[b, seen], np.arange(len(seen)))
                weights = np.zeros(len(seen))
                weights[sequence.prompt - 1 : -1] = 1
                np.testing.assert_array_equal(batch.weights[b, seen], weights)
                answer = seen[sequence.prompt - 1 : -1]
                assert tuple(batch.targets[b, answer]) == sequence.tokens[sequence.prompt :]
        assert batch.weights.sum() == sum(
            len(sequences[i].tokens) - sequences[i].prompt for i in held(step)
        )
        assert not batch.weights[~used].any()
        assert not batch.tokens[~used].any()


def test_a_row_as_arrays():
    sequences = [Encoded("a", (5, 6, 1, 2, 9), 3), Encoded("b", (5, 6, 3, 9), 3)]
    plan = plan_of(sequences, row_length=8, seed=None, epochs=1)
    batch = assemble(plan.steps[0], sequences, plan)
    assert plan.steps == (((0, 1),),)
    assert batch.tokens.tolist() == [[5, 6, 1, 2, 9, 3, 9, 0]]
    assert batch.segment_ids.tolist() == [[-1, -1, 1, 1, 1, 2, 2, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0]]
    assert batch.weights.tolist() == [[0, 0, 1, 1, 0, 1, 0, 0]]
    assert (batch.targets * batch.weights).tolist() == [[0, 0, 2, 9, 0, 9, 0, 0]]


def test_an_empty_row_holds_nothing():
    sequences = [Encoded("a", (5, 6, 1, 2, 9), 3)]
    plan = plan_of(sequences, rows_multiple=2)
    batch = assemble(plan.steps[0], sequences, plan)
    assert plan.prefix == 2
    for field in batch.__dataclass_fields__:
        assert not getattr(batch, field)[1].any()


@pytest.fixture
def lengths_4_5_6():
    return [Encoded(f"of {n}", (1,) * n, 1) for n in (4, 5, 6)]


def test_too_long_is_dropped_and_told(lengths_4_5_6):
    kept = fit_window(lengths_4_5_6, 5, "drop", "train")
    assert kept.sequences == tuple(lengths_4_5_6[:2])
    assert kept.too_long == ("of 6",)
    assert fit_window(lengths_4_5_6, 6, "raise", "train").too_long == ()


def test_too_long_is_refused(lengths_4_5_6):
    with pytest.raises(UserError, match=r"2 of 3 examples longer .* 4 tokens: train.* of 5; "):
        fit_window(lengths_4_5_6, 4, "raise", "train")


@pytest.mark.parametrize("policy", ["drop", "raise"])
def test_nothing_left_is_refused(lengths_4_5_6, policy):
    with pytest.raises(UserError, match="window of 3 tokens: train"):
        fit_window(lengths_4_5_6, 3, policy, "train")
    with pytest.raises(UserError, match="no example fits"):
        fit_window([], 3, policy, "train")
