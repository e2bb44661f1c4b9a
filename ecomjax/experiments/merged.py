"""Adapters merged into one, or into their base, matrix by matrix; see `adapters.methods`."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ecomjax import trees
from ecomjax.adapters.merge import KernelReport, Plan, overall_error, plan
from ecomjax.adapters.methods import Options, row_of, unread
from ecomjax.adapters.similarity import compare
from ecomjax.adapters.weights import Weight
from ecomjax.data.progress import counting
from ecomjax.errors import UserError
from ecomjax.experiments import hosts
from ecomjax.experiments.assembly import load_base, say
from ecomjax.experiments.config import MergedConfig
from ecomjax.experiments.figures import heat_map
from ecomjax.experiments.files import write_json
from ecomjax.experiments.given import (
    Given,
    check_unchanged,
    common_base,
    find_adapter,
    read_given,
)
from ecomjax.experiments.merge_search import search_weights
from ecomjax.experiments.sections import DataConfig, SearchConfig
from ecomjax.experiments.workdir import Workdir, machine
from ecomjax.hf.checkpoints import load_config, open_pretrained, save_fused
from ecomjax.hf.files import remove_leftovers
from ecomjax.hf.peft import write_leaves
from ecomjax.typing import LowRank


def run(config: MergedConfig, workdir: str) -> None:
    """Merges adapters; what is merged stays merged, what was interrupted begins anew.

    The run folder then holds `adapter/`, or `model/` with the adapters fused into their base,
    and `merge.json`, which says how it was made, and of several adapters `similarity.json` and
    `figures/similarity.svg`, which say how alike they are.

    Raises:
        UserError: adapters or settings that do not go together; a base that is not theirs;
            adapters that are others than those merged before.
    """
    if not config.adapters:
        raise UserError("no adapters", "config.adapters", "name one or more")
    if hosts.several():
        raise UserError("merging is the work of one process", workdir, "start the command once")
    options = options_of(config)
    folders = [find_adapter(path) for path in config.adapters]
    weights = _weights(config, options)
    _check_search(config, options)
    folder = Workdir(workdir)
    target = folder.adapter if config.output == "adapter" else folder.model
    if target.exists() and not folder.run.exists():
        raise UserError(
            "the folder holds what no merge has made", str(target), "use another --workdir"
        )
    with folder.writing(config):
        if folder.merge.exists() and target.exists():
            check_unchanged(folder.merge, folders)
            say(f"merged before: {target}")
            return
        remove_leftovers(target)
        _merge(config, options, folders, weights, folder, target)


def _merge(
    config: MergedConfig,
    options: Options,
    folders: Sequence[Path],
    weights: Sequence[Weight],
    folder: Workdir,
    target: Path,
) -> None:
    model, opened, asked = config.model, None, None
    if config.output == "model":
        opened = open_pretrained(model.name, model.path, model.param_dtype)
    if config.search.kind != "none":
        asked = load_base(model)
    shape = opened.config if opened else load_config(model.name, model.path)
    own = asked.identity if asked else opened.identity() if opened else None
    base = common_base(folders, own, config.any_base)
    given = [_read(path, shape) for path in folders]
    adapters = [one.adapter for one in given]
    found = None if asked is None else search_weights(config, asked, adapters)
    weights = weights if found is None else found.weights.tolist()
    planned = plan(adapters, weights, config.method, options, config.seed)
    sources = [
        {"path": one.folder, "sha256": one.sha256, "ranks": one.ranks, "base": one.base}
        for one in given
    ]
    folder.record_start(base=base, seed=config.seed, adapters=sources)
    matrices = sum(math.prod(kernel.stack) for kernel in planned.shapes.values())
    start = time.monotonic()
    with counting(matrices, f"{config.method}: merging", "matrix") as on_done:
        merged = _OnDemand(planned, lambda _: on_done(1))
        if opened is None:
            expected = {path: planned.result(path) for path in planned.shapes}
            write_leaves(target, expected, merged, shape, base)
        else:
            save_fused(target, opened, merged)
    seconds, error = time.monotonic() - start, overall_error(merged.report)
    if config.similarity and len(given) > 1:
        _tell_similarity(given, folder)
    # Last, since it marks the merge as done.
    row = dataclasses.asdict(planned.row)
    write_json(
        folder.merge,
        {
            "method": config.method,
            "row": row | {"laws": sorted(planned.row.laws)},
            "options": options,
            "weights": weights,
            "search": found and {"loss": found.loss, "objectives": found.history},
            "seed": config.seed,
            "output": config.output,
            "base": base,
            "any_base": config.any_base,
            "adapters": sources,
            "kernels": merged.report,
            "relative_error": error,
            "seconds": seconds,
            "versions": machine()["versions"],
        },
    )
    ranks = sorted({report.rank for report in merged.report.values()})
    say(
        f"{config.method}: {len(given)} adapters, {matrices} matrices merged in {seconds:.1f} s to "
        f"rank {', '.join(map(str, ranks))}, relative error {error:.2e}: {target}"
    )


def _tell_similarity(given: Sequence[Given], folder: Workdir) -> None:
    """How alike the adapters are, kernel by kernel and together, and a figure of the latter."""
    names = [one.name for one in given]
    overall, kernels = compare([one.adapter for one in given])
    tables = {path: table._asdict() for path, table in kernels.items()}
    write_json(
        folder.similarity, {"adapters": names, "overall": overall._asdict(), "kernels": tables}
    )
    figure = folder.figures / "similarity.svg"
    heat_map(figure, overall.cosine, names, "Cosine of deltas", bounds=(-1.0, 1.0))
    say(f"how alike they are: {folder.similarity}, {figure}")


class _OnDemand(Mapping[str, LowRank]):
    """The kernels of a plan, each merged when it is asked for; `report` is of those that were."""

    def __init__(self, planned: Plan, on_matrix: Callable[[str], None]):
        self._planned, self._on_matrix = planned, on_matrix
        self.report: dict[str, KernelReport] = {}

    def __getitem__(self, path: str) -> LowRank:
        leaf, self.report[path] = self._planned.kernel(path, self._on_matrix)
        return leaf

    def __contains__(self, path: object) -> bool:
        return path in self._planned.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._planned.shapes)

    def __len__(self) -> int:
        return len(self._planned.shapes)


def options_of(config: MergedConfig) -> Options:
    """The options of a method; UserError for those that it would not read."""
    given: dict[str, Any] = dataclasses.asdict(config.options)
    given["rank"] = given["rank"] or None
    given["normalise"] = None if given["normalise"] == "method" else given["normalise"]
    options = Options(**given)
    for name in unread(config.method, options):
        raise UserError(
            f"method {config.method!r} does not read it",
            f"config.options.{name}",
            "leave it as it was, or choose another config.method",
        )
    return options


def _weights(config: MergedConfig, options: Options) -> list[Weight]:
    """A weight for each adapter; where none are given, equal ones that make a mean."""
    count = len(config.adapters)
    for name in ("weights", "weights_by_layer"):
        given = getattr(config, name)
        if given and len(given) != count:
            raise UserError(
                f"{len(given)} weights for {count} adapters", f"config.{name}", "give one to each"
            )
    if config.weights and config.weights_by_layer:
        raise UserError("config.weights are given too", "config.weights_by_layer", "give one")
    divided = row_of(config.method, options).normalise != "none"
    equal = (1.0 if divided else 1.0 / count,) * count
    return list(config.weights or config.weights_by_layer or equal)


def _check_search(config: MergedConfig, options: Options) -> None:
    """UserError for a search of weights without tasks, or of a method that is no sum by them."""
    if config.model.quantization != "none" and (
        config.search.kind == "none" or config.output == "model"
    ):
        raise UserError(
            "a merge is of weights that are not quantized",
            "config.model.quantization",
            "leave it at none; only a search that writes an adapter asks a quantized base",
        )
    if config.search.kind == "none":
        unread = {"search": SearchConfig(), "tasks": {}, "data": DataConfig()}
        for name, default in unread.items():
            if getattr(config, name) != default:
                raise UserError(
                    "only a search of weights reads it",
                    f"config.{name}",
                    "set config.search.kind too, or leave it as it was",
                )
        return
    row = row_of(config.method, options)
    if (row.sparsify, row.consensus, row.normalise) != (None, "sum", "none"):
        raise UserError(
            f"weights are searched for a sum of deltas, {config.method!r} is another",
            "config.search.kind",
            "use config.method=task_arithmetic, concatenation or svd, or give the weights",
        )
    for name in ("weights", "weights_by_layer"):
        if getattr(config, name):
            raise UserError(f"config.{name} are given", "config.search.kind", "give one of them")
    if not config.tasks:
        raise UserError(
            "no tasks to search weights on", "config.tasks", "use configs/merged.py:TASK"
        )


def _read(folder: Path, shape: Any) -> Given:
    given = read_given(folder, shape)
    for path, leaf in trees.flatten(given.adapter).items():
        if type(leaf) is not LowRank:
            raise UserError(
                f"'{path}' is {type(leaf).__name__}, whose delta takes the base to know",
                str(folder),
                "fuse it with launch.export, or train plain LoRA",
            )
    return given
