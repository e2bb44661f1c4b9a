"""Preemption: a machine is taken away after a signal and some seconds of grace.

`raised` ends whatever is running; inside it, `noted` lets a loop choose the moment, so that it
can save first. Commands turn `Preempted` into an exit status by which schedulers start them again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Schedulers and clouds send the first, terminals that close the second."""

STATUS = 75
"""Exit status of a command that should be started again."""


class Preempted(BaseException):
    """The process was asked to end. Like KeyboardInterrupt, nothing in between may catch it.

    Attributes:
        step: of the checkpoint that was saved for it, if one was.
    """

    def __init__(self, step: int | None = None):
        self.step = step
        at = "" if step is None else f" at step {step}"
        super().__init__(f"preempted{at}; the same command resumes")


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside, a signal to end raises `Preempted`.

    `jax.distributed.initialize` takes over the handling of SIGTERM, so that several processes can
    agree on the step they stop at: among them this is not to be entered after it, but a process
    that is alone has to enter it again.
    """

    def handle(number: int, frame: Any) -> None:
        raise Preempted

    with _handled(handle):
        yield


@contextlib.contextmanager
def raised_alone() -> Iterator[None]:
    """As `raised` in a process that is alone; several go on, to stop together at a step."""
    import jax

    with contextlib.nullcontext() if jax.process_count() > 1 else raised():
        yield


@contextlib.contextmanager
def noted() -> Iterator[Callable[[int], bool]]:
    """Inside, a signal to end is noted; gives a function of the step: whether to stop there.

    It is to be asked at every step, by every process.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        # JAX waits for SIGTERM alone.
        with _handled(lambda number, frame: os.kill(os.getpid(), signal.SIGTERM), SIGNALS[1:]):
            yield multihost_utils.reached_preemption_sync_point
        return
    received = threading.Event()
    with _handled(lambda number, frame: received.set()):
        yield lambda step: received.is_set()


@contextlib.contextmanager
def _handled(
    handle: Callable[[int, Any], None], numbers: Sequence[int] = SIGNALS
) -> Iterator[None]:
    """Has a handler for the signals, other than those that are ignored, as under nohup."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread handle signals.
        return
    before = {number: signal.getsignal(number) for number in numbers}
    taken = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in taken.items():
            signal.signal(number, old)
