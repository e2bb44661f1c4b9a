"""Our models for the tasks of lm-eval, the harness of EleutherAI (the extra `lm-eval`).

from ecomjax.experiments.harness import load
lm_eval.simple_evaluate(model=load("path/of/a/model", "path/of/a/run"), tasks=["arc_easy"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from ecomjax.decoding.generate import GenerateOptions, generate
from ecomjax.decoding.score import label_log_likelihoods
from ecomjax.errors import UserError
from ecomjax.experiments.assembly import load_base
from ecomjax.experiments.given import find_adapter, read_given
from ecomjax.experiments.sections import ModelConfig
from ecomjax.hf.tokenizer import Tokenizer

MOST_NEW = 256
"""Tokens of an answer whose task does not say how many; that of lm-eval's own models."""


class HarnessModel(TemplateLM):
    """A decoder as lm-eval asks it.

    Texts are tokenized as our prompts are: nothing is added to them. Where a context ends in
    blanks, these go to the continuation, as in lm-eval's own models; likewise a context that
    is too long loses its beginning, and where there is none the end token stands for it.
    """

    def __init__(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        tokenizer: Tokenizer,
        window: int,
        batch_size: int = 16,
    ):
        """Joins the pieces.

        Args:
            model, variables: see `decoding.generate.generate`.
            tokenizer: of the model.
            window: most tokens of a context and what follows it.
            batch_size: contexts at once; no result depends on it.
        """
        super().__init__()
        self.model, self.variables = model, dict(variables)
        self.encoder, self.window, self.batch_size = tokenizer, window, batch_size

    @property
    def eot_token_id(self) -> int:
        return self.encoder.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of the text alone, whatever is asked to be added."""
        del add_special_tokens, kwargs
        return self.encoder.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        pairs = [(tuple(context), tuple(own)) for _, context, own in requests]
        sums = self._sums(pairs)
        greedy = self._greedy(pairs)
        return [(sums[pair], greedy[pair[0]][: len(pair[1])] == pair[1]) for pair in pairs]

    def _sums(self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[Any, float]:
        """log p of continuations, by context and continuation.

        Contexts with the same continuations are scored together, each of them read once.
        """
        by_context: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for context, own in pairs:
            by_context.setdefault(context, {})[own] = None
        alike: dict[tuple[tuple[int, ...], ...], list[tuple[int, ...]]] = {}
        for context, owns in by_context.items():
            alike.setdefault(tuple(sorted(owns)), []).append(context)
        sums = {}
        for owns, contexts in alike.items():
            table = label_log_likelihoods(
                self.model,
                self.variables,
                self._cut(contexts, max(map(len, owns))),
                owns,
                batch_size=self.batch_size,
                window=self.window,
            )
            for context, row in zip(contexts, table, strict=True):
                sums.update(((context, own), float(x)) for own, x in zip(owns, row, strict=True))
        return sums

    def _greedy(
        self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> dict[tuple[int, ...], tuple[int, ...]]:
        """What the model writes greedily, by context; no longer than its continuations."""
        longest: dict[tuple[int, ...], int] = {}
        for context, own in pairs:
            longest[context] = max(longest.get(context, 0), len(own))
        written = {}
        for length in sorted(set(longest.values())):
            contexts = [context for context, own in longest.items() if own == length]
            options = GenerateOptions(length, self.eot_token_id, self.batch_size, self.window)
            prompts = self._cut(contexts, length)
            found = generate(self.model, self.variables, prompts, options)
            for context, answer in zip(contexts, found, strict=True):
                end = (self.eot_token_id,) if answer.ended else ()
                written[context] = answer.tokens + end
        return written

    def _cut(self, contexts: Sequence[Sequence[int]], room: int) -> list[Sequence[int]]:
        """The last tokens of each, so many that there is room behind them; one at least."""
        return [context[-max(self.window - room, 1) :] for context in contexts]

    def loglikelihood_rolling(self, requests: Sequence[Any], **kwargs: Any) -> list[float]:
        """log p of whole texts, each token predicted once, see lm-eval."""
        del kwargs
        windows = [
            [
                (tuple(context), tuple(own))
                for context, own in map(
                    make_disjoint_window,
                    get_rolling_token_windows(
                        token_list=self.tok_encode(request.args[0]),
                        prefix_token=self.prefix_token_id,
                        max_seq_len=self.window - 1,
                        context_len=1,
                    ),
                )
            ]
            for request in requests
        ]
        sums = self._sums([pair for one in windows for pair in one])
        return [sum(sums[pair] for pair in one) for one in windows]

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
        """Answers up to the strings that end them, drawn or greedy, see lm-eval.

        Raises:
            UserError: a generation option that we do not have.
        """
        del kwargs
        answers: list[str] = [""] * len(requests)
        alike: dict[GenerateOptions, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(self._options(request.args[1]), []).append(number)
        for options, numbers in alike.items():
            contexts = [
                self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in numbers
            ]
            found = generate(
                self.model,
                self.variables,
                self._cut(contexts, options.max_new_tokens),
                options,
                decode=self.encoder.decode,
            )
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer.text or ""
        return answers

    def _options(self, asked: Mapping[str, Any]) -> GenerateOptions:
        given = dict(asked)
        until, draws = given.pop("until", ()), given.pop("do_sample", False)
        temperature = float(given.pop("temperature", 1.0 if draws else 0.0))
        most = int(given.pop("max_gen_toks", MOST_NEW))
        taken = {name: given.pop(name) for name in ("top_k", "top_p", "min_p") if name in given}
        if given:
            raise UserError(
                f"unknown generation options {', '.join(sorted(given))}",
                "an lm-eval task",
                "use until, do_sample, temperature, top_k, top_p, min_p, max_gen_toks",
            )
        stop = (until,) if isinstance(until, str) else tuple(until)
        return GenerateOptions(
            most,
            self.eot_token_id,
            self.batch_size,
            self.window,
            temperature=temperature if draws else 0.0,
            stop=tuple(text for text in stop if text),
            **taken,
        )


def load(path: str, adapter: str = "", batch_size: int = 16) -> HarnessModel:
    """The model in a folder, with an adapter where its folder or run folder is named.

    Raises:
        UserError: what cannot be read, or does not belong together.
    """
    base = load_base(ModelConfig(name="local", path=path))
    variables: dict[str, Any] = {"params": base.params}
    if adapter:
        variables["lora"] = read_given(find_adapter(adapter), base.config, base.identity).adapter
    window = base.config.max_positions
    return HarnessModel(base.module, variables, base.tokenizer, window, batch_size)
