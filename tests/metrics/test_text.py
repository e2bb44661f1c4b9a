import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomjax.metrics import text
from ecomjax.metrics.statistics import bootstrap

WORDS = st.sampled_from(
    "the a cat cats sat sitting on mat mats, big BIG 3.5 don't U.S. e-mail &amp; naïve 猫 \n".split(
        " "
    )
)
SENTENCES = st.lists(WORDS, max_size=12).map(" ".join)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)


@st.composite
def corpora(draw, texts=SENTENCES):
    """References of each example (one to three), predictions and sources."""
    size = draw(st.integers(1, 5))
    several = st.lists(texts, min_size=1, max_size=3)
    parts = (several, texts, texts)
    return tuple(draw(st.lists(part, min_size=size, max_size=size)) for part in parts)


def scores(references, predictions, sources=None):
    rows = text.statistics(references, predictions, sources or [""] * len(references))
    return {name: float(value) for name, value in text.summarize(rows.sum(0)).items()}


def streams(references):
    """References as sacrebleu wants them: the first of every example, the second, ..."""
    longest = max(map(len, references))
    return [[r[i] if i < len(r) else None for r in references] for i in range(longest)]


@settings(max_examples=500, deadline=None)
@given(corpora(SENTENCES | ANY_TEXT))
def test_rouge_equals_rouge_score(corpus):
    from rouge_score.rouge_scorer import RougeScorer

    references, predictions, sources = corpus
    scorer = RougeScorer(text.ROUGE, use_stemmer=True)
    theirs = [scorer.score_multi(*pair) for pair in zip(references, predictions, strict=True)]
    ours = scores(references, predictions, sources)
    for name in text.ROUGE:
        mean = np.mean([score[name].fmeasure for score in theirs])
        assert ours[name] == pytest.approx(mean, abs=1e-12)


@settings(max_examples=500, deadline=None)
@given(corpora(SENTENCES | ANY_TEXT))
def test_bleu_and_chrf_equal_sacrebleu(corpus):
    import sacrebleu

    references, predictions, sources = corpus
    ours = scores(references, predictions, sources)
    bleu = sacrebleu.corpus_bleu(predictions, streams(references))
    chrf = sacrebleu.corpus_chrf(predictions, streams(references))
    assert ours["bleu"] == pytest.approx(bleu.score, abs=1e-9)
    assert ours["chrf"] == pytest.approx(chrf.score, abs=1e-9)
    assert ours["length_ratio"] == pytest.approx(bleu.ratio, abs=1e-12)


def test_stemming_is_on():
    assert (
        scores([["two cats"]], ["two cat"])["rouge1"] == 1.0 > scores([["cat"]], ["dog"])["rouge1"]
    )


def test_a_copy_of_the_reference_is_perfect():
    line = "a light grey duvet cover of pure cotton"
    ours = scores([["something else", line]], [line], [line])
    perfect = {*text.ROUGE, "distinct_1", "distinct_2", "length_ratio", "copy_rate"}
    assert all(ours[name] == pytest.approx(1.0) for name in perfect)
    assert ours["bleu"] == pytest.approx(100.0) and ours["chrf"] == pytest.approx(100.0)


def test_repeated_and_copied_words_by_hand():
    # Words a b a b a; pairs ab ba ab ba, of which ab stands in the first source. The
    # second output has two words and one pair, which is in its source.
    ours = scores([["x"], ["x"]], ["a b a b a", "New shoes"], ["so A b", "new shoes!"])
    assert ours["distinct_1"] == pytest.approx((2 + 2) / (5 + 2))
    assert ours["distinct_2"] == pytest.approx((2 + 1) / (4 + 1))
    assert ours["copy_rate"] == pytest.approx((2 + 1) / (4 + 1))


def test_an_invalid_output_counts_as_an_empty_one():
    line = "red shoes for children"
    references = [[line, "shoes"], ["a blue shirt"]]
    invalid = scores(references, [line, None])
    empty = scores(references, [line, ""])
    assert invalid.pop("invalid_rate") == 0.5
    assert empty.pop("invalid_rate") == 0.0
    assert invalid == empty
    assert invalid["rouge1"] == 0.5
    assert invalid["bleu"] < scores(references[:1], [line])["bleu"]


def test_summaries_map_over_leading_axes_and_can_be_resampled():
    rows = text.statistics([["a b"], ["c d e"]], ["a c", None], ["a", "d"])
    stacked = text.summarize(rows[:, None])
    for index in range(2):
        for name, value in text.summarize(rows[index]).items():
            assert stacked[name].shape == (2, 1)
            assert stacked[name][index, 0] == value
    assert set(bootstrap(rows, text.summarize, 10)) == set(stacked)


def test_no_outputs_is_zero_everywhere():
    assert set(scores([["a"]], [None]).values()) == {0.0, 1.0}
    assert all(value == 0.0 for value in text.summarize(np.zeros(39)).values())


@pytest.mark.parametrize(
    ("references", "predictions", "message"),
    [([["a"]], ["a", "b"], "2 predictions for 1"), ([[]], ["a"], "without references")],
)
def test_what_does_not_fit_is_refused(references, predictions, message):
    with pytest.raises(ValueError, match=message):
        text.statistics(references, predictions, ["s"])
