"""Merging adapters of a 7B model on a small machine: time, memory, and one layer checked."""

from __future__ import annotations

import dataclasses
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ecomjax import trees
from ecomjax.adapters.merge import matrix_name, plan
from ecomjax.adapters.methods import METHODS
from ecomjax.errors import UserError
from ecomjax.experiments import merged
from ecomjax.experiments.assembly import say
from ecomjax.experiments.config import MergedConfig
from ecomjax.experiments.files import read_json
from ecomjax.experiments.sections import MergeOptionsConfig, ModelConfig
from ecomjax.experiments.workdir import Workdir, machine
from ecomjax.hf import families
from ecomjax.hf.checkpoints import Identity, load_config
from ecomjax.hf.peft import read_adapter, write_leaves
from ecomjax.typing import LowRank

MODEL, ADAPTERS, RANK = "llama2_7b", 4, 16
DENSITY = 0.5
METHODS_7B = ("linear", "concatenation", "svd", "ties", "dare_ties")
FACTORS_SECONDS, DENSE_SECONDS, GIB = 180.0, 2400.0, 4.0
"""What a merge may take: on factors, on dense matrices, and of memory."""

OPTIMUM = 1.02
"""How much larger than that of the best factors the error may be."""


@dataclasses.dataclass(frozen=True)
class MergeResult:
    """What one merge took.

    Attributes:
        method: its name.
        seconds: of the whole command, files read and written.
        gib: of memory at most, of a process of its own.
        rank: of the result.
        relative_error: of bringing the merged deltas to it.
        matrices: how many were merged.
        checks: of the matrices of one layer by name, see `check`.
    """

    method: str
    seconds: float
    gib: float
    rank: int
    relative_error: float
    matrices: int
    checks: Mapping[str, Mapping[str, float]]

    @property
    def limit(self) -> float:
        """Seconds it may take."""
        return DENSE_SECONDS if METHODS[self.method].space == "dense" else FACTORS_SECONDS

    def __str__(self) -> str:
        found = [check["error"] / check["optimum"] for check in self.checks.values()]
        checked = f"; one layer: error at most {max(found):.4f} of the best" if found else ""
        return (
            f"merge_7b {self.method}: {self.matrices} matrices in {self.seconds:.1f} s (limit "
            f"{self.limit:.0f}), peak {self.gib:.2f} GiB (limit {GIB:.0f}), rank {self.rank}, "
            f"relative error {self.relative_error:.4g}{checked}"
        )

    def to_dict(self) -> dict[str, Any]:
        """What is printed as JSON."""
        limits = {"limit_seconds": self.limit, "limit_gib": GIB}
        return {"name": "merge_7b"} | dataclasses.asdict(self) | limits | machine()


def merge_7b(methods: Sequence[str] = METHODS_7B) -> Iterator[MergeResult]:
    """Merges four rank-16 adapters of every linear layer of Llama-2-7B, method by method.

    They are random, and of the base there is nothing but its shape. Each merge is that of
    `launch.merge`, in a process of its own. Of dense methods the first layer is merged again
    without any of its code, see `check`.

    Raises:
        UserError: an unknown method; a layer that is not what it should be.
    """
    for method in methods:
        if method not in METHODS_7B:
            known = ", ".join(METHODS_7B)
            raise UserError(f"unknown method '{method}'", "--methods", f"known: {known}")
    with tempfile.TemporaryDirectory() as folder:
        adapters = [str(Path(folder) / f"adapter-{number}") for number in range(ADAPTERS)]
        _in_a_process(_write, adapters)
        for method in methods:
            config = _config(method, adapters)
            found = _in_a_process(_measure, config, str(Path(folder) / method))
            checks = _in_a_process(check, config) if METHODS[method].space == "dense" else {}
            yield dataclasses.replace(found, checks=checks)


