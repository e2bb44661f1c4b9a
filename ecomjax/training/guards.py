"""What is watched from step to step: updates that were skipped, and losses out of the ordinary."""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence

from ecomjax.errors import UserError

logger = logging.getLogger(__name__)

WINDOW = 50
"""Losses that the next one is held against."""
FEWEST = 10
"""Losses without which there is no judgement."""


@dataclasses.dataclass(frozen=True)
class Guard:
    """What is put up with.

    Attributes:
        most_skipped: steps in a row whose updates may be skipped before training stops.
        spike: how many times the median of the last losses a loss may be; 0: any.
        report: writes down which examples some steps are of; returns the file.
    """

    most_skipped: int
    spike: float
    report: Callable[[Sequence[int]], str]

    def watch(self, seen: Seen, step: int, values: Mapping[str, float]) -> None:
        """Takes in the metrics of a step, and warns of what is out of the ordinary.

        Args:
            seen: what was seen before; changed.
            step: the step that the metrics are of.
            values: with "loss" and "skipped", the number of updates skipped so far.
        """
        if values["skipped"] > seen.skipped:
            seen.skipped = int(values["skipped"])
            seen.in_a_row.append(step)
            logger.warning("step %d: loss or gradient not finite; its update is skipped", step)
            return
        seen.in_a_row.clear()
        if self.spike and len(seen.losses) >= FEWEST:
            usual = statistics.median(seen.losses)
            if values["loss"] > self.spike * usual:
                seen.spikes += 1
                logger.warning(
                    "step %d: loss %.4g, the median before it %.4g", step, values["loss"], usual
                )
        seen.losses = [*seen.losses, values["loss"]][-WINDOW:]

    def check(self, seen: Seen, step: int, values: Mapping[str, float]) -> None:
        """Gives up where going on would be of no use.

        Raises:
            UserError: too many skipped updates in a row, or a batch without "target_tokens".
        """
        if values["target_tokens"] == 0:
            raise UserError(
                "a batch without a token to learn",
                f"step {step}, its examples in {self.report([step])}",
                "leave them out of the training data",
            )
        if len(seen.in_a_row) >= self.most_skipped:
            raise UserError(
                f"loss or gradient not finite in steps {seen.in_a_row[0]} to {step}, all of them",
                f"their examples in {self.report(seen.in_a_row)}",
                "look at these, lower config.optimizer.learning_rate, "
                "or raise config.training.most_skipped",
            )


@dataclasses.dataclass
class Seen:
    """What a guard has seen; part of every checkpoint.

    Attributes:
        skipped: updates skipped so far.
        in_a_row: the last steps, as far as all of their updates were skipped.
        losses: the last ones that were finite.
        spikes: number of losses out of the ordinary so far.
    """

    skipped: int = 0
    in_a_row: list[int] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    spikes: int = 0
