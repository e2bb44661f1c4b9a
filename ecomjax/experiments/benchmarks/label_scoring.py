"""Label likelihoods of few-shot prompts, beside ways that harnesses score them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ecomjax.decoding.score import label_log_likelihoods
from ecomjax.errors import UserError
from ecomjax.evaluation.fewshot import Chooser
from ecomjax.evaluation.predict import Predictor
from ecomjax.experiments.assembly import (
    Base,
    choose,
    load_base,
    load_examples,
    make_predictor,
    say,
)
from ecomjax.experiments.benchmarks.peer import imported, load_peer
from ecomjax.experiments.benchmarks.result import ROUNDS, Result, alternate
from ecomjax.experiments.sections import DataConfig, EvaluationConfig, ModelConfig, TaskConfig
from ecomjax.tasks.registry import get_task

SHOTS = 8
EXAMPLES, BATCH = 64, 16
"""Scored by ours in a turn, demonstrations included, and how many of them at once."""

PEER_EXAMPLES = 4
"""Scored by the peer in a turn, others each turn, one of each quarter by length: what it does for
an example does not depend on how many there are."""

TOLERANCE = 1e-4
"""Of a log-likelihood, in parts of it where it is beyond one. In float32 either side is up to
6e-5 away from what the peer computes in float64."""

Scorer = Callable[[Any, Sequence[int], Sequence[Sequence[int]]], list[float]]


def icl(data: str) -> Result:
    """Seconds an example, beside one forward for each label, as harnesses do it by default.

    Rows of ESCI's test split behind 8 demonstrations that all share, four labels,
    SmolLM2-135M untuned.

    Args:
        data: folder of real data, or "synthetic".

    Raises:
        UserError: there are no such data, torch or transformers is missing, or the two sides
            give different scores.
    """
    return beside_peer("icl", *few_shot_prompts(data), one_forward_per_label, 1 / 20)


def icl_onepass(data: str) -> Result:
    """As `icl`, beside one pass over each prompt whose keys and values all labels follow."""
    return beside_peer("icl_onepass", *few_shot_prompts(data), one_pass, 1 / 4)


def few_shot_prompts(data: str) -> tuple[Base, list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The base, the prompts and the labels, as token ids."""
    source = DataConfig() if data == "synthetic" else DataConfig(source="local", path=data)
    base, task = load_base(ModelConfig()), get_task("esci")
    predictor = make_predictor(base, task, TaskConfig("esci"), EvaluationConfig())
    assert isinstance(predictor, Predictor), "the default model is a decoder"
    chooser = Chooser(task, load_examples(task, source, "train"), SHOTS, seed=0)
    scorable = chooser.scorable(load_examples(task, source, "test"))
    examples = choose(scorable, min(EXAMPLES, len(scorable)), 0)
    shown = [chooser.of(example, SHOTS) for example in examples]
    prompts = [fitted.prompt for fitted in predictor.fitted(examples, shown)]
    return base, prompts, [predictor.answer(label) for label in task.labels or ()]


def beside_peer(
    name: str,
    base: Base,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    scorer: Scorer,
    target: float,
) -> Result:
    """Both sides on the same prompts and labels.

    Args:
        name: of the benchmark.
        base: the model.
        prompts, labels: token ids.
        scorer: how the peer scores all labels of a prompt.
        target: of the ratio.
    """
    model, variables = load_peer(base), {"params": base.params}
    found: dict[int, list[float]] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rng = np.random.default_rng(0)
    quarters = [rng.permutation(quarter) for quarter in np.array_split(by_length, PEER_EXAMPLES)]
    order = itertools.cycle([int(i) for turn in zip(*quarters, strict=False) for i in turn])

    def run_ours() -> Float[np.ndarray, "n labels"]:
        rows = {"batch_size": BATCH, "window": base.config.max_positions}
        return label_log_likelihoods(base.module, variables, prompts, labels, **rows)

    def run_peer() -> None:
        for i in itertools.islice(order, PEER_EXAMPLES):
            found[i] = scorer(model, prompts[i], labels)

    ours, peer = alternate(run_ours, run_peer)
    table = run_ours()
    differences = [_difference(table[i], np.array(scores)) for i, scores in found.items()]
    difference = float(np.max(differences))
    say(f"{name}: log-likelihoods of {len(found)} examples differ by {difference:.1e}")
    # Said so, NaN is a difference.
    if not difference <= TOLERANCE:
        raise UserError(
            f"log-likelihoods differ by {difference:.1e}",
            name,
            "this is a defect, please report it",
        )
    return Result(
        name=name,
        unit="seconds an example",
        ours=statistics.median(ours) / len(prompts),
        peer=statistics.median(peer) / PEER_EXAMPLES,
        target=target,
        samples=len(prompts),
        details={
            "seconds": {"ours": ours, "peer": peer},
            "peer_examples": PEER_EXAMPLES * ROUNDS,
            "difference": difference,
            "prompt_tokens": float(np.mean([len(prompt) for prompt in prompts])),
            "peer_prompt_tokens": float(np.mean([len(prompts[i]) for i in found])),
        },
    )


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest, see `TOLERANCE`."""
    return float((np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1.0)).max())


def one_forward_per_label(
    model: Any, prompt: Sequence[int], labels: Sequence[Sequence[int]]
) -> list[float]:
    """Log-likelihoods of the labels, each behind the whole prompt."""
    torch, scores = imported("torch"), []
    for label in labels:
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *label]])).logits[0]
        scores.append(_of_label(logits[len(prompt) - 1 : -1], label))
    return scores


def one_pass(model: Any, prompt: Sequence[int], labels: Sequence[Sequence[int]]) -> list[float]:
    """Log-likelihoods of the labels, all of them behind the keys and values of one prompt."""
    torch = imported("torch")
    longest = max(map(len, labels))
    padded = torch.tensor([[*label, *[label[-1]] * (longest - len(label))] for label in labels])
    with torch.inference_mode():
        seen = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        seen.past_key_values.batch_repeat_interleave(len(labels))
        followed = model(padded[:, :-1], past_key_values=seen.past_key_values).logits
    opening = seen.logits.expand(len(labels), -1, -1)
    logits = torch.cat([opening, followed], dim=1)
    return [_of_label(row[: len(label)], label) for row, label in zip(logits, labels, strict=True)]


def _of_label(logits: Any, label: Sequence[int]) -> float:
    """Log-likelihood of a label, from the logits [T, V] that predict its tokens."""
    torch = imported("torch")
    likelihoods = logits.log_softmax(-1)[torch.arange(len(label)), torch.tensor(label)]
    return float(likelihoods.sum())
