"""Answers to real search queries, beside `generate` of transformers on the same weights."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from ecomjax.decoding.automaton import Automaton
from ecomjax.decoding.constrain import generate_constrained
from ecomjax.decoding.generate import GenerateOptions, generate, until
from ecomjax.errors import UserError
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
from ecomjax.experiments.benchmarks.result import Result, alternate, timed
from ecomjax.experiments.sections import DataConfig, EvaluationConfig, ModelConfig, TaskConfig
from ecomjax.tasks.registry import get_task

QUERIES = 64
"""Of the validation split, drawn."""

CONSTRAINED_BATCH, FREE_BATCH = 32, 64
"""Prompts that ours takes at once."""

PEER_BATCHES = (8, 16, 32, 64)
"""The peer is measured with the one of these that it was fastest with."""

NEW_TOKENS = 48
"""Of an answer written freely, which the untuned model seldom ends."""

PLAIN = {8: 1 / 1.3, 1: 1 / 1.6}
"""The targets of batches of random prompts."""

PLAIN_PROMPTS, PLAIN_TOKENS = 24, 64
"""Random prompts, of which fewer are asked one by one, and the tokens of each."""

OTHER_ANSWERS = 0.05
"""Most answers that may have other tokens, as a share, or one: rounding decides where two are as
likely."""

Answers = list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Work:
    """What both sides answer.

    Attributes:
        name: of the benchmark.
        prompts: token ids.
        automata: what each of them may be answered; None: anything.
        batch: prompts that ours takes at once.
        peer_batches: the peer is measured with the one of these that it was fastest with.
        target: of the ratio.
    """

    name: str
    prompts: Sequence[Sequence[int]]
    automata: Sequence[Automaton] | None
    batch: int
    peer_batches: Sequence[int]
    target: float


def decode(data: str) -> Result:
    """Seconds a prompt, of answers that can be read.

    Queries of QueryNER's validation split are tagged by SmolLM2-135M, untuned and greedily. Both
    sides choose among the tokens that the form of the answer allows: the peer by a logits
    processor, token after token.

    Args:
        data: folder of real data, or "synthetic".

    Raises:
        UserError: there are no such data, torch or transformers is missing, or the two sides
            give different answers.
    """
    base, prompts, automata = _queries(data)
    return beside_peer(
        base, Work("decode", prompts, automata, CONSTRAINED_BATCH, PEER_BATCHES, 1 / 4)
    )


def decode_free(data: str) -> Result:
    """As `decode`, of answers to the same queries that may be anything."""
    base, prompts, _ = _queries(data)
    return beside_peer(base, Work("decode_free", prompts, None, FREE_BATCH, PEER_BATCHES, 1.0))


def decode_plain() -> Iterator[Result]:
    """Seconds a prompt where nothing repeats: prompts of random tokens, batches of 8 and of 1."""
    base, rng = load_base(ModelConfig()), np.random.default_rng(0)
    for batch, target in PLAIN.items():
        drawn = rng.integers(0, base.config.vocab_size, (PLAIN_PROMPTS, PLAIN_TOKENS)).tolist()
        name = f"decode_plain_{batch}"
        yield beside_peer(base, Work(name, drawn[: 8 * batch], None, batch, [batch], target))


def _queries(data: str) -> tuple[Base, list[tuple[int, ...]], list[Automaton]]:
    """The base, the prompts, and what each may be answered."""
    source = DataConfig() if data == "synthetic" else DataConfig(source="local", path=data)
    base, task = load_base(ModelConfig()), get_task("queryner")
    config = TaskConfig("queryner", prompt="alpaca", method="constrained")
    predictor = make_predictor(base, task, config, EvaluationConfig())
    assert isinstance(predictor, Predictor), "the default model is a decoder"
    examples = choose(load_examples(task, source, "validation"), QUERIES, 0)
    prompts = [fitted.prompt for fitted in predictor.fitted(examples)]
    return base, prompts, predictor.automata(examples)


def beside_peer(base: Base, work: Work) -> Result:
    """Both sides on the same prompts."""
    variables, window = {"params": base.params}, base.config.max_positions
    model, end = load_peer(base), base.tokenizer.eos_id

    def run_ours() -> Answers:
        if work.automata is None:
            options = GenerateOptions(NEW_TOKENS, end, work.batch, window)
            found = generate(base.module, variables, work.prompts, options)
        else:
            rows = {"batch_size": work.batch, "window": window}
            asked = work.prompts, work.automata
            found = generate_constrained(base.module, variables, *asked, **rows)
        return [answer.tokens for answer in found]

    def run_peer(batch: int) -> Answers:
        return _generate(model, work.prompts, work.automata, end, batch)

    name, count = work.name, len(work.prompts)
    answers = run_ours()
    tried: dict[int, float] = {}
    run_peer(work.peer_batches[0])  # The first does not count, as in `alternate`.
    for batch in work.peer_batches:
        found, tried[batch] = timed(partial(run_peer, batch))
        other = sum(one != theirs for one, theirs in zip(answers, found, strict=True))
        say(f"{name}: {other} of {count} answers differ, peer's batch of {batch}")
        if other > max(1, OTHER_ANSWERS * count):
            raise UserError(
                f"{other} of {count} answers differ", name, "this is a defect, please report it"
            )
    best = min(tried, key=lambda batch: tried[batch])
    ours, peer = alternate(run_ours, partial(run_peer, best))
    return Result(
        name=name,
        unit="seconds a prompt",
        ours=statistics.median(ours) / count,
        peer=statistics.median(peer) / count,
        target=work.target,
        samples=count,
        details={
            "seconds": {"ours": ours, "peer": peer},
            "peer_batch": best,
            "peer_seconds_by_batch": tried,
            "answer_tokens": float(np.mean([len(answer) for answer in answers])),
            "prompt_tokens": float(np.mean([len(prompt) for prompt in work.prompts])),
        },
    )


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    automata: Sequence[Automaton] | None,
    end: int,
    batch: int,
) -> Answers:
    """The answers of the peer, prompts of like length together and padded on the left."""
    torch, transformers = imported("torch"), imported("transformers")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, tuple[int, ...]] = {}
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        longest = max(len(prompts[i]) for i in chosen)
        tokens = torch.full((len(chosen), longest), end)
        mask = torch.zeros_like(tokens)
        for row, i in enumerate(chosen):
            tokens[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, longest - len(prompts[i]) :] = 1
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS}
        if automata is not None:
            own = [automata[i] for i in chosen]
            options["max_new_tokens"] = max(automaton.longest for automaton in own)
            options["logits_processor"] = transformers.LogitsProcessorList([Allowed(own, longest)])
        ends = {"eos_token_id": end, "pad_token_id": end}
        found = model.generate(
            input_ids=tokens, attention_mask=mask, do_sample=False, **ends, **options
        )
        for i, answer in zip(chosen, found[:, longest:].tolist(), strict=True):
            answers[i] = until((end,), answer)[0]
    return [answers[i] for i in range(len(prompts))]


class Allowed:
    """Leaves the tokens that the automaton of each row allows; a logits processor of the peer."""

    def __init__(self, automata: Sequence[Automaton], prompt: int):
        """Begins at the start of the automata, behind prompts of so many tokens."""
        self._automata, self._prompt = automata, prompt
        self._states = [0] * len(automata)
        self._written = [0] * len(automata)
        """Tokens of the state's chunk that are in the row."""

    def __call__(self, tokens: Any, scores: Any) -> Any:
        torch = imported("torch")
        if tokens.shape[1] > self._prompt:
            for row, token in enumerate(tokens[:, -1].tolist()):
                self._take(row, token)
        pairs = [(row, token) for row in range(len(self._states)) for token in self._next(row)]
        kept = tuple(torch.tensor(pairs).T)
        masked = torch.full_like(scores, -torch.inf)
        masked[kept] = scores[kept]
        return masked

    def _take(self, row: int, token: int) -> None:
        """Goes on by a token."""
        state = self._automata[row].states[self._states[row]]
        if self._written[row] < len(state.chunk):
            self._written[row] += 1
        elif state.choices:
            self._states[row] = state.targets[state.choices.index(token)]
            self._written[row] = 1

    def _next(self, row: int) -> Sequence[int]:
        """What may come next; behind an answer, its last token again."""
        state = self._automata[row].states[self._states[row]]
        if self._written[row] < len(state.chunk):
            return state.chunk[self._written[row] : self._written[row] + 1]
        return state.choices or state.chunk[-1:]
