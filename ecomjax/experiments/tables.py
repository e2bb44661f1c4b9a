"""Tables of a study: what was measured on a task, how it was chosen, and what it cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ecomjax.evaluation.run import Score
from ecomjax.experiments.document import Block, Heading, Paragraph, Table
from ecomjax.experiments.files import read_json, read_jsonl
from ecomjax.experiments.grid import Choice, Run
from ecomjax.experiments.results import Comparison, Result, TaskResults, compare
from ecomjax.experiments.workdir import Workdir
from ecomjax.hf.peft import WEIGHTS
from ecomjax.metrics.statistics import FEWEST_EXAMPLES, holm

BESIDE = {
    "esci": ("accuracy",),
    "queryner": ("entity_f1_all_o",),
    "review_summarization": ("rouge1", "rouge2"),
    "description_generation": ("rouge1", "bleu"),
}
"""Metrics shown beside a task's main one."""

SHOWN = 300
"""Characters of an output that are shown."""


def reference(found: TaskResults, size: int) -> Result | None:
    """The best conventional model of a size, or the best floor where none was trained.

    It is the best on test, which favours it, and so never what is compared with it.
    """
    known = found.of("conventional", size) or found.of("floor", size)
    return max(known, key=lambda one: one.metrics[found.headline].value, default=None)


def main_table(found: TaskResults) -> list[Block]:
    """Every system with its scores, and how it compares with the reference of its size."""
    compared: dict[int, tuple[str, Comparison]] = {}
    for place, result in enumerate(found.results):
        other = reference(found, result.size)
        if other is not None and result.kind not in ("floor", other.kind):
            compared[place] = other.system, compare(result, other, found)
    adjusted = holm({str(place): told.p for place, (_, told) in compared.items()})
    columns = [found.headline, *BESIDE.get(found.task.name, ()), "invalid_rate"]
    rows = []
    for place, result in enumerate(found.results):
        mark = ""
        if place in compared:
            name, told = compared[place]
            mark = against(dataclasses.replace(told, p=adjusted[str(place)]), name)
        scores = [show(result.metrics[metric]) for metric in columns]
        counts = (str(result.train_size), str(result.seed))
        rows.append((result.system, *counts, *scores, str(result.n), mark))
    header = ("system", "train examples", "seed", *map(spelled, columns), "test examples")
    return [Table((*header, "against the best conventional"), tuple(rows))]


def against(told: Comparison, name: str) -> str:
    """A comparison in a cell: the difference, its interval, and what may be claimed."""
    claims = {
        "better": "better than",
        "worse": "worse than",
        "no claim": "not distinguishable from",
    }
    claim = f"{claims[told.verdict]} {name}"
    if told.n < FEWEST_EXAMPLES:
        claim = f"too few examples to compare with {name}"
    return f"{told.difference:+.3f} [{told.low:+.3f}, {told.high:+.3f}] {claim}"


def shots_table(found: TaskResults) -> list[Block]:
    """The validation score of every number of demonstrations."""
    if found.shots is None:
        return []
    rows = tuple(
        (str(k), show(score), "chosen" if k == found.shots.chosen else "")
        for k, score in found.shots.scores.items()
    )
    metric = f"validation {spelled(found.headline)}"
    header = ("demonstrations", f"{metric} of {found.shots.n} examples", "")
    return [Heading(3, "Few-shot prompting"), Table(header, rows)]


def tuning_table(runs: Sequence[Run], study: Workdir) -> list[Block]:
    """What the candidates of every trained system reached on validation."""
    rows = []
    for run in runs:
        if isinstance(run.config, Choice) and study.subrun(run.name).done.exists():
            told = read_json(study.subrun(run.name).chosen)
            rows += [
                (name, "" if value is None else f"{value:.4f}", told["chosen"] == name)
                for name, value in told["validation"].items()
            ]
    if not rows:
        return []
    cells = tuple((name, value, "chosen" if chosen else "") for name, value, chosen in rows)
    return [Heading(2, "Tuning"), Table(("run", "best on validation", ""), cells)]


def merge_matrix(found: Sequence[TaskResults]) -> list[Block]:
    """What each way of merging gives on each task, beside the adapter of the task alone."""
    ways = dict.fromkeys(one.system for results in found for one in results.of("merged"))
    rows = []
    for way in ("LoRA", *ways):
        cells = []
        for results in found:
            known = [one for one in results.results if one.system == way]
            cells.append(", ".join(f"{one.metrics[results.headline].value:.3f}" for one in known))
        rows.append((way, *cells))
    if not ways:
        return []
    header = ("adapter", *(f"{one.task.name}, {spelled(one.headline)}" for one in found))
    note = "LoRA is the adapter of each task alone; of several sizes or seeds, in their order."
    return [Heading(2, "Merging"), Table(header, tuple(rows)), Paragraph(note)]


