"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ecomjax.errors import UserError
from ecomjax.experiments.benchmarks.decoding import decode, decode_free, decode_plain
from ecomjax.experiments.benchmarks.growth import growth
from ecomjax.experiments.benchmarks.label_scoring import icl, icl_onepass
from ecomjax.experiments.benchmarks.memory import memory
from ecomjax.experiments.benchmarks.merging import METHODS_7B, MergeResult, merge_7b
from ecomjax.experiments.benchmarks.packing import packing
from ecomjax.experiments.benchmarks.refactoring import refactoring
from ecomjax.experiments.benchmarks.result import Result
from ecomjax.experiments.benchmarks.startup import startup
from ecomjax.experiments.benchmarks.training import raw_step, train, train_esci
from ecomjax.experiments.sections import ModelConfig


class Given(NamedTuple):
    """What a benchmark may read.

    Attributes:
        data: folder of real data, or "synthetic".
        methods: see `merge_7b`.
        figure: see `growth`.
    """

    data: str
    methods: Sequence[str] = METHODS_7B
    figure: Path = Path("growth.svg")


BENCHMARKS: dict[str, Callable[[Given], Iterable[Result | MergeResult]]] = {
    "packing": lambda given: [packing(given.data)],
    "train": lambda given: [train(given.data)],
    "train_esci": lambda given: [train_esci(given.data)],
    "raw_step": lambda _: [raw_step()],
    "memory": lambda _: memory(ModelConfig()),
    "startup": lambda _: startup(),
    "growth": lambda given: growth(given.figure),
    "decode": lambda given: [decode(given.data)],
    "decode_free": lambda given: [decode_free(given.data)],
    "decode_plain": lambda _: decode_plain(),
    "icl": lambda given: [icl(given.data)],
    "icl_onepass": lambda given: [icl_onepass(given.data)],
    "merge": lambda _: [refactoring()],
    "merge_7b": lambda given: merge_7b(given.methods),
}


def run(names: Sequence[str], given: Given) -> Iterator[Result | MergeResult]:
    """The results of some benchmarks, keys of `BENCHMARKS`, as they are found.

    Raises:
        UserError: there is no benchmark of a name, and what the benchmarks raise.
    """
    for name in names:
        if name not in BENCHMARKS:
            known = ", ".join(BENCHMARKS)
            raise UserError(f"unknown benchmark '{name}'", "launch.benchmark", f"known: {known}")
    for name in names:
        yield from BENCHMARKS[name](given)
