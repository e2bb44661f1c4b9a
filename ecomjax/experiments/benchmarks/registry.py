"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ecomjax.errors import UserError
from ecomjax.experiments.benchmarks.decoding import decode
from ecomjax.experiments.benchmarks.label_scoring import icl, icl_onepass
from ecomjax.experiments.benchmarks.merging import METHODS_7B, MergeResult, merge_7b
from ecomjax.experiments.benchmarks.packing import packing
from ecomjax.experiments.benchmarks.refactoring import refactoring
from ecomjax.experiments.benchmarks.result import Result
from ecomjax.experiments.benchmarks.startup import startup
from ecomjax.experiments.benchmarks.training import raw_step, train, train_esci

BENCHMARKS: dict[str, Callable[[str, Sequence[str]], Iterable[Result | MergeResult]]] = {
    "packing": lambda data, _: [packing(data)],
    "train": lambda data, _: [train(data)],
    "train_esci": lambda data, _: [train_esci(data)],
    "raw_step": lambda _, __: [raw_step()],
    "startup": lambda _, __: startup(),
    "decode": lambda data, _: decode(data),
    "icl": lambda data, _: [icl(data)],
    "icl_onepass": lambda data, _: [icl_onepass(data)],
    "merge": lambda _, __: [refactoring()],
    "merge_7b": lambda _, methods: merge_7b(methods),
}


def run(
    names: Sequence[str], data: str, methods: Sequence[str] = METHODS_7B
) -> Iterator[Result | MergeResult]:
    """The results of some benchmarks, as they are found.

    Args:
        names: keys of `BENCHMARKS`.
        data: see `packing`.
        methods: see `merge_7b`.

    Raises:
        UserError: there is no benchmark of a name, and what the benchmarks raise.
    """
    for name in names:
        if name not in BENCHMARKS:
            known = ", ".join(BENCHMARKS)
            raise UserError(f"unknown benchmark '{name}'", "launch.benchmark", f"known: {known}")
    for name in names:
        yield from BENCHMARKS[name](data, methods)
