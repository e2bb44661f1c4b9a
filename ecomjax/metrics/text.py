"""Scores of generated texts against references and against the source they were made from.

ROUGE is `rouge_score`'s F-measure with its Porter stemmer on, everywhere; its words are
runs of a-z and 0-9, and the sentences of rougeLsum are lines. BLEU and chrF are those of
sacrebleu with its defaults (tokenizer 13a, exponential smoothing; character 6-grams, beta
2), on its scale of 0 to 100. Distinct and copied words are the lower-cased ones of
tokenizer 13a.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from ecomjax.metrics.ratios import ratio

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# Columns of the statistics.
_ROUGE = slice(0, 4)
_BLEU = slice(4, 14)
_CHRF = slice(14, 32)
_WORDS, _DISTINCT_WORDS, _PAIRS, _DISTINCT_PAIRS, _COPIED_PAIRS, _INVALID, _COUNT = range(32, 39)
_WIDTH = 39


def statistics(
    references: Sequence[Sequence[str]],
    predictions: Sequence[str | None],
    sources: Sequence[str],
) -> Float[np.ndarray, "n S"]:
    """Statistics of each example.

    Args:
        references: the true texts of each example, at least one.
        predictions: the output of each; None is an invalid one, which counts as empty.
        sources: what each output was made from.

    Returns:
        [n, S = 39]: ROUGE of the four types, the best over the references for each type
        (as `rouge_score.RougeScorer.score_multi`); sacrebleu's statistics of BLEU and of
        chrF; words, distinct words, word pairs, distinct ones and those that stand in the
        source; 1 for an invalid output; 1.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    if not len(references) == len(predictions) == len(sources):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} examples")
    if not all(references):
        raise ValueError("an example without references")
    rouge = RougeScorer(ROUGE, tokenizer=DefaultTokenizer(use_stemmer=True))
    bleu, chrf, tokenize = BLEU(), CHRF(), Tokenizer13a()
    rows = np.zeros((len(references), _WIDTH))
    for row, true, guess, source in zip(rows, references, predictions, sources, strict=True):
        text = guess or ""
        best = rouge.score_multi(true, text)
        row[_ROUGE] = [best[name].fmeasure for name in ROUGE]
        row[_BLEU] = _sacrebleu(bleu, true, text)
        row[_CHRF] = _sacrebleu(chrf, true, text)
        words, known = (tokenize(part.lower()).split() for part in (text, source))
        pairs, known_pairs = list(pairwise(words)), set(pairwise(known))
        row[_WORDS], row[_DISTINCT_WORDS] = len(words), len(set(words))
        row[_PAIRS], row[_DISTINCT_PAIRS] = len(pairs), len(set(pairs))
        row[_COPIED_PAIRS] = sum(pair in known_pairs for pair in pairs)
        row[_INVALID], row[_COUNT] = guess is None, 1
    return rows


def _sacrebleu(metric: Any, references: Sequence[str], text: str) -> list[float]:
    """One output's statistics for a metric of sacrebleu; its score is one of their sums."""
    # sacrebleu has no public name for these two steps; its own bootstrap takes them so.
    return metric._extract_corpus_statistics([text], [[one] for one in references])[0]


def summarize(totals: Float[np.ndarray, "*r S"]) -> dict[str, np.ndarray]:
    """Metrics of summed statistics; every 0/0 is 0.

    `distinct_1` and `distinct_2` are the share of an output's words and word pairs that
    are distinct within it, over all outputs weighted by their length. They fall where
    outputs repeat themselves. The form of Li et al. (2016, arXiv 1510.03055), distinct
    over the whole corpus, is no sum over examples and falls with the number of outputs.

    `copy_rate` is the share of word pairs of the outputs that stand in the source of
    theirs: one minus the novel bigrams of See et al. (2017, arXiv 1704.04368, figure 6).

    Args:
        totals: sums of rows of `statistics`, with any leading axes.

    Returns:
        rouge1, rouge2, rougeL and rougeLsum (means over the examples), bleu and chrf (of
        the corpus, 0 to 100), distinct_1, distinct_2, length_ratio (length of outputs by
        that of the closest references, as in BLEU), copy_rate and invalid_rate, each [*r].
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    count = totals[..., _COUNT]
    bleu = totals[..., _BLEU]
    return {
        **{name: ratio(totals[..., index], count) for index, name in enumerate(ROUGE)},
        "bleu": _scores(BLEU(), bleu),
        "chrf": _scores(CHRF(), totals[..., _CHRF]),
        "distinct_1": ratio(totals[..., _DISTINCT_WORDS], totals[..., _WORDS]),
        "distinct_2": ratio(totals[..., _DISTINCT_PAIRS], totals[..., _PAIRS]),
        "length_ratio": ratio(bleu[..., 0], bleu[..., 1]),
        "copy_rate": ratio(totals[..., _COPIED_PAIRS], totals[..., _PAIRS]),
        "invalid_rate": ratio(totals[..., _INVALID], count),
    }


def _scores(metric: Any, totals: Float[np.ndarray, "*r k"]) -> Float[np.ndarray, "*r"]:
    """Scores of summed statistics by a metric of sacrebleu."""
    rows = totals.reshape(-1, totals.shape[-1]).tolist()
    scores = [metric._compute_score_from_stats(row).score for row in rows]
    return np.array(scores, float).reshape(totals.shape[:-1])
