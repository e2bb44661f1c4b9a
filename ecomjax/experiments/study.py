"""A study: all runs of its grid, one after another, and a report of what they measured.

Every run is a folder of its own below `runs/`. Finished ones are not repeated, so an
interrupted study goes on where it stopped; a failed one is told and does not stop the others;
several processes that are started with the same command share the runs among themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence

import jax

from ecomjax.errors import UserError
from ecomjax.experiments import estimate, evaluate, finetune, grid, hosts, merged, report, results
from ecomjax.experiments.assembly import chosen_rows, say
from ecomjax.experiments.config import (
    FinetuneConfig,
    MergedConfig,
    ScoreConfig,
    StudyConfig,
)
from ecomjax.experiments.files import read_json, read_jsonl, write_json, write_jsonl
from ecomjax.experiments.grid import Choice, Run
from ecomjax.experiments.workdir import Busy, Workdir
from ecomjax.tasks.registry import get_task

NO_MATTER = ("grid.together",)
"""Keys of the config that results do not depend on, but for rounding."""

PAUSE = 5.0
"""Seconds until runs that other processes have are looked at again."""

PATIENCE = 120.0
"""Seconds that the study's own folder may be held by another process, which writes little there."""


def run(config: StudyConfig, workdir: str) -> None:
    """Runs or finishes the study, prints its tables and writes results.jsonl and the report.

    Raises:
        UserError: runs failed; all that could be run and reported then is.
    """
    study, runs = Workdir(workdir), grid.runs(config)
    with _held(study, config):
        _check_data(config)
        study.record_start()
    failed = _execute(runs, study, config.grid.together)
    with _held(study, config):
        hosts.on_main(lambda: _report(config, runs, study))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs have no result, first {next(iter(failed))} "
            f"({next(iter(failed.values()))})",
            str(study.path),
            "mend that and start the same command again: what is done is not repeated",
        )


def dry_run(config: StudyConfig, workdir: str) -> None:
    """Prints the runs of a study and about how long they take; starts and writes nothing."""
    study, runs = Workdir(workdir), grid.runs(config)
    needed = estimate.operations(runs)
    speed = estimate.speed()
    for place, one in enumerate(runs, 1):
        told = _told(needed[one.name] / speed)
        told = "done" if study.subrun(one.name).done.exists() else f"about {told}"
        needs = f", after {', '.join(one.needs)}" if one.needs else ""
        print(f"run {place} of {len(runs)}: {one.name}: {told}{needs}")
    left = sum(n for name, n in needed.items() if not study.subrun(name).done.exists())
    print(f"in all about {_told(left / speed)}, {estimate.BASIS}")


def _check_data(config: StudyConfig) -> None:
    """UserError where there are no data: no run would have a result."""
    for name in config.tasks:
        task = get_task(name, **config.icl[name].task.options)
        for split in ("train", "validation", config.icl[name].evaluation.split):
            chosen_rows(task, config.data, split)


