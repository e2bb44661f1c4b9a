"""The most memory that a process holds in a training step, beside one of transformers and PEFT."""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import gc
import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax

from ecomjax.errors import UserError
from ecomjax.experiments.assembly import load_base, say
from ecomjax.experiments.benchmarks.result import ROUNDS, Result
from ecomjax.experiments.benchmarks.training import (
    LOSS_TOLERANCE,
    our_step,
    peer_step,
    raw_work,
)
from ecomjax.experiments.initial import init_adapter, make_rules
from ecomjax.experiments.sections import AdapterConfig, ModelConfig

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Where Linux tells what a process held at most, and takes a 5 to forget that."""

TARGETS = {"memory": ("none", 0.80), "memory_remat": ("full", 0.45)}
"""For each result what the backward pass computes again, and of the peer's memory how much."""


def memory(model: ModelConfig) -> Iterator[Result]:
    """MiB that a process holds at most, all of it, in the steps of `training.raw_step`.

    Each side has a process of its own, and a first step, which may compile, that does not count.

    Args:
        model: that both train.

    Raises:
        UserError: the system does not tell, a package of the peer is missing, or losses differ.
    """
    if not FORGET.exists():
        raise UserError("this system does not tell", str(FORGET), "measure memory on Linux")
    expected, peer = _in_a_process(model, "peer")
    for name, (remat, target) in TARGETS.items():
        loss, ours = _in_a_process(dataclasses.replace(model, remat=remat), "ours")
        say(f"{name}: loss {loss:.5f}, the peer's {expected:.5f}")
        # Said so, NaN is a difference.
        if not abs(loss / expected - 1) <= LOSS_TOLERANCE:
            raise UserError(
                f"losses are {loss} and {expected}", name, "this is a defect, please report it"
            )
        yield Result(name, "MiB at most", ours, peer, target, ROUNDS, {"remat": remat})


def _in_a_process(model: ModelConfig, side: Literal["ours", "peer"]) -> tuple[float, float]:
    """What `steps` returns in a new one."""
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(steps, model, side).result()


def steps(model: ModelConfig, side: Literal["ours", "peer"]) -> tuple[float, float]:
    """The loss of the last of some steps, and the MiB that this process held at most in them."""
    base = load_base(model)
    work = raw_work(base)
    params, adapter = init_adapter(
        base.params, base.axes, make_rules(AdapterConfig()), jax.random.key(0), base.mesh
    )
    if side == "ours":
        run, _ = our_step(base, work, params, adapter)
    else:
        run = peer_step(base, work, jax.device_get(adapter), work.peer_batches[0])
    run()
    # What either side needs it holds itself by now; the peer needs no weights of ours.
    del base, work, params, adapter
    load_base.cache_clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    FORGET.write_text("5")
    losses = [run() for _ in range(ROUNDS)]
    told = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert told is not None, "Linux has told so since 2.6"
    return losses[-1], int(told[1]) / 1024
