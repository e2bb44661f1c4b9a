"""Predictions of an encoder-decoder on the examples of a task: a source in, an answer out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import flax.linen as nn

from ecomjax.data.encoded import Encoded, key_of
from ecomjax.decoding.generate import GenerateOptions, generate
from ecomjax.decoding.sampling import Sampling
from ecomjax.evaluation.encode import EncodedSource, SourceTokenizer, check_window, encode_source
from ecomjax.evaluation.predict import Demonstrations, Prediction
from ecomjax.tasks.base import Example, Task

LEAST = 16
"""Tokens that are left of a source, at least, where it is cut for its answer to fit beside it."""


@runtime_checkable
class Tokenizer(SourceTokenizer, Protocol):
    """What is asked of an encoder-decoder's tokenizer; `hf.tokenizer.Tokenizer` is one."""

    def decode(self, ids: Iterable[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Responder:
    """An encoder-decoder, its tokenizer and the task whose answers it writes.

    Attributes:
        model: a `models.encoder_decoder.EncoderDecoder`.
        tokenizer: of the model.
        task: what is asked, by `Task.source`; what is written is read by `Task.parse`.
        batch_size: sources at once.
        window: most tokens of a source, and of an answer with the tokens that open it.
        max_new_tokens: of an answer.
        too_long: what becomes of longer sources: "raise", or "truncate", which cuts their ends.
        sampling, stop, seed: see `GenerateOptions`.
    """

    model: nn.Module
    tokenizer: Tokenizer
    task: Task
    batch_size: int
    window: int
    max_new_tokens: int
    too_long: Literal["truncate", "raise"] = "raise"
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    seed: int = 0

    @property
    def start(self) -> tuple[int, ...]:
        """Tokens that answers open with."""
        bound: Any = self.model
        return bound.config.start

    def encode(self, examples: Iterable[Example], cut: int | None = None) -> Iterator[Encoded]:
        """The examples as the model is trained on them: source, answer, end.

        Args:
            examples: with their targets.
            cut: tokens that a source and its answer may have together; longer sources are cut.
                None: none is. An answer that leaves a source less than `LEAST` is left as it is.
        """
        for example in examples:
            found = encode_source(self.task, example, self.tokenizer, sys.maxsize)
            room = (cut or sys.maxsize) - len(found.target)
            if LEAST <= room < len(found.source):
                found = encode_source(self.task, example, self.tokenizer, room)
            tokens, key = (*found.source, *found.target), key_of(self.task.user(example))
            yield Encoded(example.id, tokens, len(found.source), key, lost=found.lost)

    def texts(self, example: Example, demonstrations: Demonstrations = ()) -> tuple[str, ...]:
        """The source that the example is read as; it shows no demonstrations."""
        del demonstrations
        return (self.task.source(example),)

    def fitted(
        self, examples: Sequence[Example], demonstrations: Sequence[Demonstrations] = ()
    ) -> list[EncodedSource]:
        """The sources as the model reads them.

        Raises:
            UserError: one is longer than the window, and is not to be cut.
        """
        if any(demonstrations):
            raise TypeError("sources show no demonstrations")
        cut = self.window if self.too_long == "truncate" else sys.maxsize
        found = [encode_source(self.task, each, self.tokenizer, cut) for each in examples]
        check_window(self.task, examples, [encoded.source for encoded in found], self.window)
        return found

    def predict(
        self,
        variables: Any,
        examples: Sequence[Example],
        demonstrations: Sequence[Demonstrations] = (),
        on_done: Callable[[int], None] = lambda count: None,
    ) -> list[Prediction]:
        """Predictions for the examples, in their order; none depends on the others.

        Args:
            variables: {"params": ..., "lora": ...}.
            examples: what to answer.
            demonstrations: none; sources show none.
            on_done: called with the number of examples just finished.

        Raises:
            UserError: see `fitted`; an answer may be longer than the window.
        """
        sources = self.fitted(examples, demonstrations)
        options = GenerateOptions(
            max_new_tokens=self.max_new_tokens,
            end=self.tokenizer.eos_id,
            batch_size=self.batch_size,
            window=self.window,
            start=self.start,
            seed=self.seed,
            stop=self.stop,
            **dataclasses.asdict(self.sampling),
        )
        prompts = [each.source for each in sources]
        numbers = [key_of(example.id) % 2**32 for example in examples]
        asked = (variables, prompts, options, on_done)
        answers = generate(self.model, *asked, numbers=numbers, decode=self.tokenizer.decode)
        texts = [str(answer.text) for answer in answers]
        return [
            Prediction(self.task.parse(text, example), text, {}, source.lost)
            for text, example, source in zip(texts, examples, sources, strict=True)
        ]
