"""What a run tells while it trains: metrics.jsonl, TensorBoard, and a line on the terminal."""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends a line of JSON for each step told, and its finite numbers to TensorBoard.

    TensorBoard shows what the file holds: where it cannot be written, that is told once and
    only the file goes on.
    """

    def __init__(self, file: str | Path, tensorboard: str | Path | None = None):
        """Opens the file behind what it already holds.

        Args:
            file: metrics.jsonl.
            tensorboard: folder of event files; None: none are written.
        """
        self.file = Path(file)
        self.tensorboard = tensorboard
        self._events: Any = None
        self._purge_step: int | None = None
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._keep_lines(lambda _: True)
        self._lines = open(self.file, "a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the numbers of a step, which are on disk afterwards; NaN and inf become null."""
        told = {name: float(x) if math.isfinite(x) else None for name, x in values.items()}
        self._lines.write(json.dumps({"step": step} | told) + "\n")
        self._lines.flush()
        os.fsync(self._lines.fileno())
        with self._optional():
            if self.tensorboard is not None:
                self._show(self.tensorboard, step, told)

    def cut_back(self, step: int) -> None:
        """Drops what was told beyond the step that training resumes from."""
        self._lines.close()
        self._keep_lines(lambda told: told <= step)
        self._lines = open(self.file, "a", encoding="utf-8")
        self._purge_step = step + 1

    def close(self) -> None:
        self._lines.close()
        with self._optional():
            if self._events is not None:
                self._events.close()

    @contextlib.contextmanager
    def _optional(self) -> Iterator[None]:
        """Whatever fails here is told, and not tried again."""
        try:
            yield
        except Exception as error:  # Of a package that is missing, a disk, a protocol.
            logger.warning(
                "no TensorBoard from here on (%s): %s; %s has all numbers",
                " ".join(str(error).split())[:200] or type(error).__name__,
                self.tensorboard,
                self.file,
            )
            with contextlib.suppress(Exception):
                self._events.close()
            self.tensorboard = self._events = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _keep_lines(self, condition: Callable[[int], bool]) -> None:
        """Rewrites the file if steps fail the condition, or if a kill has torn a line."""
        if not self.file.exists():
            return
        old = self.file.read_bytes()
        kept, torn = [], 0
        for line in old.splitlines(keepends=True):
            step = _step_of(line)
            torn += step is None
            if step is not None and condition(step):
                kept.append(line)
        if torn:
            logger.warning("dropped %d lines of %s that are no records", torn, self.file)
        if b"".join(kept) != old:
            temporary = self.file.with_name(f".{self.file.name}.tmp")
            with open(temporary, "wb") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.file)

    def _show(self, folder: str | Path, step: int, told: Mapping[str, float | None]) -> None:
        """Writes the numbers of a step for TensorBoard.

        Not through a `SummaryWriter`: its thread dies of a full disk, and its queue then blocks
        for ever.
        """
        with _without_torch():
            from tensorboardX.proto import event_pb2, summary_pb2
            from tensorboardX.record_writer import RecordWriter

        events: Any = event_pb2
        summaries: Any = summary_pb2
        made = [events.Event(step=step, wall_time=time.time(), summary=summaries.Summary())]
        made[0].summary.value.extend(
            summaries.Summary.Value(tag=name, simple_value=number)
            for name, number in told.items()
            if number is not None
        )
        if self._events is None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            # Two starts within a second would else give their files one name, and lose the first.
            name = f"events.out.tfevents.{int(time.time())}.{uuid.uuid4().hex[:8]}"
            self._events = RecordWriter(str(Path(folder) / name))
            if self._purge_step is not None:
                start = events.SessionLog(status=events.SessionLog.START)
                made.insert(0, events.Event(step=self._purge_step, session_log=start))
            made.insert(0, events.Event(wall_time=time.time(), file_version="brain.Event:2"))
        for event in made:
            self._events.write(event.SerializeToString())
        self._events.flush()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Importing tensorboardX would import torch, if installed, which takes seconds and is not
    used here."""
    if "torch" in sys.modules:
        yield
        return
    absent: Any = None
    sys.modules["torch"] = absent
    try:
        yield
    finally:
        del sys.modules["torch"]


class NoWriter(MetricsWriter):
    """Takes what a process would tell if another one did not."""

    def __init__(self):
        pass

    def write(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def cut_back(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class Progress:
    """Loss, useful tokens a second and time left: a bar on a terminal, else a line at times."""

    def __init__(
        self,
        steps: int,
        start: int = 0,
        what: str = "training",
        every: float = 30.0,
        stream: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts counting.

        Args:
            steps: number of the last step.
            start: steps done before, by the run that is resumed.
            what: first word of every line.
            every: seconds between lines where the stream is no terminal.
            stream: text file; stderr unless given.
            clock: seconds from anywhere.
        """
        self.steps, self.what, self.every, self.clock = steps, what, every, clock
        self.stream = stream or sys.stderr
        # (time, step, tokens so far) of the last updates: what speed is measured over.
        self._window = collections.deque([(clock(), start, 0)], maxlen=50)
        self._told = clock()
        self._bar: Any = None
        if self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, desc=what, file=self.stream, unit="step")

    def update(self, step: int, loss: float, tokens: int) -> None:
        """Tells that `step` steps are done, the last of them over `tokens` useful tokens."""
        now = self.clock()
        self._window.append((now, step, self._window[-1][2] + tokens))
        then, first_step, first_tokens = self._window[0]
        seconds = max(now - then, 1e-9)
        speed = (self._window[-1][2] - first_tokens) / seconds
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._told >= self.every or step >= self.steps:
            self._told = now
            left = (self.steps - step) * seconds / max(step - first_step, 1)
            print(
                f"{self.what}: step {step}/{self.steps}, loss {loss:.4f}, "
                f"{speed:,.0f} tokens/s, {_duration(left)} left",
                file=self.stream,
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _step_of(line: bytes) -> int | None:
    """The step a line tells of; None where it is no whole record."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def _duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
