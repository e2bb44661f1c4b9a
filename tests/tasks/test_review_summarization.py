import pytest

from ecomjax.data.sources import SPLITS, LocalSource, Row
from ecomjax.errors import UserError
from ecomjax.tasks.base import Invalid, Reading, Skipped
from ecomjax.tasks.review_summarization import ReviewSummarization

PLAIN = {
    "product_id": "B1",
    "category": "toys",
    "reviews": [" one ", "", "two", "three", "four", "five"],
    "ratings": [5.0, 1.0, 3.0, 5.0, 5.0, 2.0],
    "summaries": ["good", " fine "],
}


def review(text, rating=5, votes=0, **changes):
    given = {"title": "unseen", "text": text, "rating": rating, "helpful_votes": votes}
    return given | changes


RAW = {
    "website_summaries": [
        {"verdict": " Buy it. ", "pros": ["light", " ", "cheap "], "cons": ["loud"]},
        {"verdict": "second", "pros": ["never"], "cons": []},
    ],
    "customer_reviews": [
        review("middling", 3, 9),
        review("good", 4, 2),
        review("bad", 1, 2),
        review("great", 5.0, 7),
        review("worse", 2, None),
        review("late", 5, 2),
    ],
    "product_meta": {"title": "A toy"},
}


def example(values, task=None, **changes):
    return (task or ReviewSummarization()).example(Row(values | changes, "reviews/train.jsonl:3"))


def test_first_reviews_where_no_votes_are_known_and_every_summary_is_a_reference():
    found = example(PLAIN)
    assert found.id == "B1" and found.target == ("good", "fine")
    task = ReviewSummarization()
    assert task.user(found) == "Review 1: one\nReview 2: two\nReview 3: three\nReview 4: four"
    assert task.answer(found) == "good" and task.source(found).startswith("summarize: Review 1")


@pytest.mark.parametrize(
    ("target", "reviews", "shown", "answer"),
    [
        ("verdict", 4, ("middling", "great", "good", "bad"), "Buy it."),
        ("pros", 2, ("great", "good"), "light\ncheap"),
        ("pros", 9, ("great", "good", "late"), "light\ncheap"),
        ("cons", 4, ("bad", "worse"), "loud"),
    ],
)
def test_most_helpful_reviews_of_the_fitting_ratings(target, reviews, shown, answer):
    task = ReviewSummarization(target, reviews)
    found = example(RAW, task)
    assert found.inputs["reviews"] == shown
    assert found.target == (answer,) and task.answer(found) == answer


def test_ids_of_raw_rows():
    assert example(RAW, product_id="P").id == "P"
    assert example(RAW, product_id="P", example_id=4).id == "4"
    assert example(RAW).id == example(RAW).id != example(RAW, product_meta={}).id


@pytest.mark.parametrize(
    ("target", "changes", "reason"),
    [
        ("pros", {"website_summaries": [{"verdict": "v", "pros": []}]}, "no pros"),
        ("cons", {"website_summaries": [{"verdict": "v", "cons": None}]}, "no cons"),
        ("cons", {"website_summaries": [{"verdict": "v"}]}, "no cons"),
        ("pros", {"customer_reviews": [review("x", 3)]}, "no review rated above 3"),
        ("cons", {"customer_reviews": [review("x", None)]}, "no review rated below 3"),
    ],
)
def test_products_left_out(target, changes, reason):
    assert example(RAW, ReviewSummarization(target), **changes) == Skipped(reason)


@pytest.mark.parametrize(
    ("values", "target", "changes", "message"),
    [
        (PLAIN, "pros", {}, r"a row without pros: reviews/train.jsonl:3; use the target verdict"),
        (PLAIN, "verdict", {"summaries": [" "]}, "column 'summaries': .* must hold a text"),
        (PLAIN, "verdict", {"reviews": []}, "column 'reviews': .* must hold a text"),
        (PLAIN, "verdict", {"reviews": [3]}, "column 'reviews': .* must hold texts"),
        (PLAIN, "verdict", {"reviews": None}, "bad value null in column 'reviews'"),
        (RAW, "verdict", {"website_summaries": []}, "column 'website_summaries': .* at least one"),
        (RAW, "verdict", {"website_summaries": ["x"]}, "must be a list of objects"),
        (RAW, "verdict", {"website_summaries": [{"verdict": ""}]}, "a verdict that is not blank"),
        (RAW, "verdict", {"website_summaries": [{"verdict": 3}]}, "must hold texts"),
        (RAW, "pros", {"website_summaries": [{"pros": "x"}]}, "must hold pros as a list"),
        (RAW, "verdict", {"customer_reviews": [review(None)]}, "column 'customer_reviews'"),
        (RAW, "verdict", {"customer_reviews": [review("x", votes="2")]}, "helpful_votes as a num"),
        (RAW, "cons", {"customer_reviews": [review("x", "5")]}, "must hold rating as a number"),
    ],
)
def test_bad_rows(values, target, changes, message):
    with pytest.raises(UserError, match=message):
        example(values, ReviewSummarization(target), **changes)


def test_bad_options():
    with pytest.raises(UserError, match=r"unknown target 'title': task .*known: verdict, pros"):
        ReviewSummarization("title")
    with pytest.raises(UserError, match="show at least one"):
        ReviewSummarization(reviews=0)


def test_scores():
    task, found = ReviewSummarization(), example(PLAIN)
    assert task.parse("\n good ", found) == "good"
    assert task.parse(" \n", found) == Invalid(" \n", "no text")
    metrics = task.metrics(["fine", Invalid("", "no text")], [found, found])
    assert metrics["rougeL"] == metrics["invalid_rate"] == 0.5


def test_real_rows(shared_data):
    task, source = ReviewSummarization(), LocalSource(shared_data)
    for split, size in zip(SPLITS, (28, 12, 20), strict=True):
        report = Reading()
        rows = task.load(source, split, report=report)
        assert report == Reading(kept=size)
        assert all(len(e.inputs["reviews"]) == 4 and len(e.target) == 3 for e in rows)
        answers = [task.parse(task.answer(e), e) for e in rows]
        assert task.metrics(answers, rows)["rougeL"] == pytest.approx(1)
