import numpy as np

from ecomjax.data.encoded import NO_CLASS, Encoded, EncodedSet, read_set, write_set
from ecomjax.data.labelled import assemble_labelled
from ecomjax.data.packing import make_plan
from ecomjax.data.pipeline import one_pass

SEQUENCES = [
    Encoded("a", (2, 7, 8, 3), 4, 1, ((0, NO_CLASS), (0, 4), (0, NO_CLASS), (0, NO_CLASS))),
    Encoded("b", (2, 9, 3, 5, 3), 5, 2, ((0, 6), *[(0, NO_CLASS)] * 2, *[(1, NO_CLASS)] * 2)),
    Encoded("c", (2, 3), 2, 3, ((0, 0), (0, NO_CLASS))),
]


def test_marks_come_back_from_memory_and_from_files(tmp_path):
    made = EncodedSet.of(SEQUENCES)
    assert list(made) == SEQUENCES and list(made[np.array([2, 0])]) == SEQUENCES[::-2]
    write_set(tmp_path, SEQUENCES, {})
    assert list(read_set(tmp_path)[0]) == SEQUENCES
    plain = Encoded("a", (1, 2), 1)
    assert EncodedSet.of([plain]).marks is None and list(EncodedSet.of([plain])) == [plain]


def test_rows_hold_classes_where_they_stand():
    made = EncodedSet.of(SEQUENCES)
    order = [np.arange(3)]
    plan = make_plan(made.lengths, order, prefixes=[0], packing="plain", row_length=7, batch_size=3)
    rows = plan.step(0)
    assert rows == ((1, 2), (0,))
    batch = assemble_labelled((*rows, ()), made, plan)
    assert batch.tokens.tolist()[0] == [2, 9, 3, 5, 3, 2, 3]
    assert batch.positions.tolist()[0] == [0, 1, 2, 3, 4, 0, 1]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 0, 0, 0], [0] * 7]
    assert batch.token_types.tolist()[0] == [0, 0, 0, 1, 1, 0, 0]
    assert batch.targets.tolist()[:2] == [[6, 0, 0, 0, 0, 0, 0], [0, 4, 0, 0, 0, 0, 0]]
    assert batch.weights.tolist() == [[1, 0, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0], [0] * 7]
    assert batch.groups.tolist() == [0, 0, 0]


def test_microbatches_hold_types_too():
    made = EncodedSet.of(SEQUENCES)
    batch = one_pass(made, "plain", 7, 3, 2, assemble_labelled)[0]
    assert batch.token_types.shape == batch.tokens.shape == (1, 2, 7)
