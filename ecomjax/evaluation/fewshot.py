"""Which demonstrations a prompt shows, and with which examples it must not be scored."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ecomjax.errors import UserError
from ecomjax.tasks.base import Example, Task


def fixed_demonstrations(train: Sequence[Example], shots: int, seed: int) -> list[Example]:
    """One draw from the training split, shared by all examples of a run.

    The draw for fewer shots is the beginning of the draw for more, and it depends on the
    seed and the training examples alone.

    Raises:
        UserError: more shots than training examples.
    """
    if shots > len(train):
        raise UserError(
            f"{shots} demonstrations of {len(train)} training examples",
            "config.fewshot.shots",
            "use fewer shots or more training data",
        )
    order = sorted(range(len(train)), key=lambda i: train[i].id)
    random.Random(seed).shuffle(order)
    return [train[i] for i in order[:shots]]


def without_leaks(
    task: Task, examples: Sequence[Example], demonstrations: Sequence[Example]
) -> list[Example]:
    """The examples that share neither id nor input text with a demonstration."""
    ids = {shown.id for shown in demonstrations}
    texts = {task.user(shown) for shown in demonstrations}
    return [e for e in examples if e.id not in ids and task.user(e) not in texts]
