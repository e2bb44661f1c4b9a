"""Entity F1 of tag sequences, by the rules of seqeval in its two modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from ecomjax.metrics.ratios import f1, ratio

Entity = tuple[str, int, int]
"""Type, first token, last token."""


def strict_entities(tags: Sequence[str]) -> set[Entity]:
    """Entities of IOB2 tags: a B- and the I- of its type that follow it.

    An I- that continues nothing is no entity (seqeval `mode="strict", scheme=IOB2`).
    """
    from seqeval.scheme import IOB2, Entities

    found = Entities([list(tags)], IOB2).entities[0]
    return {(entity.tag, entity.start, entity.end - 1) for entity in found}


def lenient_entities(tags: Sequence[str]) -> set[Entity]:
    """Entities as conlleval reads them: an I- that continues nothing begins an entity.

    This is seqeval's default mode.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    return set(get_entities(list(tags)))


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
        [n, S = 3 * types + 5]: hits, predicted and gold entities by type (strict), the
        same three over all types (lenient, of `tuples`), 1 for an invalid output, 1.
    """
    if not len(gold) == len(predicted) == len(tuples):
        raise ValueError(f"{len(predicted)} predictions for {len(gold)} examples")
    rows = np.zeros((len(gold), 3 * len(types) + 5))
    place = {name: index for index, name in enumerate(types)}
    for row, true, guess, loose in zip(rows, gold, predicted, tuples, strict=True):
        if guess is not None and len(guess) != len(true):
            raise ValueError(f"{len(guess)} predicted tags for {len(true)} tokens")
        for column, entities in enumerate(_compare(strict_entities, true, guess or ())):
            for name, _, _ in entities:
                row[3 * place[name] + column] += 1
        counted = loose if len(loose) == len(true) else ()
        row[-5:-2] = [len(entities) for entities in _compare(lenient_entities, true, counted)]
        row[-2:] = guess is None, 1
    return rows


def _compare(
    read: Callable[[Sequence[str]], set[Entity]], gold: Sequence[str], predicted: Sequence[str]
) -> tuple[set[Entity], set[Entity], set[Entity]]:
    """Hits, predicted and gold entities."""
    true, guess = read(gold), read(predicted)
    return true & guess, guess, true


def summarize(totals: Float[np.ndarray, "*r S"], types: Sequence[str]) -> dict[str, np.ndarray]:
    """Metrics of summed statistics; every 0/0 is 0.

    Args:
        totals: sums of rows of `statistics`, with any leading axes.
        types: the types given to `statistics`.

    Returns:
        entity_f1, entity_precision and entity_recall (strict, micro average over the
        types), f1/<type>, entity_f1_all_o (the study's own scorer: lenient, a query whose
        number of tuples is not its number of tokens counts as all O) and invalid_rate,
        each [*r].
    """
    by_type = totals[..., :-5].reshape(*totals.shape[:-1], len(types), 3)
    scores = f1(*np.moveaxis(by_type, -1, 0))
    hits, predicted, gold = np.moveaxis(by_type.sum(-2), -1, 0)
    return {
        "entity_f1": f1(hits, predicted, gold),
        "entity_precision": ratio(hits, predicted),
        "entity_recall": ratio(hits, gold),
        **{f"f1/{name}": scores[..., index] for index, name in enumerate(types)},
        "entity_f1_all_o": f1(totals[..., -5], totals[..., -4], totals[..., -3]),
        "invalid_rate": ratio(totals[..., -2], totals[..., -1]),
    }
