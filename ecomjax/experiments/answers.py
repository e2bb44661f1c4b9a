"""The questions of a study, and what its numbers say to them.

They are those of "Investigating LLM Applications in E-Commerce" (arXiv 2408.12779). Systems are
compared with the first seed of each, by the main metric, on the same test examples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ecomjax.experiments.document import Block, Heading, Items, Paragraph
from ecomjax.experiments.results import Comparison, Result, TaskResults, compare
from ecomjax.experiments.tables import reference
from ecomjax.experiments.transfer import Transfer
from ecomjax.metrics.statistics import (
    FEWEST_EXAMPLES,
    LEVEL,
    detectable,
    examples_needed,
    holm,
)

FEWEST_PAIRS = 4
"""Of tasks, below which ranks cannot tell anything."""

NOT_MEASURED = "not measured here"

QUESTIONS = (
    "How much training data does a LoRA-tuned model need?",
    "How does it compare with the conventional models of industry?",
    "One adapter for all tasks, or one for each?",
    "Does it help to merge adapters, within a task and between tasks?",
    "Do adapters of tasks that are alike merge better?",
    "Does few-shot prompting beat a tuned model?",
)

Pair = tuple[TaskResults, Result, Result]
"""A task and two systems on it; the first is compared with the second."""


def answers(found: Sequence[TaskResults], transfers: Sequence[Transfer]) -> list[Block]:
    """Every question, with an item for each comparison that was measured.

    Args:
        found: of every task.
        transfers: how alike the adapters of pairs of tasks are, and what merging them gave.
    """
    told = (
        _claims(_by_size(found)),
        _claims(_against_conventional(found)),
        _claims(_of_kinds(found, "mixed", "lora")),
        _claims(_of_kinds(found, "merged", "lora")),
        _correlation(transfers),
        _claims(_against_few_shot(found)),
    )
    blocks: list[Block] = [Heading(2, "What the numbers say")]
    for number, (question, items) in enumerate(zip(QUESTIONS, told, strict=True), 1):
        blocks.append(Paragraph(f"{number}. {question}"))
        blocks.append(Items(tuple(items) or (("", f"{NOT_MEASURED}."),)))
    return blocks


def _by_size(found: Sequence[TaskResults]) -> Iterator[Pair]:
    """The adapter of the most training examples against that of each smaller number."""
    for results in found:
        tuned = sorted(_first_seed(results.of("lora")), key=lambda one: one.train_size)
        for fewer in tuned[:-1]:
            yield results, tuned[-1], fewer


def _against_conventional(found: Sequence[TaskResults]) -> Iterator[Pair]:
    for results in found:
        for tuned in _first_seed(results.of("lora")):
            if (other := reference(results, tuned.size)) is not None:
                yield results, tuned, other


def _of_kinds(found: Sequence[TaskResults], kind: str, other: str) -> Iterator[Pair]:
    """All systems of a kind against the one of the other kind that has their size."""
    for results in found:
        for ours in _first_seed(results.of(kind)):
            for theirs in results.of(other, ours.size, ours.seed):
                yield results, ours, theirs


def _against_few_shot(found: Sequence[TaskResults]) -> Iterator[Pair]:
    """The number of demonstrations that validation has chosen against every tuned adapter."""
    for results in found:
        if results.shots is None:
            continue
        chosen = "zero-shot" if results.shots.chosen == 0 else f"{results.shots.chosen}-shot"
        for prompted in results.of("few_shot"):
            if prompted.system == chosen:
                for tuned in _first_seed(results.of("lora")):
                    yield results, prompted, tuned


def _first_seed(known: Sequence[Result]) -> list[Result]:
    """Of each size the results of its first seed."""
    return [one for one in known if one.seed == known[0].seed]


def _claims(pairs: Iterator[Pair]) -> list[tuple[str, str]]:
    """An item for each comparison; p-values are adjusted for all of them together."""
    compared = [(pair, compare(pair[1], pair[2], pair[0])) for pair in pairs]
    adjusted = holm({str(i): told.p for i, (_, told) in enumerate(compared)})
    items = []
    for i, ((results, ours, theirs), told) in enumerate(compared):
        told = dataclasses.replace(told, p=adjusted[str(i)])
        metric = results.headline.replace("_", " ")
        names = [
            f"{one.system} ({one.train_size} examples)" if one.kind == "lora" else one.system
            for one in (ours, theirs)
        ]
        note = ""
        if theirs.kind == "floor":
            note = f" A floor; conventional models are {NOT_MEASURED}."
        items.append(
            (
                f"{results.task.name}:",
                f"{names[0]} minus {names[1]}, {metric}: {told.difference:+.3f} "
                f"[{told.low:+.3f}, {told.high:+.3f}], paired bootstrap over {told.n} examples, "
                f"p {told.p:.4f}: {_claim(told, *names)}.{note}",
            )
        )
    return items


def _claim(told: Comparison, ours: str, theirs: str) -> str:
    """What may be said of two systems."""
    if told.n < FEWEST_EXAMPLES:
        return f"no claim; {told.n} examples are fewer than the {FEWEST_EXAMPLES} that it takes"
    if told.verdict != "no claim":
        return f"{ours if told.verdict == 'better' else theirs} is better"
    claim = (
        f"not distinguishable; {told.n} examples tell apart a difference of "
        f"{detectable(told.low, told.high):.3f} or more"
    )
    needed = examples_needed(told.difference, told.low, told.high, told.n)
    if needed > told.n and math.isfinite(needed):
        claim += f", one of {abs(told.difference):.3f} would need about {needed:,.0f}"
    return claim


def _correlation(transfers: Sequence[Transfer]) -> list[tuple[str, str]]:
    """Whether pairs whose adapters are more alike merge better, by Spearman's rank correlation."""
    if len(transfers) < FEWEST_PAIRS:
        return []
    from scipy.stats import spearmanr

    found: Any = spearmanr([one.cosine for one in transfers], [one.change for one in transfers])
    rank, p = float(found.statistic), float(found.pvalue)
    if not math.isfinite(rank):
        return []
    claim = "the more alike, the " + ("better" if rank > 0 else "worse")
    return [
        (
            "all pairs:",
            f"rank correlation of cosine and of what merging gave {rank:+.2f} over "
            f"{len(transfers)} pairs, p {p:.3f}: {claim if p < LEVEL else 'not distinguishable'}.",
        )
    ]
