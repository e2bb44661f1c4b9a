import json

import numpy as np
import pytest

from ecomjax.data.sources import SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.evaluation.predict import Prediction
from ecomjax.evaluation.run import predictions_of_records, score, to_record
from ecomjax.experiments.files import jsonable
from ecomjax.tasks.base import Invalid
from ecomjax.tasks.esci import Esci
from ecomjax.tasks.queryner import QueryNer

TASKS = pytest.mark.parametrize("task", [Esci(), QueryNer()], ids=lambda task: task.name)


def answered(task):
    """Twelve examples; a third answered right, a third with another's answer, a third invalid."""
    examples = task.load(SyntheticSource(0, Sizes(1, 1, 12)), "test")
    predictions = []
    for i, example in enumerate(examples):
        text = [task.answer(example), task.answer(examples[i - 1]), "(shoe, B-color), so there"]
        if i % 3 == 1 and task.name == "queryner":
            text[1] = task.answer(example).replace("B-", "I-")
        predictions.append(Prediction(task.parse(text[i % 3], example), text[i % 3], {"x": -0.5}))
    kinds = [isinstance(prediction.value, Invalid) for prediction in predictions]
    assert any(kinds) and not all(kinds)
    return examples, predictions


@TASKS
def test_predictions_read_from_disk_score_as_they_did(task):
    examples, predictions = answered(task)
    direct = task.statistics([prediction.value for prediction in predictions], examples)
    records = [to_record(e, p) for e, p in zip(examples, predictions, strict=True)]
    read = [json.loads(json.dumps(jsonable(record))) for record in records]
    kept = predictions_of_records(read)
    assert kept == predictions
    again = task.statistics([prediction.value for prediction in kept], examples)
    np.testing.assert_array_equal(again, direct)
    for record, example, prediction in zip(read, examples, predictions, strict=True):
        assert (record["id"], record["text"]) == (example.id, prediction.text)
        assert (record["prediction"] is None) is (record["invalid"] is not None)
        assert record["scores"] == {"x": -0.5}


@TASKS
def test_scores_are_the_metrics_of_the_task_in_their_intervals(task):
    examples, predictions = answered(task)
    values = [prediction.value for prediction in predictions]
    found = score(task, predictions, examples, 200, 0)
    metrics = task.metrics(values, examples)
    assert found.keys() == metrics.keys()
    for name, one in found.items():
        assert one.value == metrics[name]
        assert one.low <= one.high
    main = found[task.headline]
    assert 0 < main.low < main.value < main.high < 1


@TASKS
def test_invalid_outputs_are_wrong_not_left_out(task):
    """An invalid output scores no better than leaving the example's entities or label untold."""
    examples, _ = answered(task)
    right = [example.target for example in examples]
    found = task.metrics([Invalid("?", "no tuple"), *right[1:]], examples)
    assert found["invalid_rate"] == pytest.approx(1 / 12)
    assert found[task.headline] < task.metrics(right[1:], examples[1:])[task.headline]
    everything = task.metrics([Invalid("?", "no tuple")] * 12, examples)
    assert everything["invalid_rate"] == 1.0 and everything[task.headline] == 0.0


def scored(scores):
    """Predictions by label scores, given as rows of the order of the labels."""
    return [
        Prediction(Esci.labels[int(np.argmax(row))], "", dict(zip(Esci.labels, row, strict=True)))
        for row in scores
    ]


def test_label_scores_give_calibration_and_ranking():
    """Sure and right: no error, and every query ranked as it should be. Sure and wrong: all."""
    task = Esci()
    examples = task.load(SyntheticSource(0, Sizes(1, 1, 24)), "test")
    right = [[0.0 if e.target == label else -50.0 for label in task.labels] for e in examples]
    found = score(task, scored(right), examples, 50, 0)
    assert found["ece"].value == pytest.approx(0, abs=1e-9)
    assert found["brier"].value == pytest.approx(0, abs=1e-9)
    relevant = {e.group for e in examples if e.target != "Irrelevant"}
    queries = {e.group for e in examples}
    assert found["ndcg"].value == pytest.approx(len(relevant) / len(queries))
    assert (found["ndcg"].n, found["accuracy"].n) == (len(queries), 24)
    wrong = [row[1:] + row[:1] for row in right]
    worse = score(task, scored(wrong), examples, 50, 0)
    assert worse["ece"].value == pytest.approx(1) and worse["brier"].value == pytest.approx(2)
    assert worse["ndcg"].value < found["ndcg"].value


def test_means_over_tokens_are_no_probabilities():
    examples = Esci().load(SyntheticSource(0, Sizes(1, 1, 6)), "test")
    predictions = scored([[-0.1, -0.2, -0.3, -0.4]] * 6)
    told = {how: score(Esci(), predictions, examples, 20, 0, how).keys() for how in ("sum", "mean")}
    assert told["sum"] - told["mean"] == {"ece", "brier", "ndcg", "no_gain_rate"}


def test_without_label_scores_there_is_no_calibration():
    examples, predictions = answered(Esci())
    assert not {"ece", "ndcg"} & score(Esci(), predictions, examples, 20, 0).keys()
