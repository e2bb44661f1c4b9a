import dataclasses

import pytest

from ecomjax.evaluation.run import Score
from ecomjax.experiments import report
from ecomjax.experiments.study import SystemScores, TaskScores


@pytest.fixture
def scores():
    def metrics(value):
        return {
            name: Score(value, value - 0.05, value + 0.05, 50)
            for name in ("macro_f1", "accuracy", "invalid_rate")
        }

    return TaskScores(
        task="esci",
        headline="macro_f1",
        train_size=100,
        seed=0,
        shots={0: Score(0.2, 0.1, 0.3, 20), 3: Score(0.4, 0.35, 0.45, 20)},
        validation_size=20,
        chosen=3,
        systems=(
            SystemScores("majority class", metrics(0.1), 50, None, ""),
            SystemScores("3-shot", metrics(0.4), 48, True, "runs/esci-few-shot"),
            SystemScores(
                "LoRA", metrics(0.6) | {"ndcg": Score(0.9, 0.8, 1, 9)}, 50, True, "runs/esci-lora"
            ),
        ),
        difference={"macro_f1": (0.2, 0.1, 0.3, 0.001)},
        shared=148,
        train_overlap=7,
    )


@pytest.fixture
def tables(make_config, scores):
    """Function (smoke, changes of the scores) -> what the terminal shows."""

    def make(smoke=False, **changes):
        config = make_config("study", "smoke" if smoke else "quickstart")
        return report.tables(config, [dataclasses.replace(scores, **changes)])

    return make


def test_a_row_for_each_system_in_columns_that_line_up(tables):
    lines = [line for line in tables().splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "system",
        "macro f1",
        "accuracy",
        "invalid rate",
        "test examples",
    ]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "majority class",
        "3-shot",
        "LoRA",
    ]
    assert lines[3].split("|")[2].strip() == "0.400 [0.350, 0.450]"
    assert lines[3].split("|")[5].strip() == "48"


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        ((0.2, 0.1, 0.3, 0.001), "LoRA is better"),
        ((-0.2, -0.3, -0.1, 0.001), "few-shot is better"),
        (
            (0.1, -0.05, 0.25, 0.07),
            "no claim; 148 examples tell apart a difference of 0.150 or more, "
            "one of 0.100 would need about 333",
        ),
        ((0.0, 0.0, 0.0, 1.0), "no claim; 148 examples tell apart a difference of 0.000 or more"),
    ],
)
def test_the_verdict_needs_an_interval_that_leaves_out_zero(tables, difference, verdict):
    shown = tables(difference={"macro_f1": difference})
    assert shown.rstrip().endswith(f"{verdict}.")
    assert f"LoRA - 3-shot, macro f1: {difference[0]:+.3f}" in shown
    assert "over 148 examples" in shown


def test_a_split_too_small_to_tell_systems_apart_makes_no_claim(tables):
    shown = tables(difference={"macro_f1": (0.4, 0.3, 0.5, 0.001)}, shared=64)
    assert shown.rstrip().endswith("no claim; 64 examples are fewer than the 100 that it takes.")


def test_only_a_smoke_run_is_headed_not_a_result(tables):
    assert tables(smoke=True).startswith("NOT A RESULT")
    assert "NOT A RESULT" not in tables()


@pytest.mark.parametrize("smoke", [True, False])
def test_the_report_holds_table_shots_overlap_config_and_origin(make_config, scores, smoke):
    config = make_config("study", "smoke" if smoke else "quickstart")
    start = {
        "time": "20250101T000000Z",
        "command": ["launch.study", "--workdir=w"],
        "platform": "Linux",
        "cpus": 2,
        "devices": {"kind": "cpu", "count": 1},
        "versions": {"jax": "0.10.2"},
    }
    run = {"run_id": "R1", "starts": [start | {"time": "earlier"}, start]}
    base = {"name": "tiny", "source": "local", "sha256": "ab" * 32}
    text = report.render(config, [scores], run, base)
    assert report.tables(config, [scores]) in text
    assert ("NOT A RESULT" in text) is smoke
    assert "| 3 " in text and "chosen" in text and "validation macro_f1 (n 20)" in text
    for told in ("ab" * 32, "jax 0.10.2", "run R1", "20250101T000000Z", "--workdir=w", "2 CPUs"):
        assert told in text
    assert "100 training examples; 7 test inputs are also in train" in text
    (ranked,) = [line for line in text.splitlines() if line.startswith("| ndcg ")]
    assert [cell.strip() for cell in ranked.split("|")[2:-1]] == ["", "", "0.900 [0.800, 1.000]"]
    assert "LoRA: `runs/esci-lora`" in text and '"experiment": "study"' in text
    assert "earlier" not in text
