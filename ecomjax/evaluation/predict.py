"""Predictions of a language model on the examples of a task."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn

from ecomjax.data.encoded import Encoded, key_of
from ecomjax.data.forms import Form
from ecomjax.decoding.automaton import Automaton, from_form
from ecomjax.decoding.constrain import generate_constrained
from ecomjax.decoding.generate import GenerateOptions, generate
from ecomjax.decoding.prefix import common_prefix
from ecomjax.decoding.sampling import Sampling
from ecomjax.errors import UserError
from ecomjax.evaluation.labels import CONTENT_FREE, LabelScore, label_scores
from ecomjax.tasks.base import Example, Prompt, Task
from ecomjax.tasks.prompts import render

Demonstrations = Sequence[Example]
"""Shown before a question, in this order."""

Method = Literal["auto", "likelihood", "generate", "constrained"]

ENCODED_AT_ONCE = 1024
"""Examples whose texts are tokenized together: a batch of them goes over all cores."""


def way_of(task: Task, method: Method) -> Literal["likelihood", "generate", "constrained"]:
    """How answers to a task are found, see `Predictor`.

    Raises:
        UserError: the method does not suit the task.
    """
    if method == "auto":
        return "generate" if task.labels is None else "likelihood"
    what = ""
    if method == "likelihood" and task.labels is None:
        what = "no closed set of labels"
    if method == "constrained" and not task.has_form:
        what = "answers without a form"
    if what:
        remedy = "set its method to auto or generate"
        raise UserError(f"{what} for method {method!r}", f"task {task.name}", remedy)
    return method


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer; `hf.tokenizer.Tokenizer` is one."""

    @property
    def eos_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def escape(self, text: str) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def chat(self, messages: list[dict[str, str]]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model said of one example, and how it was read.

    Attributes:
        value: of the type of `Example.target`, or `Invalid`.
        text: the answer as text; for label likelihoods, the most likely label.
        scores: score of every label, where labels were scored; else empty.
        lost: tokens of the input that were cut to leave room for the answer.
        dropped: demonstrations that were left out for it.
    """

    value: Any
    text: str
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    lost: int = 0
    dropped: int = 0


class Fitted(NamedTuple):
    """A prompt that leaves room for an answer, and what that has cost."""

    prompt: tuple[int, ...]
    lost: int
    """Tokens of the input."""
    dropped: int
    """Demonstrations."""
    content_free: tuple[tuple[int, ...], ...] = ()
    """What calibration asks besides, which leaves room for an answer too."""


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A model, its tokenizer and the way it is asked.

    Attributes:
        model: see `models.likelihood.token_log_likelihood`.
        tokenizer: of the model.
        task: what is asked.
        prompt_format: "chat" or "alpaca".
        method: "likelihood" scores the task's labels, "generate" lets the model write,
            "constrained" lets it decide what the form of the answer leaves open, greedily;
            "auto" is likelihood where the task has labels.
        label_score: what labels are compared by: "sum", log p(label | prompt), of all tokens of
            the label and the one that ends it; "mean", that by token, which does not favour
            short labels; "calibrated", see `metrics.calibration.contextual`. Of labels with
            equal scores the first of the task is chosen.
        batch_size: prompts at once; where labels are scored, rows of them.
        window: most tokens of a prompt and its answer.
        max_new_tokens: of an answer written freely; a constrained one is as long as its form.
        too_long: what becomes of prompts that leave no room for an answer: "raise", or
            "truncate", which leaves out demonstrations, the first shown first, and then cuts
            the beginning of the example's own input.
        sampling, stop, seed: of what is written freely, see `GenerateOptions`.
    """

    model: nn.Module
    tokenizer: Tokenizer
    task: Task
    prompt_format: str
    method: Method
    batch_size: int
    window: int
    max_new_tokens: int
    too_long: Literal["truncate", "raise"] = "raise"
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    seed: int = 0
    label_score: LabelScore = "sum"

    def __post_init__(self):
        way_of(self.task, self.method)

    def prompt(self, example: Example, demonstrations: Demonstrations = ()) -> tuple[int, ...]:
        """Token ids of the prompt, which end where the answer starts."""
        return self._tokens(self.task.prompt(example, demonstrations))

    def texts(self, example: Example, demonstrations: Demonstrations = ()) -> list[str]:
        """All that the model is asked and what answers are offered, as texts.

        They are as they were before anything is cut, see `fitted`.
        """
        labels = self.task.labels or () if self.by_likelihood else ()
        asked = [self.task.prompt(example, demonstrations)]
        asked += self._content_free(example, demonstrations)
        return [*map(self._text, asked), *labels]

    def answer(self, text: str) -> tuple[int, ...]:
        """Token ids of an answer and the token that ends it."""
        return (*self.tokenizer.encode(text), self.tokenizer.eos_id)

    def encode(self, examples: Iterable[Example]) -> Iterator[Encoded]:
        """The examples as the model is trained on them: prompt, answer, end."""
        remaining = iter(examples)
        while chunk := list(itertools.islice(remaining, ENCODED_AT_ONCE)):
            rendered = [self._text(self.task.prompt(example)) for example in chunk]
            prompts = self.tokenizer.encode_batch(rendered)
            texts = [self.tokenizer.escape(self.task.answer(example)) for example in chunk]
            answers = self.tokenizer.encode_batch(texts)
            for example, prompt, answer in zip(chunk, prompts, answers, strict=True):
                tokens = (*prompt, *answer, self.tokenizer.eos_id)
                yield Encoded(example.id, tokens, len(prompt), key_of(self.task.user(example)))

    def _content_free(self, example: Example, shown: Demonstrations) -> list[Prompt]:
        """What has to be asked besides the example, so that its scores can be calibrated."""
        if self.label_score != "calibrated" or not self.by_likelihood:
            return []
        return [self.task.content_free(example, text, shown) for text in CONTENT_FREE]

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(self._text(prompt)))

    def _text(self, given: Prompt) -> str:
        escape = self.tokenizer.escape
        turns = tuple((escape(user), escape(answer)) for user, answer in given.turns)
        prompt = Prompt(given.system, turns, escape(given.user))
        return render(prompt, self.prompt_format, self.tokenizer.chat)

    @property
    def by_likelihood(self) -> bool:
        """Whether answers are labels, found by their likelihood."""
        return way_of(self.task, self.method) == "likelihood"

    def automata(self, examples: Sequence[Example]) -> list[Automaton]:
        """The answers that each example allows, as the model is trained to write them.

        Raises:
            UserError: see `decoding.automaton.from_form`.
        """

        def encode(texts: Sequence[str]) -> list[list[int]]:
            return self.tokenizer.encode_batch([self.tokenizer.escape(text) for text in texts])

        made: dict[Form, Automaton] = {}
        found = []
        for example in examples:
            form = self.task.form(example)
            if form is None:
                raise TypeError(f"task {self.task.name} has a form for some examples alone")
            if form not in made:
                where = f"{self.task.name}, example {example.id}"
                made[form] = from_form(form, encode, self.tokenizer.eos_id, where)
            found.append(made[form])
        return found

    def fitted(
        self, examples: Sequence[Example], demonstrations: Sequence[Demonstrations] = ()
    ) -> list[Fitted]:
        """Prompts that leave room for an answer.

        What stands before an example's own input is never cut, nor is a prompt's last token.
        Content-free prompts show the same demonstrations as the example's own, and are not cut.

        Args:
            examples: what is asked.
            demonstrations: those of each example; empty: none.

        Raises:
            UserError: a prompt is too long, and is not to be cut or would keep nothing.
        """
        if self.method == "constrained":
            answers = [automaton.longest for automaton in self.automata(examples)]
        elif self.by_likelihood:
            longest = max(len(self.answer(label)) for label in self.task.labels or ())
            answers = [longest] * len(examples)
        else:
            answers = [self.max_new_tokens] * len(examples)
        return self._fitted(examples, demonstrations, answers)

    def _fitted(
        self,
        examples: Sequence[Example],
        demonstrations: Sequence[Demonstrations],
        answers: Sequence[int],
    ) -> list[Fitted]:
        """`fitted`, for answers of so many tokens."""
        shown = demonstrations or [()] * len(examples)
        return [self._fit(*each) for each in zip(examples, shown, answers, strict=True)]

    def _fit(self, example: Example, shown: Demonstrations, answer: int) -> Fitted:
        room = self.window - answer
        for dropped in range(len(shown) + 1 if self.too_long == "truncate" else 1):
            prompt, *content_free = self._asked(example, shown[dropped:])
            longest = max(map(len, (prompt, *content_free)))
            if longest <= room:
                return Fitted(prompt, 0, dropped, tuple(content_free))
        if self.too_long == "truncate" and all(len(each) <= room for each in content_free):
            head, lost = self._head(example, prompt), len(prompt) - room
            if head + lost < len(prompt):
                cut = prompt[:head] + prompt[head + lost :]
                return Fitted(cut, lost, dropped, tuple(content_free))
        raise UserError(
            f"prompt of {longest} tokens leaves no room for an answer of {answer} in the window "
            f"of {self.window}",
            f"{self.task.name}, example {example.id}",
            "use fewer demonstrations or shorter inputs, or set "
            "config.evaluation.too_long=truncate",
        )

    def _asked(self, example: Example, shown: Demonstrations) -> list[tuple[int, ...]]:
        """The example's prompt, and what calibration asks besides."""
        return [self.prompt(example, shown), *map(self._tokens, self._content_free(example, shown))]

    def _head(self, example: Example, prompt: tuple[int, ...]) -> int:
        """How many tokens of a prompt without demonstrations stand before the input.

        No text goes on as two others do that differ in their first token. Of an empty one, what
        stands around it could be read as one token.
        """
        question = self.task.prompt(example)
        others = (self._tokens(dataclasses.replace(question, user=text)) for text in ("a", "0"))
        return common_prefix([prompt, *others])

    def predict(
        self,
        variables: Any,
        examples: Sequence[Example],
        demonstrations: Sequence[Demonstrations] = (),
        on_done: Callable[[int], None] = lambda count: None,
        adapters: Sequence[int] | None = None,
    ) -> list[Prediction]:
        """Predictions for the examples, in their order.

        Args:
            variables: {"params": ..., "lora": ...}.
            examples: what to answer.
            demonstrations: those of each example; empty: none.
            on_done: called with the number of examples just finished.
            adapters: which of several each example uses, where "lora" holds several; see
                `adapters.routing.hold_together`.

        Raises:
            UserError: see `fitted`.
        """
        if self.method == "constrained":
            return self._constrained(variables, examples, demonstrations, on_done, adapters)
        fitted = self.fitted(examples, demonstrations)
        prompts = [each.prompt for each in fitted]
        if self.by_likelihood:
            labels = self.task.labels or ()
            table = label_scores(
                self.label_score,
                self.model,
                variables,
                prompts,
                [each.content_free for each in fitted],
                [self.answer(label) for label in labels],
                batch_size=self.batch_size,
                window=self.window,
                on_done=on_done,
                adapters=adapters,
            )
            return [
                Prediction(
                    labels[int(row.argmax())],
                    labels[int(row.argmax())],
                    dict(zip(labels, row.tolist(), strict=True)),
                    each.lost,
                    each.dropped,
                )
                for row, each in zip(table, fitted, strict=True)
            ]
        options = GenerateOptions(
            max_new_tokens=self.max_new_tokens,
            end=self.tokenizer.eos_id,
            batch_size=self.batch_size,
            window=self.window,
            seed=self.seed,
            stop=self.stop,
            **dataclasses.asdict(self.sampling),
        )
        numbers = [key_of(example.id) % 2**32 for example in examples]
        asked = (variables, prompts, options, on_done, adapters, numbers)
        answers = generate(self.model, *asked, decode=self.tokenizer.decode)
        texts = [str(answer.text) for answer in answers]
        return [
            Prediction(self.task.parse(text, example), text, {}, each.lost, each.dropped)
            for text, example, each in zip(texts, examples, fitted, strict=True)
        ]

    def _constrained(
        self,
        variables: Any,
        examples: Sequence[Example],
        demonstrations: Sequence[Demonstrations],
        on_done: Callable[[int], None],
        adapters: Sequence[int] | None,
    ) -> list[Prediction]:
        """`predict` by answers of the form that each example allows."""
        automata = self.automata(examples)
        longest = [automaton.longest for automaton in automata]
        fitted = self._fitted(examples, demonstrations, longest)
        answers = generate_constrained(
            self.model,
            variables,
            [each.prompt for each in fitted],
            automata,
            batch_size=self.batch_size,
            window=self.window,
            on_done=on_done,
            adapters=adapters,
        )
        texts = [
            automaton.text((*answer.tokens, self.tokenizer.eos_id))
            for automaton, answer in zip(automata, answers, strict=True)
        ]
        return [
            Prediction(self.task.parse(text, example), text, {}, each.lost, each.dropped)
            for text, example, each in zip(texts, examples, fitted, strict=True)
        ]
