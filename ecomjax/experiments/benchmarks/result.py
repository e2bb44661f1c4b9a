"""What a benchmark found, and how two sides are measured fairly."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from typing import Any

ROUNDS = 3
"""Turns of each side that count."""

VERSIONS = ("jax", "flax", "numpy", "torch", "transformers", "peft")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a benchmark found.

    Attributes:
        name: of the benchmark.
        unit: of the numbers.
        ours, peer: what was measured of each; the less, the better.
        target: what their ratio ours / peer should at most be.
        samples: what they were measured over.
        details: anything else worth knowing.
    """

    name: str
    unit: str
    ours: float
    peer: float
    target: float
    samples: int
    details: dict[str, Any]

    def __str__(self) -> str:
        return (
            f"{self.name}: ours {self.ours:.4g}, peer {self.peer:.4g} {self.unit}; "
            f"ratio {self.ours / self.peer:.3f}, target at most {self.target}"
        )

    def to_dict(self) -> dict[str, Any]:
        """What is printed as JSON."""
        present = filter(importlib.util.find_spec, VERSIONS)
        versions = {name: importlib.metadata.version(name) for name in present}
        found = dataclasses.asdict(self)
        return found | {"ratio": self.ours / self.peer, "versions": versions}


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a run returns, and its seconds."""
    begun = time.perf_counter()
    return run(), time.perf_counter() - begun


def alternate(*runs: Callable[[], Any], rounds: int = ROUNDS) -> list[list[float]]:
    """Seconds of each run, taken turn by turn after one turn that does not count."""
    turns = [[timed(run)[1] for run in runs] for _ in range(rounds + 1)]
    return [list(own) for own in zip(*turns[1:], strict=True)]