def cost_table(runs: Sequence[Run], study: Workdir) -> list[Block]:
    """What every run took: seconds, tokens trained on, bytes stored."""
    rows = []
    for run in runs:
        folder = study.subrun(run.name)
        if not folder.done.exists():
            continue
        done = read_json(folder.done)
        seconds = f"{done['seconds']:.0f}"
        if done["starts"] > 1:
            seconds += f" (the last of {done['starts']} starts)"
        trained = read_jsonl(folder.metrics) if folder.metrics.exists() else []
        tokens = [
            f"{sum(line.get(f'train/{key}') or 0 for line in trained):,.0f}" if trained else ""
            for key in ("tokens", "target_tokens")
        ]
        weights = folder.adapter / WEIGHTS
        stored = f"{weights.stat().st_size / 2**20:.1f}" if weights.exists() else ""
        rows.append((run.name, seconds, *tokens, stored))
    header = ("run", "seconds", "tokens computed", "tokens learnt from", "MiB of the adapter")
    return [Heading(2, "What it cost"), Table(header, tuple(rows))] if rows else []


def details(found: TaskResults) -> list[Block]:
    """Every metric of every system; those of single labels or types apart."""
    names = dict.fromkeys(metric for one in found.results for metric in one.metrics)
    single = {name: name for name in names if "/" in name}
    overall = {name: spelled(name) for name in names if "/" not in name}
    header = ("metric", *map(_unique, found.results))
    blocks: list[Block] = []
    for title, metrics in (("Every metric", overall), ("By label or type", single)):
        rows = tuple(
            (told, *(show(one.metrics.get(name)) for one in found.results))
            for name, told in metrics.items()
        )
        if rows:
            blocks += [Heading(3, title), Table(header, rows)]
    overlaps = dict.fromkeys(found.train_overlap.values())
    note = f"Test inputs that are also in train: {', '.join(map(str, overlaps))}."
    return [*blocks, Paragraph(note)]


def confusion(found: TaskResults) -> list[Block]:
    """Of a task with labels, what each system answered for each of them."""
    labels = found.task.labels
    if labels is None:
        return []
    blocks: list[Block] = []
    for result in found.results:
        if result.predictions is None:
            continue
        counts = dict.fromkeys(((g, p) for g in labels for p in (*labels, None)), 0)
        for record in read_jsonl(result.predictions):
            counts[record["target"], record["prediction"]] += 1
        rows = tuple((g, *(str(counts[g, p]) for p in (*labels, None))) for g in labels)
        header = ("truth, and what was answered", *labels, "invalid")
        blocks += [Heading(3, f"Answers of {_unique(result)}"), Table(header, rows)]
    return blocks


def examples(found: TaskResults) -> list[Block]:
    """Test examples with what the systems answered, side by side.

    Of each system the first that it has right, wrong and invalid, as far as there are such; of
    free texts, which are neither right nor wrong, the first.
    """
    answers: dict[str, dict[str, Mapping[str, Any]]] = {
        _unique(result): {record["id"]: record for record in read_jsonl(result.predictions)}
        for result in found.results
        if result.predictions is not None
    }
    if not answers:
        return []
    closed = bool(found.task.labels or found.task.tags)
    chosen: dict[str, None] = {}
    for records in answers.values():
        seen: set[str] = set()
        for id, record in records.items():
            if (how := _how(record, closed)) not in seen:
                seen.add(how)
                chosen[id] = None
    rows = []
    for example in found.test:
        if example.id not in chosen:
            continue
        cells = []
        for records in answers.values():
            record = records.get(example.id)
            cells.append(
                "" if record is None else f"{_how(record, closed)}: {_cut(_answer(record))}"
            )
        rows.append((_cut(found.task.user(example)), _cut(found.task.answer(example)), *cells))
    header = ("input", "truth", *answers)
    return [Heading(3, "Examples"), Table(header, tuple(rows))]


def _how(record: Mapping[str, Any], closed: bool) -> str:
    """What became of an example; a free text is no nearer to right for being a reference."""
    if record["invalid"] is not None:
        return "invalid"
    if not closed:
        return "text"
    return "right" if record["prediction"] == record["target"] else "wrong"


def _answer(record: Mapping[str, Any]) -> str:
    """The output as it was written, or what was chosen where nothing was."""
    return record["text"] or str(record["prediction"])


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " ..."


def _unique(result: Result) -> str:
    """A system's name with all that may differ between its results."""
    if result.kind == "floor":
        return f"{result.system}, {result.train_size}"
    return f"{result.system}, {result.train_size}, seed {result.seed}"


def spelled(metric: str) -> str:
    return metric.replace("_", " ")


def show(score: Score | None) -> str:
    """A score with its interval; empty for none."""
    if score is None:
        return ""
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
