"""Predictions of an encoder with a head on the examples of a task."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import flax.linen as nn
import numpy as np
from jaxtyping import Float

from ecomjax.data.encoded import NO_CLASS, Encoded, key_of
from ecomjax.decoding.classes import class_log_probabilities
from ecomjax.evaluation.encode import EncoderTokenizer, check_window, encode_pair, encode_words
from ecomjax.evaluation.predict import Demonstrations, Prediction
from ecomjax.models.heads import SequenceClassifier
from ecomjax.tasks.base import Example, Task

Slots = Sequence[int | None]
"""Where the classes of an example stand; None where that was cut off."""


def classifies(task: Task) -> Literal["words", "sequences"] | None:
    """What an encoder gives classes to in a task; None where answers are open."""
    if task.tags is not None and type(task).words is not Task.words:
        return "words"
    if task.labels is not None and type(task).pair is not Task.pair:
        return "sequences"
    return None


@dataclasses.dataclass(frozen=True)
class Classifier:
    """An encoder with a head, its tokenizer and the task whose classes it gives.

    Attributes:
        model: a classifier of `models.heads`: of sequences for a task with pairs and labels, of
            tokens for one with words and tags.
        tokenizer: of the model.
        task: what is asked; its labels or tags are the model's classes, in their order.
        batch_size: examples at once.
        window: most tokens of an example.
        too_long: what becomes of longer ones: "raise", or "truncate", see `evaluation.encode`. A
            word that is cut off gets the first of the tags.
    """

    model: nn.Module
    tokenizer: EncoderTokenizer
    task: Task
    batch_size: int
    window: int
    too_long: Literal["truncate", "raise"] = "raise"

    @property
    def of_sequences(self) -> bool:
        """Whether examples have one class each, and not one for each word."""
        return isinstance(self.model, SequenceClassifier)

    def encode(self, examples: Iterable[Example], cut: int | None = None) -> Iterator[Encoded]:
        """The examples as the model is trained on them.

        Args:
            examples: with their targets.
            cut: tokens beyond which inputs are cut; None: none is.
        """
        for example in examples:
            yield self._encoded(example, cut or sys.maxsize)[0]

    def _encoded(self, example: Example, window: int) -> tuple[Encoded, Slots]:
        """The example, and where its classes stand."""
        if self.of_sequences:
            found = encode_pair(self.task, example, self.tokenizer, window)
            types, slots, given = found.token_types, (0,), (found.label,)
        else:
            found = encode_words(self.task, example, self.tokenizer, window)
            types, slots, given = [0] * len(found.tokens), found.slots, found.tags
        classes = [NO_CLASS] * len(found.tokens)
        for slot, number in zip(slots, given, strict=True):
            if slot is not None:
                classes[slot] = number
        marks = tuple(zip(types, classes, strict=True))
        key = key_of(self.task.user(example))
        tokens = found.tokens
        return Encoded(example.id, tokens, len(tokens), key, marks, found.lost), slots

    def texts(self, example: Example, demonstrations: Demonstrations = ()) -> tuple[str, ...]:
        """What the example is read as; encoders are shown no demonstrations."""
        del demonstrations
        return self.task.pair(example) or self.task.words(example) or ()

    def fitted(
        self, examples: Sequence[Example], demonstrations: Sequence[Demonstrations] = ()
    ) -> list[tuple[Encoded, Slots]]:
        """The examples as the model reads them, and where their classes stand.

        Raises:
            UserError: one is longer than the window, and is not to be cut.
        """
        if any(demonstrations):
            raise TypeError("an encoder is shown no demonstrations")
        cut = self.window if self.too_long == "truncate" else sys.maxsize
        found = [self._encoded(example, cut) for example in examples]
        check_window(self.task, examples, [encoded.tokens for encoded, _ in found], self.window)
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
            examples: what to classify.
            demonstrations: none; encoders are shown none.
            on_done: called with the number of examples just finished.

        Raises:
            UserError: see `fitted`.
        """
        fitted = self.fitted(examples, demonstrations)
        tables = class_log_probabilities(
            self.model,
            variables,
            [encoded.tokens for encoded, _ in fitted],
            [[kind for kind, _ in encoded.marks] for encoded, _ in fitted],
            self.batch_size,
            on_done,
        )
        return [
            self._prediction(example, *each, table)
            for example, each, table in zip(examples, fitted, tables, strict=True)
        ]

    def _prediction(
        self, example: Example, encoded: Encoded, slots: Slots, table: Float[np.ndarray, "S C"]
    ) -> Prediction:
        """What the log-probabilities of the classes of slots say."""
        if self.of_sequences:
            labels = self.task.labels or ()
            label = labels[int(table[0].argmax())]
            scores = dict(zip(labels, table[0].tolist(), strict=True))
            return Prediction(label, label, scores, encoded.lost)
        tags = self.task.tags or ()
        found = tuple(tags[0 if slot is None else int(table[slot].argmax())] for slot in slots)
        text = self.task.answer(dataclasses.replace(example, target=found))
        return Prediction(found, text, {}, encoded.lost)
