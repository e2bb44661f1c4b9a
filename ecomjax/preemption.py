"""Preemption: a machine is taken away after a signal and some seconds of grace.

`raised` ends whatever is running; inside it, `noted` lets a loop choose the moment, so that it
can save first. Commands turn `Preempted` into an exit status by which schedulers start them again.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Schedulers and clouds send the first, terminals that close the second."""


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

    To be entered before `jax.distributed.initialize`, which takes over the handling of SIGTERM:
    with several processes all of them have to agree on the step they stop at.
    """

    def handle(number: int, frame: Any) -> None:
        raise Preempted

    with _handled(handle):
        yield


@contextlib.contextmanager
def noted() -> Iterator[Callable[[int], bool]]:
    """Inside, a signal to end is noted; gives a function of the step: whether to stop there.

    It is to be asked at every step, by every process.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received = threading.Event()
    with _handled(lambda number, frame: received.set()):
        yield lambda step: received.is_set()


@contextlib.contextmanager
def _handled(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Has a handler for the signals, other than those that are ignored, as under nohup."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread handle signals.
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in taken.items():
            signal.signal(number, old)
