import dataclasses

import numpy as np
import pytest

from ecomjax.evaluation.predict import Prediction
from ecomjax.evaluation.run import score, to_record
from ecomjax.experiments import answers, tables
from ecomjax.experiments.document import Items, Table, markdown
from ecomjax.experiments.files import write_jsonl
from ecomjax.experiments.results import Comparison, Result, Shots, TaskResults, compare
from ecomjax.experiments.sections import EvaluationConfig
from ecomjax.experiments.transfer import Transfer
from ecomjax.tasks.base import Example, Invalid
from ecomjax.tasks.esci import LABELS, Esci

N = 200
TASK = Esci()
TEST = [
    Example(f"e{i}", {"query": f"q{i}", "product_title": f"<b>{i}</b>"}, LABELS[i % 4])
    for i in range(N)
]
SETTINGS = EvaluationConfig(resamples=200)


@pytest.fixture
def make(tmp_path):
    """Function (system, kind, share of right answers, ...) -> its result on the test examples."""

    def result(system, kind, right, size=8, seed=0, invalid=0, first=0):
        values = [e.target if i < right * N else LABELS[(i + 1) % 4] for i, e in enumerate(TEST)]
        values[:invalid] = [Invalid("?", "no label")] * invalid
        predictions = [Prediction(value, str(value)) for value in values]
        records = [to_record(*pair) for pair in zip(TEST, predictions, strict=True)][first:]
        file = tmp_path / f"{system}-{size}-{seed}.jsonl"
        write_jsonl(file, records)
        floor = kind == "floor"
        rows = dict(zip([e.id for e in TEST], TASK.statistics(values, TEST), strict=True))
        return Result(
            system,
            kind,
            size,
            size or 1000,
            seed,
            score(TASK, predictions, TEST, 200, 0),
            N - first,
            None if floor else True,
            "" if floor else f"runs/{system}",
            None if floor else file,
            dict(list(rows.items())[first:]),
        )

    return result


def together(*results, shots=None):
    return TaskResults(TASK, SETTINGS, TEST, results, shots, {8: 7})


def cells(blocks):
    (table,) = [block for block in blocks if isinstance(block, Table)]
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def test_systems_are_compared_with_the_best_floor_or_conventional_model_of_their_size(make):
    floors = make("low", "floor", 0.2), make("high", "floor", 0.5), make("high", "floor", 0.9, 0)
    tuned = make("LoRA", "lora", 0.8), make("LoRA", "lora", 0.8, size=0)
    rows = cells(tables.main_table(together(*floors, *tuned)))
    marks = [row["against the best conventional"] for row in rows]
    assert marks[:3] == ["", "", ""]
    assert marks[3].startswith("+0.3") and marks[3].endswith("] better than high")
    assert marks[4].startswith("-0.1") and marks[4].endswith("] worse than high")
    bert = make("bert", "conventional", 0.8)
    rows = cells(tables.main_table(together(*floors, bert, tuned[0])))
    assert rows[3]["against the best conventional"] == ""
    assert rows[4]["against the best conventional"].endswith("not distinguishable from bert")


def test_claims_of_a_table_hold_together(make):
    """A difference that alone would be claimed is not, as one of many that are none."""
    floor, slight = make("floor", "floor", 0.5), make("slight", "lora", 0.52)
    alone = compare(slight, floor, together())
    assert alone.verdict == "better" and 0.005 < alone.p < 0.05
    (_, row) = cells(tables.main_table(together(floor, slight)))
    assert "better than floor" in row["against the best conventional"]
    others = [make(f"other{i}", "lora", 0.5) for i in range(9)]
    row = cells(tables.main_table(together(floor, slight, *others)))[1]
    assert "not distinguishable" in row["against the best conventional"]


def test_the_comparison_is_of_the_examples_that_both_have_answered(make):
    ours, theirs = make("a", "lora", 0.8), make("b", "few_shot", 0.4, first=50)
    told = compare(ours, theirs, together())
    assert told.n == 150
    both = [TASK.summarize(np.sum(list(r.statistics.values())[-150:], 0)) for r in (ours, theirs)]
    assert told.difference == pytest.approx(both[0]["macro_f1"] - both[1]["macro_f1"])


