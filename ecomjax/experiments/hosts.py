"""Several processes as one run: how they find each other, and what one of them does for all.

Every process runs the same command and holds its part of the mesh. The first one alone writes to
the run folder, which all must see, and tells what happens; numbers that come back from devices
are the same in every process. When one ends, the others end within the heartbeat time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ecomjax import preemption
from ecomjax.errors import UserError
from ecomjax.experiments.files import jsonable

Value = TypeVar("Value")

LAST_WORDS = 2.0
"""Seconds that the first process stays for others that fail too: they die with it."""

SEEN_WITHIN = 60.0
"""Seconds within which a file that one host has written shows on another: NFS caches."""


def initialize(
    auto: bool,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    join_seconds: int = 300,
    heartbeat_seconds: int = 100,
) -> None:
    """Makes this process one of several, before anything has asked for devices.

    Args:
        auto: whether TPU VM, SLURM, Open MPI or GKE tells all that follows.
        coordinator: HOST:PORT of the first process; with the next two None, this is the only
            process.
        processes: how many there are.
        process: number of this one, from 0.
        join_seconds: after which those that are there no longer wait for the others.
        heartbeat_seconds: of silence after which a process counts as dead, and the others end.

    Raises:
        UserError: the description is incomplete or wrong, or there is no cluster.
    """
    explicit: dict[str, Any] = {
        "--coordinator": coordinator,
        "--processes": processes,
        "--process": process,
    }
    missing = [name for name, value in explicit.items() if value is None]
    if auto and len(missing) < 3:
        raise UserError(
            "two ways to find the other processes",
            "--hosts=auto",
            f"give that, or {', '.join(explicit)}",
        )
    if not auto and len(missing) == 3:
        return
    described: dict[str, Any] = {}
    if not auto:
        if missing:
            raise UserError("missing flag", missing[0], f"give all of {', '.join(explicit)}")
        _check(str(coordinator), int(processes or 0), int(process or 0))
        described = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
            "cluster_detection_method": "deactivate",
        }
    where = "--hosts=auto" if auto else f"--coordinator={coordinator}"
    # JAX answers a process that stays away with a dump of its stack, and later than asked.
    late = threading.Timer(join_seconds, _late, [where, join_seconds])
    late.daemon = True
    late.start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if process == 0:
            _check_port(int(str(coordinator).rpartition(":")[2]))
        jax.distributed.initialize(
            **described,
            initialization_timeout=join_seconds + 60,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except ValueError as error:
        raise UserError(
            "no cluster found",
            where,
            f"start the command by srun or mpirun, on a TPU VM or on GKE, or give "
            f"{', '.join(explicit)}",
        ) from error
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"cannot join the other processes ({error})",
            where,
            "use a free port of the first process's machine, and a cluster that is up",
        ) from error
    finally:
        late.cancel()


def _check(coordinator: str, processes: int, process: int) -> None:
    host, colon, port = coordinator.rpartition(":")
    if not host or not colon or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError("no address", f"--coordinator={coordinator}", "give HOST:PORT")
    if processes < 1:
        raise UserError("no count", f"--processes={processes}", "give 1 or more")
    if not 0 <= process < processes:
        raise UserError(
            f"there is no such process of {processes}",
            f"--process={process}",
            "number them from 0",
        )


def _check_port(port: int) -> None:
    """OSError where another program listens at the port: JAX may answer that with a crash."""
    with socket.socket() as server:
        # As JAX would, past connections to the port that the system has not forgotten yet.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))


def _late(where: str, seconds: int) -> None:
    """Ends a process that waits for others."""
    print(
        f"error: not all processes were there after {seconds} s: {where}; start all of them, let "
        "them reach the first one, or give a longer --join_seconds",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def several() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Whether this is the process that writes and tells."""
    return not several() or jax.process_index() == 0


def on_main(do: Callable[[], Value]) -> Value:
    """What `do` returns in the first process, which alone runs it; the others wait.

    Args:
        do: returns what JSON can hold.

    Raises:
        UserError: that of `do`, in every process.
    """
    if not several():
        return do()
    told: dict[str, Any] = {}
    if is_main():
        try:
            told = {"value": do()}
        except UserError as error:
            told = {"error": [error.what, error.where, error.remedy]}
    message = np.frombuffer(json.dumps(told).encode(), np.uint8)
    size = multihost_utils.broadcast_one_to_all(np.int32(message.size))
    sent = message if is_main() else np.zeros(int(size), np.uint8)
    told = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())
    if "error" in told:
        raise UserError(*told["error"])
    return told["value"]


def check_shared(path: Path) -> None:
    """UserError in every process unless all see the file as the first one does."""
    if not several():
        return
    content, place = on_main(lambda: [path.read_text(), str(path.parent)])
    until = time.monotonic() + SEEN_WITHIN
    while not (same := _read(path) == content) and time.monotonic() < until:
        time.sleep(0.5)
    see = np.asarray(multihost_utils.process_allgather(np.array(same)))
    if not see.all():
        raise UserError(
            f"processes do not see it: {', '.join(map(str, np.flatnonzero(~see)))}",
            place,
            "give a --workdir on a file system that all hosts share",
        )


def check_same(what: str, value: Any) -> None:
    """UserError in every process unless all have the same of what JSON can hold."""
    if not several():
        return
    text = json.dumps(jsonable(value), sort_keys=True).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    found = np.asarray(multihost_utils.process_allgather(digest))
    other = np.flatnonzero((found != found[0]).any(axis=1))
    if other.size:
        raise UserError(
            f"processes have another {what} than the first one: {', '.join(map(str, other))}",
            "--process",
            "give all hosts the same files",
        )


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Keeps what others than the first process print from the terminal."""
    if is_main():
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends this process at once where it fails, and so the others, which would wait for it."""
    try:
        yield
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        if not several() or status in (None, 0, preemption.STATUS):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        if is_main():
            time.sleep(LAST_WORDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