def _in_a_process(function: Any, *arguments: Any) -> Any:
    """What a function returns in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _config(method: str, adapters: Sequence[str]) -> MergedConfig:
    return MergedConfig(
        experiment="merged",
        model=ModelConfig(name=MODEL),
        adapters=tuple(adapters),
        method=method,
        options=MergeOptionsConfig(density=DENSITY),
        similarity=False,
    )


class _Drawn(dict[str, LowRank]):
    """Random kernels, each drawn when it is asked for."""

    def __init__(self, shapes: Mapping[str, LowRank], seed: int):
        super().__init__(shapes)
        self._seed = seed

    def __getitem__(self, path: str) -> LowRank:
        rng = np.random.default_rng([self._seed, sorted(self).index(path)])
        wanted = super().__getitem__(path)
        a: Any = rng.standard_normal(wanted.a.shape, np.float32)
        b: Any = 0.02 * rng.standard_normal(wanted.b.shape, np.float32)
        scale: Any = np.full(wanted.scale.shape, 2.0, np.float32)
        return LowRank(a=a, b=b, scale=scale)


def _write(folders: Sequence[str]) -> None:
    """Writes random adapters on every linear layer."""
    config = load_config(MODEL)
    table = families.rule_table(config)
    shapes = {}
    for rule in table.rules:
        if rule.transposed and rule.ours.startswith("layers/"):
            stack, (d_out, d_in) = rule.stack(table.sizes), rule.shape(table.sizes)
            sizes = (*stack, d_in, RANK), (*stack, RANK, d_out), stack
            a, b, scale = (jax.ShapeDtypeStruct(size, np.dtype(np.float32)) for size in sizes)
            shapes[rule.ours] = LowRank(a=a, b=b, scale=scale)  # pyright: ignore
    base = Identity(MODEL, "none", "", "0" * 64, "0" * 64)
    for seed, folder in enumerate(folders):
        write_leaves(folder, shapes, _Drawn(shapes, seed), config, base)
    say(f"{len(folders)} adapters of rank {RANK}: {len(shapes)} kernels of {config.layers} layers")


def _measure(config: MergedConfig, workdir: str) -> MergeResult:
    """Merges, and reads off what that took."""
    start = time.monotonic()
    merged.run(config, workdir)
    seconds = time.monotonic() - start
    record = read_json(Workdir(workdir).merge)
    (rank,) = {kernel["rank"] for kernel in record["kernels"].values()}
    layers = load_config(MODEL).layers
    return MergeResult(
        method=config.method,
        seconds=seconds,
        gib=peak_bytes() / 2**30,
        rank=rank,
        relative_error=record["relative_error"],
        matrices=len(record["kernels"]) * layers,
        checks={},
    )


def peak_bytes() -> int:
    """The most memory that this process has held; of the system's own count."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def check(config: MergedConfig) -> dict[str, dict[str, float]]:
    """The first layer, merged as ever and by plain numpy.

    Returns:
        for every matrix: seconds; norm and relative error of its factors against the dense
        result of plain numpy; and the error of the best factors of the same rank, the root of
        what is left of its squared singular values.

    Raises:
        UserError: an error that is more than `OPTIMUM` times the best.
    """
    shape = load_config(config.model.name)
    adapters = [
        trees.map_leaves(_first_layer, read_adapter(folder, shape)) for folder in config.adapters
    ]
    options = merged.options_of(config)
    planned = plan(adapters, [1.0] * len(adapters), config.method, options, config.seed)
    found = {}
    for path in planned.shapes:
        start = time.monotonic()
        leaf, _ = planned.kernel(path)
        seconds = time.monotonic() - start
        name = matrix_name(path, (0,))
        dense = _by_plain_numpy(planned.leaves, path, name, config)
        error = float(np.linalg.norm(dense - leaf.a[0] @ leaf.b[0]) / np.linalg.norm(dense))
        found[name] = {"seconds": seconds, "norm": float(np.linalg.norm(dense)), "error": error}
        found[name]["optimum"] = _best_error(dense, leaf.a.shape[-1])
        told = ", ".join(f"{key} {value:.5g}" for key, value in found[name].items())
        say(f"{config.method} {name}: {told}")
        if not error <= OPTIMUM * found[name]["optimum"]:
            raise UserError(
                f"error {error}, of the best factors {found[name]['optimum']}",
                f"{config.method} of {name}",
                "this is a defect, please report it",
            )
    return found


def _first_layer(leaf: LowRank) -> LowRank:
    return leaf.replace(a=leaf.a[:1], b=leaf.b[:1], scale=leaf.scale[:1])


def _by_plain_numpy(
    adapters: Sequence[Mapping[str, LowRank]], path: str, name: str, config: MergedConfig
) -> np.ndarray:
    """TIES, or DARE with its election, of the first layer; all weights are one."""
    import zlib

    deltas = []
    for number, leaves in enumerate(adapters):
        leaf = leaves[path]
        delta = leaf.scale[0] * (leaf.a[0] @ leaf.b[0])
        if config.method == "ties":
            kept = int(DENSITY * delta.size)
            threshold = np.sort(np.abs(delta), axis=None)[delta.size - kept]
            delta = np.where(np.abs(delta) >= threshold, delta, 0)
        else:
            rng = np.random.default_rng([config.seed, zlib.crc32(name.encode()), number])
            delta = np.where(rng.random(delta.shape, np.float32) < DENSITY, delta / DENSITY, 0)
        deltas.append(delta.astype(np.float32))
    positive = sum(deltas[1:], start=deltas[0]) >= 0
    agreeing = [np.where(positive, d > 0, d < 0) for d in deltas]
    total = sum(np.where(yes, d, 0) for yes, d in zip(agreeing, deltas, strict=True))
    return total / np.maximum(sum(yes.astype(np.float32) for yes in agreeing), np.float32(1))


def _best_error(matrix: np.ndarray, rank: int) -> float:
    """That of the truncated singular value decomposition (Eckart and Young 1936)."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares = np.linalg.eigvalsh((wide @ wide.T).astype(np.float64))[::-1]
    return float(np.sqrt(squares[rank:].sum() / squares.sum()))
