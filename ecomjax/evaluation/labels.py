"""Scores of the labels of a task, by which one of them is chosen as the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import numpy as np
from jaxtyping import Float

from ecomjax.decoding.score import label_log_likelihoods
from ecomjax.metrics import calibration

LabelScore = Literal["sum", "mean", "calibrated"]

CONTENT_FREE = ("N/A", "[MASK]", "")
"""Texts that say nothing, see `Task.content_free`; those of Zhao et al. (2021)."""


def label_scores(
    how: LabelScore,
    model: nn.Module,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    content_free: Sequence[Sequence[tuple[int, ...]]],
    labels: Sequence[Sequence[int]],
    *,
    batch_size: int,
    window: int,
    on_done: Callable[[int], None],
    adapters: Sequence[int] | None = None,
) -> Float[np.ndarray, "n labels"]:
    """The score of each label as the answer to each prompt.

    Args:
        how: see `predict.Predictor`. The softmax of "sum" and of "calibrated" is a probability
            of each label, that of "mean" is none.
        content_free: for each prompt the P that say nothing; used by "calibrated" alone.
        model, variables, prompts, labels, batch_size, window, on_done, adapters: see
            `decoding.score.label_log_likelihoods`.

    Raises:
        UserError: what that refuses.
    """

    def log_likelihoods(prompts, on_done, adapters):
        return label_log_likelihoods(
            model,
            variables,
            prompts,
            labels,
            batch_size=batch_size,
            window=window,
            on_done=on_done,
            adapters=adapters,
        )

    table = log_likelihoods(prompts, on_done, adapters)
    if how == "mean":
        return table / np.array([len(label) for label in labels], np.float32)
    if how == "sum" or not len(prompts):
        return table
    used = adapters or [None] * len(prompts)
    # What prompts with the same demonstrations would ask without any content is one.
    asked: dict[tuple[Any, ...], int] = {}
    places = [
        [asked.setdefault((prompt, adapter), len(asked)) for prompt in each]
        for each, adapter in zip(content_free, used, strict=True)
    ]
    prior = log_likelihoods(
        [prompt for prompt, _ in asked],
        lambda count: None,
        None if adapters is None else [adapter for _, adapter in asked],
    )
    return calibration.contextual(table, prior[np.array(places)])
