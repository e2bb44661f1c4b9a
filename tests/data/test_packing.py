import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data.encoded import Encoded, EncodedSet, Joined, shared_prefix
from ecomjax.data.mixture import Mixture, draw_orders
from ecomjax.data.packing import assemble, first_fit, make_plan
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
    return EncodedSet.of(Encoded(str(i), (*p, *a), len(p)) for i, (p, a) in enumerate(pairs))


def plan_of(sequences, packing="shared_prefix", epochs=2, seed=0, **changes):
    """A plan of one set, or of several joined."""
    sets = sequences.sets if isinstance(sequences, Joined) else [EncodedSet.of(sequences)]
    options = {"row_length": 16, "batch_size": 4} | changes
    orders = [np.arange(sum(map(len, sets)))] * epochs
    if seed is not None:
        orders = draw_orders([len(s) for s in sets], Mixture(), seed, epochs)
    joined = Joined(sets)
    prefixes = [shared_prefix(s) for s in sets]
    return make_plan(
        joined.lengths,
        orders,
        prefixes=prefixes,
        packing=packing,
        groups=joined.groups,
        **options,
    )


def steps_of(plan):
    return [plan.step(i) for i in range(len(plan))]


def held(step):
    return [i for row in step for i in row]


@given(st.lists(st.integers(1, 10), max_size=20))
def test_first_fit(lengths):
    """Nothing lost or doubled, nothing over the brim, at most one row half empty."""
    (rows,) = first_fit(np.array([lengths], np.int64), 10).tolist()
    assert sorted(set(rows)) == list(range(len(set(rows))))
    sums = [sum(n for n, r in zip(lengths, rows, strict=True) if r == row) for row in set(rows)]
    assert all(total <= 10 for total in sums)
    assert sum(total <= 5 for total in sums) <= 1


def one_by_one(lengths, capacity):
    """First fit decreasing, written as it is defined."""
    rows, room = [-1] * len(lengths), []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] >= 0:
            row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(room))
            if row == len(room):
                room.append(capacity)
            room[row] -= lengths[i]
            rows[i] = row
    return rows


@given(st.lists(st.lists(st.integers(-1, 10), min_size=6, max_size=6), min_size=1, max_size=5))
def test_first_fit_of_many_steps_is_that_of_each(steps):
    found = first_fit(np.array(steps, np.int64), 10).tolist()
    assert found == [one_by_one(lengths, 10) for lengths in steps]


def test_first_fit_takes_the_longest_first():
    assert first_fit(np.array([[2, 6, 4, 5, 3]]), 10).tolist() == [[1, 0, 0, 1, 1]]


@given(data_sets(), st.sampled_from(PACKINGS), st.integers(1, 3))
def test_every_epoch_holds_every_example_once(pairs, packing, multiple):
    sequences = encode(pairs)
    plan = plan_of(sequences, packing, rows_multiple=multiple, epochs=3)
    start = 0
    for end in plan.epoch_ends:
        steps = steps_of(plan)[start:end]
        assert sorted(i for step in steps for i in held(step)) == list(range(len(sequences)))
        assert [len(held(step)) for step in steps[:-1]] == [4] * (len(steps) - 1)
        start = end
    assert start == len(plan)
    assert {len(step) for step in steps_of(plan)} == {plan.rows}
    assert plan.rows % multiple == 0


@given(data_sets())
def test_a_step_holds_the_same_examples_however_packed(pairs):
    sequences = encode(pairs)
    steps = {packing: steps_of(plan_of(sequences, packing)) for packing in PACKINGS}
    for shared, plain, pad in zip(*steps.values(), strict=True):
        assert sorted(held(shared)) == sorted(held(plain)) == sorted(held(pad))
        assert all(len(row) <= 1 for row in pad)


@given(data_sets(), st.sampled_from(PACKINGS))
def test_no_row_overflows(pairs, packing):
    sequences = encode(pairs)
    plan = plan_of(sequences, packing)
    (prefix,) = plan.prefixes
    assert prefix == (shared_prefix(sequences) if packing == "shared_prefix" else 0)
    for row in (row for step in steps_of(plan) for row in step):
        own = sum(len(sequences[i].tokens) - prefix for i in row)
        assert prefix + own <= plan.row_length


