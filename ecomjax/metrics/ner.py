"""Entity F1 of tag sequences, by the rules of seqeval in its two modes, and of overlaps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ecomjax.metrics.ratios import f1, ratio

Entity = tuple[str, int, int]
"""Type, first token, last token."""

_OVERALL = 8
"""Columns of the statistics that are over all types; the last ones."""


def strict_entities(tags: Sequence[str]) -> set[Entity]:
    """Entities of IOB2 tags: a B- and the I- of its type that follow it.

    An I- that continues nothing is no entity (seqeval `mode="strict", scheme=IOB2`).
    """
    from seqeval.scheme import IOB2, Entities

    found = Entities([_iob(tags)], IOB2).entities[0]
    return {(entity.tag, entity.start, entity.end - 1) for entity in found}


def lenient_entities(tags: Sequence[str]) -> set[Entity]:
    """Entities as conlleval reads them: an I- that continues nothing begins an entity.

    This is seqeval's default mode.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    return set(get_entities(_iob(tags)))


def _iob(tags: Sequence[str]) -> list[str]:
    """The tags, with O for what is none, which seqeval fails or warns on."""
    return [tag if tag.startswith(("B-", "I-")) else "O" for tag in tags]


def overlap_credit(gold: set[Entity], predicted: set[Entity]) -> float:
    """Sum over pairs of a gold and a predicted entity: 1 for equal spans, 1/2 for overlap.

    Types do not matter. Every entity is in one pair at most; pairs are made from left to
    right, which makes as many as can be, since entities of one side do not overlap.
    """
    credit = 0.0
    left, right = (sorted(side[1:] for side in entities) for entities in (gold, predicted))
    i = j = 0
    while i < len(left) and j < len(right):
        (begin, end), (other_begin, other_end) = left[i], right[j]
        if end < other_begin:
            i += 1
        elif other_end < begin:
            j += 1
        else:
            credit += 1.0 if left[i] == right[j] else 0.5
            i, j = i + 1, j + 1
    return credit


def statistics(
    gold: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str] | None],
    tuples: Sequence[Sequence[str]],
    types: Sequence[str],
) -> Float[np.ndarray, "n S"]:
    """Counts of hits, predicted and gold entities of each example.

    Args:
        gold: the true tags.
        predicted: tags, as many as the gold ones; None is an invalid output, which
            counts as all O.
        tuples: the tags that stand in the output, however many there are; they count
            as all O where their number is not that of the gold tags.
        types: the entity types; every type in `gold` and `predicted` is one of them.

    Returns:
        [n, S = 3 * types + 8]: hits, predicted and gold entities by type (strict), then
        over all types hits and predicted entities of the tags (lenient), the same two of
        `tuples`, gold ones (lenient), `overlap_credit` (strict), 1 for an invalid output, 1.
    """
    if not len(gold) == len(predicted) == len(tuples):
        raise ValueError(f"{len(predicted)} predictions for {len(gold)} examples")
    rows = np.zeros((len(gold), 3 * len(types) + _OVERALL))
    place = {name: index for index, name in enumerate(types)}
    for row, true, guess, loose in zip(rows, gold, predicted, tuples, strict=True):
        if guess is not None and len(guess) != len(true):
            raise ValueError(f"{len(guess)} predicted tags for {len(true)} tokens")
        strict, strict_true = strict_entities(guess or ()), strict_entities(true)
        for column, entities in enumerate((strict & strict_true, strict, strict_true)):
            for name, _, _ in entities:
                row[3 * place[name] + column] += 1
        lenient, lenient_true = lenient_entities(guess or ()), lenient_entities(true)
        counted = lenient_entities(loose if len(loose) == len(true) else ())
        row[-_OVERALL:] = (
            len(lenient & lenient_true),
            len(lenient),
            len(counted & lenient_true),
            len(counted),
            len(lenient_true),
            overlap_credit(strict_true, strict),
            guess is None,
            1,
        )
    return rows


def summarize(totals: Float[np.ndarray, "*r S"], types: Sequence[str]) -> dict[str, np.ndarray]:
    """Metrics of summed statistics; every 0/0 is 0.

    `entity_f1_partial` is F1 of "partial boundary match regardless of type": precision and
    recall are `overlap_credit` by predicted and by gold entities (MUC-5, Chinchor &
    Sundheim 1993, with the credit of SemEval-2013 task 9.1, Segura-Bedmar et al. 2013).

    Args:
        totals: sums of rows of `statistics`, with any leading axes.
        types: the types given to `statistics`.

    Returns:
        entity_f1, entity_precision and entity_recall (strict, micro average over the
        types), f1/<type>, entity_f1_lenient (seqeval's default, of the same tags),
        entity_f1_partial, entity_f1_all_o (the study's own scorer: lenient, a query whose
        number of tuples is not its number of tokens counts as all O) and invalid_rate,
        each [*r].
    """
    overall = np.moveaxis(totals[..., -_OVERALL:], -1, 0)
    lenient_hits, lenient, all_o_hits, all_o, lenient_gold, credit, invalid, count = overall
    by_type = totals[..., :-_OVERALL].reshape(*totals.shape[:-1], len(types), 3)
    scores = f1(*np.moveaxis(by_type, -1, 0))
    hits, predicted, gold = np.moveaxis(by_type.sum(-2), -1, 0)
    return {
        "entity_f1": f1(hits, predicted, gold),
        "entity_precision": ratio(hits, predicted),
        "entity_recall": ratio(hits, gold),
        **{f"f1/{name}": scores[..., index] for index, name in enumerate(types)},
        "entity_f1_lenient": f1(lenient_hits, lenient, lenient_gold),
        "entity_f1_partial": f1(credit, predicted, gold),
        "entity_f1_all_o": f1(all_o_hits, all_o, lenient_gold),
        "invalid_rate": ratio(invalid, count),
    }
