"""Tables of a study, for the terminal and for report.md; nothing is computed here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ecomjax.evaluation.run import Score
from ecomjax.experiments.config import StudyConfig, to_json
from ecomjax.metrics.statistics import FEWEST_EXAMPLES, detectable, examples_needed, verdict

if TYPE_CHECKING:
    from ecomjax.experiments.study import TaskScores

WARNING = "NOT A RESULT: a smoke run, on too little of everything to mean anything"

BESIDE = {
    "esci": ("accuracy",),
    "queryner": ("entity_f1_all_o",),
    "review_summarization": ("rouge1", "rouge2"),
    "description_generation": ("rouge1", "bleu"),
}
"""Metrics shown beside a task's main one."""


def tables(config: StudyConfig, scores: Sequence[TaskScores]) -> str:
    """One table for each task, in Markdown."""
    parts = [WARNING] if config.smoke else []
    for found in scores:
        parts += [f"## {found.task}", _table(found), _comparison(found)]
    return "\n\n".join(parts)


def render(
    config: StudyConfig,
    scores: Sequence[TaskScores],
    run: Mapping[str, Any],
    base: Mapping[str, Any],
) -> str:
    """The text of report.md.

    Args:
        config: of the study.
        scores: of its tasks.
        run: what run.json says of the study.
        base: which weights every system started from.
    """
    start = run["starts"][-1]
    facts = [
        f"- base: {base['name']} from {base['source']}, sha256 {base['sha256']}",
        f"- data: {config.data.source}{' ' + config.data.path if config.data.path else ''}",
        f"- machine: {start['platform']}, {start['cpus']} CPUs, "
        f"{start['devices']['count']} x {start['devices']['kind']}",
        f"- versions: {', '.join(f'{k} {v}' for k, v in start['versions'].items())}",
        f"- run {run['run_id']}, last started {start['time']}: `{' '.join(start['command'])}`",
    ]
    parts = [
        "# Few-shot prompting against a tuned adapter",
        tables(config, scores),
        "Brackets are 95 % bootstrap intervals over the test examples. Outputs that could not "
        "be read count as wrong and are given as the invalid rate. The number of "
        "demonstrations is chosen on validation; each system is scored once on test.",
    ]
    for found in scores:
        parts += [f"## {found.task} in detail", _shots(found), _details(found), _notes(found)]
    parts += ["## What was run", "\n".join(facts), "```json\n" + to_json(config) + "```"]
    return "\n\n".join(parts) + "\n"


def _table(found: TaskScores) -> str:
    columns = [found.headline, *BESIDE.get(found.task, ()), "invalid_rate"]
    rows = [
        [row.system, *(_show(row.metrics[metric]) for metric in columns), str(row.n)]
        for row in found.systems
    ]
    return _markdown(["system", *(c.replace("_", " ") for c in columns), "test examples"], rows)


def _comparison(found: TaskScores) -> str:
    difference, low, high, p = found.difference[found.headline]
    n = found.shared
    told = {"better": "LoRA is better", "worse": "few-shot is better"}
    claim = told.get(verdict(difference, low, high, p, n))
    if n < FEWEST_EXAMPLES:
        claim = f"no claim; {n} examples are fewer than the {FEWEST_EXAMPLES} that it takes"
    elif claim is None:
        claim = (
            f"no claim; {n} examples tell apart a difference of {detectable(low, high):.3f} or more"
        )
        needed = examples_needed(difference, low, high, n)
        if needed > n and math.isfinite(needed):
            claim += f", one of {abs(difference):.3f} would need about {needed:,.0f}"
    return (
        f"LoRA - {found.chosen}-shot, {found.headline.replace('_', ' ')}: {difference:+.3f} "
        f"[{low:+.3f}, {high:+.3f}], paired bootstrap over {n} examples, p {p:.4f}: {claim}."
    )


def _shots(found: TaskScores) -> str:
    rows = [
        [str(k), _show(score), "chosen" if k == found.chosen else ""]
        for k, score in found.shots.items()
    ]
    header = ["demonstrations", f"validation {found.headline} (n {found.validation_size})", ""]
    return _markdown(header, rows)


def _details(found: TaskScores) -> str:
    """Every metric of every system; floors have none of those that need label scores."""
    metrics = dict.fromkeys(metric for row in found.systems for metric in row.metrics)
    rows = [[m, *(_show(row.metrics.get(m)) for row in found.systems)] for m in metrics]
    return _markdown(["metric", *(row.system for row in found.systems)], rows)


def _notes(found: TaskScores) -> str:
    runs = ", ".join(f"{row.system}: `{row.run}`" for row in found.systems if row.run)
    return (
        f"{found.train_size} training examples; {found.train_overlap} test inputs are also in "
        f"train. Runs: {runs}."
    )


def _show(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns also line up in a terminal."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
