"""The report of a study: on the terminal, as report.md, and as a page with all its figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ecomjax.experiments import tables
from ecomjax.experiments.answers import answers
from ecomjax.experiments.config import FinetuneConfig, StudyConfig, to_json
from ecomjax.experiments.document import (
    Block,
    Code,
    Figure,
    Heading,
    Items,
    Paragraph,
    Table,
    markdown,
    page,
)
from ecomjax.experiments.figures import heat_map, line_chart
from ecomjax.experiments.files import read_json, write_text
from ecomjax.experiments.grid import Run
from ecomjax.experiments.results import TaskResults
from ecomjax.experiments.transfer import Transfer, similarity, transfers
from ecomjax.experiments.workdir import Workdir

WARNING = "NOT A RESULT: a smoke run, on too little of everything to mean anything"

TITLE = "Prompted, tuned, mixed and merged: a comparison"

READING = (
    "Brackets are 95 % bootstrap intervals over the test examples. Outputs that could not be "
    "read count as wrong and are given as the invalid rate. The number of demonstrations and the "
    "candidate of every trained system are chosen on validation; each system is scored once on "
    "test. The last column compares with the best conventional model of the same training size "
    "on the test split, or where none was trained with the best floor, by the paired bootstrap; "
    "its claims hold together for all systems of a task (Holm)."
)


def write(
    config: StudyConfig, runs: Sequence[Run], found: Sequence[TaskResults], study: Workdir
) -> None:
    """Prints the tables, and writes report.md, report.html and figures/.

    Args:
        config: of the study.
        runs: of the study, those without a result too.
        found: what the others have measured.
        study: its folder.
    """
    merged = transfers(found, runs, study)
    main = [*_main(config, found), *answers(found, merged)]
    title = Heading(1, TITLE)
    blocks = [title, *main, Paragraph(READING), *_failures(runs, study)]
    blocks += [*_figures(found, runs, study), *tables.merge_matrix(found), *_transfer(merged)]
    blocks += [*tables.tuning_table(runs, study), *tables.cost_table(runs, study)]
    for results in found:
        blocks += [Heading(2, f"{results.task.name} in detail"), *tables.shots_table(results)]
        blocks += [*tables.details(results), *tables.confusion(results), *tables.examples(results)]
    blocks += _what_was_run(config, runs, study)
    write_text(study.report, markdown(blocks, study.path))
    write_text(study.page, page(blocks, TITLE))
    print(markdown(main, study.path))


def _main(config: StudyConfig, found: Sequence[TaskResults]) -> Iterator[Block]:
    """One table for each task."""
    if config.smoke:
        yield Paragraph(WARNING, warning=True)
    for results in found:
        yield Heading(2, results.task.name)
        yield from tables.main_table(results)


def _failures(runs: Sequence[Run], study: Workdir) -> Iterator[Block]:
    failed = [run.name for run in runs if not study.subrun(run.name).done.exists()]
    if failed:
        yield Heading(2, "Runs without a result")
        why = (study.subrun(name).failed for name in failed)
        told = (read_json(path)["error"] if path.exists() else "not run" for path in why)
        yield Items(tuple((f"{name}:", error) for name, error in zip(failed, told, strict=True)))


def _figures(found: Sequence[TaskResults], runs: Sequence[Run], study: Workdir) -> list[Figure]:
    """Curves by training size and number of demonstrations; how alike the adapters are."""
    figures = []
    for results in found:
        name, metric = results.task.name, tables.spelled(results.headline)
        curves: dict[str, list[tuple[float, float, float, float]]] = {}
        for one in sorted(results.results, key=lambda one: one.train_size):
            score = one.metrics[results.headline]
            if one.kind != "few_shot" and one.seed == _first_seed(results, one.system):
                point = (one.train_size, score.value, score.low, score.high)
                curves.setdefault(one.system, []).append(point)
        if any(len(points) > 1 for points in curves.values()):
            path = study.figures / f"{name}-sizes.svg"
            line_chart(path, curves, name, x="training examples", y=metric)
            figures.append(Figure(path, f"{name}: {metric} on test by training examples"))
        if results.shots is not None and len(results.shots.scores) > 1:
            path = study.figures / f"{name}-shots.svg"
            points = [(k, s.value, s.low, s.high) for k, s in results.shots.scores.items()]
            line_chart(path, {"few-shot": points}, name, x="demonstrations", y=metric)
            figures.append(Figure(path, f"{name}: {metric} on validation by demonstrations"))
    for run in runs:
        folder = study.subrun(run.name)
        if run.system == "merged" and len(run.tasks) == len(found) and folder.similarity.exists():
            path = study.figures / "similarity.svg"
            shows = "Cosine of the adapters' deltas"
            heat_map(path, similarity(folder), run.tasks, shows, bounds=(-1.0, 1.0))
            figures.append(Figure(path, f"{shows}, task by task"))
            break
    return figures


def _first_seed(results: TaskResults, system: str) -> int:
    return next(one.seed for one in results.results if one.system == system)


def _transfer(merged: Sequence[Transfer]) -> Iterator[Block]:
    if merged:
        yield Heading(2, "Likeness of adapters against transfer")
        rows = (
            (" + ".join(one.tasks), one.method, f"{one.cosine:+.3f}", f"{one.change:+.3f}")
            for one in merged
        )
        header = ("tasks", "merge", "cosine of the adapters", "merged minus alone, mean of both")
        yield Table(header, tuple(rows))


def _what_was_run(config: StudyConfig, runs: Sequence[Run], study: Workdir) -> Iterator[Block]:
    told = read_json(study.run)
    start = told["starts"][-1]
    commands = dict.fromkeys(" ".join(one["command"]) for one in told["starts"])
    facts = [
        *(("base:", base) for base in _bases(runs, study)),
        ("data:", f"{config.data.source} {config.data.path}".strip()),
        (
            "machine:",
            f"{start['platform']}, {start['cpus']} CPUs, "
            f"{start['devices']['count']} x {start['devices']['kind']}",
        ),
        ("versions:", ", ".join(f"{name} {what}" for name, what in start["versions"].items())),
        ("code:", start["git_revision"] or "no repository"),
        ("seeds:", ", ".join(map(str, config.grid.seeds))),
        ("run:", f"{told['run_id']}, last started {start['time']}"),
        *(("command:", command) for command in commands),
    ]
    yield Heading(2, "What was run")
    yield Items(tuple(facts))
    yield Code(to_json(config))


def _bases(runs: Sequence[Run], study: Workdir) -> list[str]:
    """Which weights the trained systems started from."""
    bases: dict[str, None] = {}
    for run in runs:
        record = study.subrun(run.name).run
        if isinstance(run.config, FinetuneConfig) and record.exists():
            base: dict[str, Any] = read_json(record)["starts"][-1]["base"]
            bases[f"{base['name']} from {base['source']}, sha256 {base['sha256']}"] = None
    return list(bases)