def test_a_plan_is_a_function_of_lengths_and_seed():
    rng = np.random.default_rng(0)
    sequences = [Encoded(str(i), (1,) * n, 1) for i, n in enumerate(rng.integers(2, 16, 40))]
    plan = plan_of(sequences)
    assert steps_of(plan) == steps_of(plan_of(sequences))
    other = plan_of(sequences, seed=1)
    assert [held(s) for s in steps_of(plan)] != [held(s) for s in steps_of(other)]
    first, second = steps_of(plan)[: plan.epoch_ends[0]], steps_of(plan)[plan.epoch_ends[0] :]
    assert [set(held(s)) for s in first] != [set(held(s)) for s in second]


def test_without_a_seed_the_order_stays():
    sequences = [Encoded(str(i), (1,) * 8, 1) for i in range(10)]
    plan = plan_of(sequences, "pad", seed=None)
    assert [held(step) for step in steps_of(plan)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2


def test_sharing_the_prefix_saves_rows():
    sequences = [Encoded(str(i), (1, 2, 3, 4, 5, 10 + i, 20 + i), 6) for i in range(5)]
    rows = {p: len(plan_of(sequences, p, batch_size=5).step(0)) for p in PACKINGS}
    assert rows == {"shared_prefix": 1, "plain": 3, "pad": 5}


@given(data_sets(), st.sampled_from(PACKINGS))
def test_every_example_is_written_as_if_alone(pairs, packing):
    """Slot by slot: what an example sees are its own tokens at the positions 0, 1, 2, ...

    Targets are the next tokens, and those with weight are the answer and the end token.
    """
    sequences = encode(pairs)
    plan = plan_of(sequences, packing)
    (prefix,) = plan.prefixes
    for step in steps_of(plan):
        batch = assemble(step, sequences, plan)
        assert batch.tokens.shape == (len(step), plan.row_length)
        used = batch.segment_ids != PADDING_SEGMENT
        for b, row in enumerate(step):
            shared = batch.segment_ids[b] == SHARED_SEGMENT
            assert shared.sum() == (prefix if row else 0)
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
    batch = assemble(plan.step(0), sequences, plan)
    assert steps_of(plan) == [((0, 1),)]
    assert batch.tokens.tolist() == [[5, 6, 1, 2, 9, 3, 9, 0]]
    assert batch.segment_ids.tolist() == [[-1, -1, 1, 1, 1, 2, 2, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0]]
    assert batch.weights.tolist() == [[0, 0, 1, 1, 0, 1, 0, 0]]
    assert (batch.targets * batch.weights).tolist() == [[0, 0, 2, 9, 0, 9, 0, 0]]


def test_an_empty_row_holds_nothing():
    sequences = [Encoded("a", (5, 6, 1, 2, 9), 3)]
    plan = plan_of(sequences, rows_multiple=2)
    batch = assemble(plan.step(0), sequences, plan)
    assert plan.prefixes == (2,)
    for field in batch.__dataclass_fields__:
        assert not getattr(batch, field)[1].any()


@given(data_sets(), data_sets(), st.sampled_from(PACKINGS))
def test_a_row_is_of_one_task_and_opens_with_its_prefix(first, second, packing):
    """Two tasks in one plan: as if each had rows of its own."""
    joined = Joined([encode(first), encode([([3, *p], a) for p, a in second])])
    plan = plan_of(joined, packing, batch_size=5)
    for step in steps_of(plan):
        batch = assemble(step, joined, plan)
        for b, row in enumerate(step):
            assert len({int(joined.groups[i]) for i in row}) <= 1
            if row:
                group = joined.groups[row[0]]
                shared = batch.segment_ids[b] == SHARED_SEGMENT
                assert batch.groups[b] == group
                assert shared.sum() == plan.prefixes[group]
                assert tuple(batch.tokens[b, shared]) == joined[row[0]].tokens[: shared.sum()]
    rows = [row for step in steps_of(plan) for row in step if row]
    assert sorted(i for row in rows for i in row) == sorted([*range(len(joined))] * 2)


def test_millions_of_examples_are_planned_in_seconds():
    """A plan is arrays: what it holds of an example is a few numbers."""
    lengths = np.random.default_rng(0).integers(20, 200, 300_000)
    orders = draw_orders([len(lengths)], Mixture(), 0, 1)
    plan = make_plan(
        lengths, orders, prefixes=[10], packing="shared_prefix", row_length=512, batch_size=16
    )
    assert sorted(held(plan.step(0))) == sorted(orders[0][:16].tolist())
    assert sum(array.nbytes for array in (plan.order, plan.row_of, plan.starts)) < 20 * len(lengths)