def test_what_was_measured_answers_the_questions(make):
    results = together(
        make("floor", "floor", 0.3),
        make("zero-shot", "few_shot", 0.1),
        make("3-shot", "few_shot", 0.4),
        make("LoRA", "lora", 0.6),
        make("LoRA", "lora", 0.9, size=0),
        make("mixed (concatenate)", "mixed", 0.6),
        make("merged (ties)", "merged", 0.35),
        shots=Shots({}, 9, 3),
    )
    blocks = answers.answers([results], [])
    items = [[f"{a} {b}" for a, b in block.items] for block in blocks if isinstance(block, Items)]
    assert [len(told) for told in items] == [1, 1, 1, 1, 1, 2]
    size, conventional, mixed, merged, likeness, shots = (told[0] for told in items)
    assert "LoRA (1000 examples) minus LoRA (8 examples)" in size
    assert "LoRA (1000 examples) is better." in size
    assert "LoRA (8 examples) is better." in conventional
    assert conventional.endswith("A floor; conventional models are not measured here.")
    assert "mixed (concatenate) minus LoRA" in mixed and "not distinguishable;" in mixed
    assert "merged (ties) minus LoRA" in merged and "LoRA (8 examples) is better." in merged
    assert likeness.strip() == "not measured here."
    assert shots.startswith("esci: 3-shot minus LoRA") and "LoRA (8 examples) is better" in shots


def test_what_was_not_measured_is_said_not_to_be(make):
    items = [b.items for b in answers.answers([together()], []) if isinstance(b, Items)]
    assert items == [(("", "not measured here."),)] * 6


@pytest.mark.parametrize(
    ("told", "claim"),
    [
        ((0.2, 0.1, 0.3, 0.001, 148), "A is better"),
        ((-0.2, -0.3, -0.1, 0.001, 148), "B is better"),
        (
            (0.1, -0.05, 0.25, 0.07, 148),
            "not distinguishable; 148 examples tell apart a difference of 0.150 or more, "
            "one of 0.100 would need about 333",
        ),
        (
            (0.0, 0.0, 0.0, 1.0, 148),
            "not distinguishable; 148 examples tell apart a difference of 0.000 or more",
        ),
        (
            (0.4, 0.3, 0.5, 0.001, 64),
            "no claim; 64 examples are fewer than the 100 that it takes",
        ),
    ],
)
def test_a_claim_needs_an_interval_without_zero_and_enough_examples(told, claim):
    assert answers._claim(Comparison(*told), "A", "B") == claim


@pytest.mark.parametrize(
    ("sign", "count", "claim"),
    [(1, 9, "the more alike, the better"), (-1, 9, "the more alike, the worse"), (1, 3, "")],
)
def test_likeness_against_transfer_takes_enough_pairs(sign, count, claim):
    pairs = [Transfer(("a", "b"), "m", 0.1 * i, sign * 0.01 * i) for i in range(count)]
    told = answers._correlation(pairs)
    assert bool(told) is bool(claim)
    if told:
        assert f"{sign:+.2f} over 9 pairs" in told[0][1] and claim in told[0][1]


def test_confusion_counts_every_answer_and_what_could_not_be_read(make):
    (_, table) = tables.confusion(together(make("LoRA", "lora", 0.5, invalid=8)))
    counts = np.array([row[1:] for row in table.rows], int)
    assert table.header[1:] == (*LABELS, "invalid")
    assert counts.sum() == N and counts[:, -1].sum() == 8
    assert np.trace(counts) == N / 2 - 8


def test_examples_show_what_is_right_wrong_and_invalid_side_by_side(make, tmp_path):
    ours, theirs = make("a", "lora", 0.5, invalid=1), make("b", "mixed", 1.0)
    blocks = tables.examples(together(make("floor", "floor", 0.5), ours, theirs))
    rows = cells(blocks)
    assert [row["a, 8, seed 0"].split(":")[0] for row in rows] == ["invalid", "right", "wrong"]
    assert [row["b, 8, seed 0"].split(":")[0] for row in rows] == ["right", "right", "right"]
    assert [row["truth"] for row in rows] == [TEST[i].target for i in (0, 1, 100)]
    assert "<b>" in rows[0]["input"] and "<b>" not in markdown(blocks, tmp_path)


def test_details_have_every_metric_and_leave_open_what_a_system_has_none_of(make, tmp_path):
    floor = make("floor", "floor", 0.5)
    ranked = dataclasses.replace(floor.metrics["accuracy"], value=0.987)
    tuned = make("LoRA", "lora", 0.5)
    tuned = dataclasses.replace(tuned, metrics=tuned.metrics | {"ndcg": ranked})
    text = markdown(tables.details(together(floor, tuned)), tmp_path)
    (row,) = [line for line in text.splitlines() if line.startswith("| ndcg ")]
    assert [cell.strip()[:5] for cell in row.split("|")[2:-1]] == ["", "0.987"]
    assert "f1/Exact" in text and "also in train: 7." in text


def test_merges_stand_beside_the_adapter_of_each_task(make):
    results = together(make("LoRA", "lora", 0.75), make("merged (ties)", "merged", 0.5))
    rows = cells([b for b in tables.merge_matrix([results]) if isinstance(b, Table)])
    assert [row["esci, macro f1"] for row in rows] == ["0.750", "0.500"]
    assert tables.merge_matrix([together(make("LoRA", "lora", 0.75))]) == []