@contextlib.contextmanager
def _held(study: Workdir, config: StudyConfig) -> Iterator[None]:
    """Holds the folder of the study itself, for the moment that others hold it too."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(study.writing(config, ignore=NO_MATTER))
                break
            except Busy:
                if time.monotonic() - started > PATIENCE:
                    raise
                _pause()
        yield


def _execute(runs: Sequence[Run], study: Workdir, together: int) -> dict[str, str]:
    """Runs what is not done; what failed, and why, by name.

    Of a process that is one of several as one run, an error ends all, since the others would
    wait for it.

    Args:
        runs: of the study.
        study: its folder.
        together: most adapters that are trained as one program.
    """
    named, failed = {one.name: one for one in runs}, {}
    needed, own = estimate.operations(runs), 0.0
    places = {one.name: place for place, one in enumerate(runs, 1)}
    waiting, spent = [one.name for one in runs], 0.0
    while waiting:
        left, begun = [], set()
        for name in waiting:
            done = set(hosts.on_main(lambda: [n for n in named if study.subrun(n).done.exists()]))
            needs = named[name].needs
            if name in done or name in begun:
                continue
            if lost := [need for need in needs if need in failed]:
                failed[name] = why = f"it needs {lost[0]}, which failed"
                hosts.on_main(lambda name=name, why=why: _note(study.subrun(name), why))
                continue
            if not done.issuperset(needs):
                left.append(name)
                continue
            rest = sum(needed[n] for n in named if n not in done and n not in failed)
            more = f", about {_told(spent * rest / own)} left" if own else ""
            others = [named[n] for n in waiting if n not in done and n not in begun and n != name]
            group = [named[name], *_joining(named[name], others)][:together]
            begun.update(one.name for one in group)
            for one in group:
                say(f"run {places[one.name]} of {len(runs)}: {one.name}{more}")
            try:
                seconds, errors = _timed(group, named, study, needed)
            except Exception as error:
                if hosts.several():
                    raise
                errors = {one.name: error for one in group}
            else:
                spent, own = spent + seconds, own + sum(needed[one.name] for one in group)
            for one, error in errors.items():
                if isinstance(error, Busy):
                    say(f"{one}: {error.what}; it is looked at again later")
                    left.append(one)
                else:
                    failed[one] = _fail(one, error, study)
        if left == waiting:
            _pause()
        waiting = left
    return failed


def _joining(run: Run, others: Sequence[Run]) -> Iterator[Run]:
    """Those of the others that can be trained as one program with a run."""
    if isinstance(run.config, FinetuneConfig):
        for other in others:
            if isinstance(other.config, FinetuneConfig):
                if finetune.joinable(run.config, other.config):
                    yield other


def _timed(
    group: Sequence[Run], named: Mapping[str, Run], study: Workdir, needed: Mapping[str, float]
) -> tuple[float, dict[str, Exception]]:
    """Does a run, or trains several together, and notes what is done.

    Those trained together have shares of the time, by what each of them needs alone.

    Returns:
        The seconds that it took, and what ended runs of several before their time.
    """
    start = time.monotonic()
    errors: dict[str, Exception] = {}
    try:
        if len(group) == 1:
            _do(group[0], named, study)
        else:
            errors = _train(group, study)
    finally:
        # Hardly a program serves two runs, and XLA dies where a process holds too many of them.
        jax.clear_caches()
    seconds = time.monotonic() - start
    whole = sum(needed[run.name] for run in group)
    for run in group:
        if run.name not in errors:
            own = seconds * needed[run.name] / whole if len(group) > 1 else seconds
            hosts.on_main(lambda run=run, own=own: _note_done(study.subrun(run.name), own))
    return seconds, errors


def _train(group: Sequence[Run], study: Workdir) -> dict[str, Exception]:
    """Trains adapters together; what ended some of them before their time."""
    configs = [run.config for run in group if isinstance(run.config, FinetuneConfig)]
    folders = [str(study.subrun(run.name).path) for run in group]
    ended = finetune.run_together(configs, folders)
    found = zip(group, ended, strict=True)
    return {run.name: error for run, error in found if error is not None}


def _note_done(folder: Workdir, seconds: float) -> None:
    starts = read_json(folder.run)["starts"] if folder.run.exists() else []
    if not folder.done.exists():
        write_json(folder.done, {"seconds": seconds, "starts": max(1, len(starts))})
    folder.failed.unlink(missing_ok=True)


def _fail(name: str, error: Exception, study: Workdir) -> str:
    """Notes and tells that a run failed; returns why."""
    why = " ".join(str(error).split()) or type(error).__name__
    trace = None if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    _note(study.subrun(name), why, trace)
    say(f"{name} failed: {why}")
    return why


def _note(folder: Workdir, error: str, trace: str | None = None) -> None:
    write_json(folder.failed, {"error": error, "traceback": trace})


def _do(run: Run, named: Mapping[str, Run], study: Workdir) -> None:
    folder, config = study.subrun(run.name), run.config
    if isinstance(config, Choice):
        _choose(config, named, folder, study)
    elif isinstance(config, FinetuneConfig):
        finetune.run(config, str(folder.path))
    elif isinstance(config, MergedConfig):
        chosen = [read_json(study.subrun(need).chosen)["chosen"] for need in run.needs]
        adapters = tuple(str(study.subrun(name).path) for name in chosen)
        merged.run(dataclasses.replace(config, adapters=adapters), str(folder.path))
    elif isinstance(config, ScoreConfig):
        adapters = tuple(str(study.subrun(need).path) for need in run.needs)
        evaluate.run(dataclasses.replace(config, adapters=adapters), str(folder.path))
    else:
        evaluate.run(config, str(folder.path))


def _choose(choice: Choice, named: Mapping[str, Run], folder: Workdir, study: Workdir) -> None:
    """Chooses the candidate that is best on validation, the first of equals, and scores it."""
    with folder.writing(choice):
        found = {n: best_of(study.subrun(n), choice.select) for n in choice.candidates}
        best = max(found, key=found.__getitem__)
        config = named[best].config
        assert isinstance(config, FinetuneConfig)
        evaluate.run(config, str(study.subrun(best).path))
        told = {"chosen": best, "select": choice.select, "validation": found}
        hosts.on_main(lambda: write_json(folder.chosen, told))


def best_of(run: Workdir, select: str) -> float:
    """The best that a trained run has reached on validation; more is better.

    Args:
        run: its folder.
        select: "metric", or "loss", which is taken negative.
    """
    key, sign = ("headline", 1.0) if select == "metric" else ("loss", -1.0)
    seen = [line.get(f"validation/{key}") for line in read_jsonl(run.metrics)]
    return max((sign * x for x in seen if x is not None), default=-math.inf)


def _report(config: StudyConfig, runs: Sequence[Run], study: Workdir) -> None:
    """Puts together what the runs have written."""
    found = results.collect(config, runs, study)
    write_jsonl(study.results, results.lines(found))
    report.write(config, runs, found, study)
    say(f"report: {study.report}")


def _pause() -> None:
    time.sleep(PAUSE)


def _told(seconds: float) -> str:
    """A time, roughly."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
