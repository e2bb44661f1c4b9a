"""How long a user waits at the beginning, beside how long that may take."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ecomjax.errors import UserError
from ecomjax.experiments.benchmarks.result import ROUNDS, Result

ROOT = Path(__file__).resolve().parents[3]
"""What commands are started in."""

IMPORT, HELP, FIRST, AGAIN = 0.5, 1.5, 25.0, 15.0
"""Seconds that each may take."""

FIRST_STEP = (
    "--config=configs/finetune.py:esci",
    "--config.data.train_size=1",
    "--config.data.validation_size=1",
    "--config.training.batch_size=1",
    "--config.training.epochs=1",
    "--config.training.row_length=256",
)
"""Trains on one row of the synthetic shop."""

STEPPED = "training: step 1/1"
"""Told when the first step is done."""


def startup(more: Sequence[str] = ()) -> Iterator[Result]:
    """Seconds of the import, of `launch.train --help`, and from command to the end of a first
    training step, with nothing compiled before and again.

    Args:
        more: flags of training.

    Raises:
        UserError: a command fails.
    """
    python = [sys.executable]
    train = [*python, "-m", "launch.train"]
    yield _result("startup_import", IMPORT, _seconds([*python, "-c", "import ecomjax"]))
    yield _result("startup_help", HELP, _seconds([*train, "--help"]))
    times: dict[str, list[float]] = {"first": [], "again": []}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as scratch:
            # Data are tokenized and programs compiled by the first of the two.
            home = os.environ | {"XDG_CACHE_HOME": scratch}
            home.pop("JAX_COMPILATION_CACHE_DIR", None)
            for name, seconds in times.items():
                command = [*train, *FIRST_STEP, *more, f"--workdir={scratch}/{name}"]
                seconds.append(_seconds_until(STEPPED, command, home))
    yield _result("startup_first_step", FIRST, times["first"])
    yield _result("startup_again", AGAIN, times["again"])


def _result(name: str, limit: float, seconds: list[float]) -> Result:
    return Result(
        name=name,
        unit="seconds, beside their limit",
        ours=statistics.median(seconds),
        peer=limit,
        target=1.0,
        samples=len(seconds),
        details={"seconds": seconds},
    )


def _seconds(command: Sequence[str]) -> list[float]:
    """Of a command, after one start that does not count."""
    return [_seconds_until(None, command) for _ in range(ROUNDS + 1)][1:]


def _seconds_until(
    line: str | None, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> float:
    """From the start of a command until it tells a line, after which it is stopped; or ends."""
    begun, told = time.perf_counter(), ""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for told in process.stderr:
            if line is not None and line in told:
                seconds = time.perf_counter() - begun
                process.kill()
                return seconds
    if process.returncode or line is not None:
        raise UserError(
            f"status {process.returncode}: {told.strip()}", command[2], "mend what it tells"
        )
    return time.perf_counter() - begun
