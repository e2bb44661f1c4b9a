import json

import jax
import numpy as np
import pytest

from ecomjax.data.packing import Encoded, assemble, make_plan
from ecomjax.data.pipeline import StepSource, iterate

ROWS = 2


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(0)
    rows = [tuple(rng.integers(1, 60, n).tolist()) for n in rng.integers(3, 9, 23)]
    return [Encoded(str(i), row, 2) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def plan(sequences):
    lengths = np.array([len(s.tokens) for s in sequences])
    options = {"row_length": 8, "batch_size": 5, "epochs": 2, "rows_multiple": ROWS, "seed": 0}
    return make_plan(lengths, prefix=0, packing="plain", **options)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_a_step_is_its_rows_cut_into_microbatches(plan, sequences):
    source = StepSource(plan, sequences, ROWS)
    assert len(source) == len(plan.steps)
    for step, rows in enumerate(plan.steps):
        batch = source[step]
        assert batch.tokens.shape == (len(rows) // ROWS, ROWS, 8)
        joined = jax.tree.map(lambda x: x.reshape(-1, 8), batch)
        assert_same(joined, assemble(rows, sequences, plan))


def test_iteration_takes_the_steps_in_order(plan, sequences):
    source, batches = StepSource(plan, sequences, ROWS), list(iterate(plan, sequences, ROWS))
    assert len(batches) == len(source)
    for step, batch in enumerate(batches):
        assert_same(batch, source[step])


@pytest.mark.parametrize("taken", [0, 3])
def test_a_restored_iterator_goes_on_where_it_stood(plan, sequences, taken):
    """The state survives JSON, and may be set on an iterator that stands elsewhere."""
    batches = iterate(plan, sequences, ROWS)
    for _ in range(taken):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = list(batches)
    other = iterate(plan, sequences, ROWS)
    next(other)
    other.set_state(state)
    restored = list(other)
    assert len(restored) == len(expected) == len(plan.steps) - taken
    for left, right in zip(restored, expected, strict=True):
        assert_same(left, right)
