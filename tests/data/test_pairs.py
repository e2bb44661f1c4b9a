import numpy as np

from ecomjax.data.encoded import Encoded, EncodedSet
from ecomjax.data.packing import make_plan
from ecomjax.data.pairs import assemble_pairs

SEQUENCES = [
    Encoded("a", (11, 12, 1, 51, 52, 53, 1), 3),
    Encoded("b", (13, 1, 54, 1), 2),
    Encoded("c", (14, 15, 16, 1, 1), 4),
]


def assemble(start):
    made = EncodedSet.of(SEQUENCES)
    order = [np.array([0, 1, 2])]
    plan = make_plan(
        made.lengths, order, prefixes=[0], packing="plain", row_length=11, batch_size=3
    )
    assert plan.step(0) == ((0, 1), (2,))
    return assemble_pairs(start)((*plan.step(0), ()), made, plan)


def test_a_source_has_the_segment_of_its_target():
    batch = assemble((5,))
    assert batch.sources.tolist()[0] == [11, 12, 1, 13, 1] + [0] * 6
    assert batch.source_positions.tolist()[0] == [0, 1, 2, 0, 1] + [0] * 6
    assert batch.source_segment_ids.tolist()[0] == [1, 1, 1, 2, 2] + [0] * 6
    assert batch.tokens.tolist()[0] == [5, 51, 52, 53, 5, 54] + [0] * 5
    assert batch.positions.tolist()[0] == [0, 1, 2, 3, 0, 1] + [0] * 5
    assert batch.segment_ids.tolist()[0] == [1, 1, 1, 1, 2, 2] + [0] * 5
    assert batch.targets.tolist()[0] == [51, 52, 53, 1, 54, 1] + [0] * 5
    assert batch.weights.tolist()[0] == [1] * 6 + [0] * 5
    # An empty answer is the end token alone; an empty row holds nothing.
    assert batch.tokens.tolist()[1] == [5] + [0] * 10
    assert batch.targets.tolist()[1] == [1] + [0] * 10
    assert not batch.segment_ids[2].any() and not batch.source_segment_ids[2].any()


def test_of_a_start_of_two_tokens_the_last_predicts():
    batch = assemble((5, 9))
    assert batch.tokens.tolist()[0] == [5, 9, 51, 52, 53, 5, 9, 54] + [0] * 3
    assert batch.targets.tolist()[0] == [0, 51, 52, 53, 1, 0, 54, 1] + [0] * 3
    assert batch.weights.tolist()[0] == [0, 1, 1, 1, 1, 0, 1, 1] + [0] * 3
