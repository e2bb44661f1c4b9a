import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from ecomjax.data.encoded import Encoded, EncodedSet, Joined, write_set
from ecomjax.data.mixture import Mixture, draw_orders
from ecomjax.data.packing import assemble, make_plan
from ecomjax.data.pipeline import StepSource, iterate

ROWS = 4


@pytest.fixture(scope="module")
def sequences():
    """Four tasks of different sizes."""
    rng = np.random.default_rng(0)
    sets = []
    for task, size in enumerate((23, 4, 11, 7)):
        rows = [(task + 1, *rng.integers(1, 60, n).tolist()) for n in rng.integers(2, 8, size)]
        sets.append(EncodedSet.of(Encoded(str(i), tuple(r), 2) for i, r in enumerate(rows)))
    return Joined(sets)


@pytest.fixture(scope="module")
def plan(sequences):
    mixture = Mixture("temperature", temperature=2.0)
    orders = draw_orders([len(s) for s in sequences.sets], mixture, 0, 2)
    return make_plan(
        sequences.lengths,
        orders,
        prefixes=[1, 1, 1, 1],
        packing="shared_prefix",
        row_length=8,
        batch_size=5,
        rows_multiple=ROWS,
        groups=sequences.groups,
    )


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_a_step_is_its_rows_cut_into_microbatches(plan, sequences):
    source = StepSource(plan, sequences, ROWS)
    assert len(source) == len(plan)
    for step in range(len(plan)):
        batch = source[step]
        assert batch.tokens.shape == (plan.rows // ROWS, ROWS, 8)
        joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
        assert_same(joined, assemble(plan.step(step), sequences, plan))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_slices_of_all_hosts_are_the_batch_of_one(plan, sequences, hosts):
    whole = StepSource(plan, sequences, ROWS)
    parts = [StepSource(plan, sequences, ROWS, host, hosts) for host in range(hosts)]
    for step in range(len(plan)):
        slices = [part[step] for part in parts]
        assert {s.tokens.shape[1] for s in slices} == {ROWS // hosts}
        together = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *slices)
        assert_same(together, whole[step])


def test_rows_that_do_not_divide_over_hosts_are_refused(plan, sequences):
    with pytest.raises(ValueError, match=r"4 rows .* 3 hosts"):
        StepSource(plan, sequences, ROWS, 0, 3)


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
    assert len(restored) == len(expected) == len(plan) - taken
    for left, right in zip(restored, expected, strict=True):
        assert_same(left, right)


WALK = """
import sys
from pathlib import Path
from ecomjax.data.encoded import Joined, read_set, shared_prefix
from ecomjax.data.mixture import Mixture, draw_orders
from ecomjax.data.packing import make_plan
from ecomjax.data.pipeline import iterate

def anonymous():
    (line,) = [x for x in open("/proc/self/status") if x.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

def batches():
    joined = Joined([read_set(Path(sys.argv[1]))[0]])
    plan = make_plan(
        joined.lengths,
        draw_orders([len(joined)], Mixture(), 0, 1),
        prefixes=[shared_prefix(joined.sets[0])],
        packing="shared_prefix",
        row_length=2048,
        batch_size=128,
    )
    return iterate(plan, joined, plan.rows)

next(batches())
before, most, examples = anonymous(), 0, 0
for batch in batches():
    examples += int(batch.segment_ids.max(axis=-1).sum())
    most = max(most, anonymous())
print(examples, most - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_shuffled_epoch_is_walked_in_little_memory(tmp_path):
    """Of 400 MB of tokens, no more is held than a few numbers of each example."""
    examples, starts = 200_000, [tuple(range(i, 500)) for i in range(9)]
    write_set(tmp_path, (Encoded(str(i), starts[i % 9], 400) for i in range(examples)), {})
    assert (tmp_path / "tokens").stat().st_size > 390e6
    done = subprocess.run(
        [sys.executable, "-c", WALK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    walked, grown = map(int, done.stdout.split())
    assert walked == examples
    assert grown < 150e6
