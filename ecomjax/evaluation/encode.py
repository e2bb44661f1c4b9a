"""What encoders and encoder-decoders read of an example, as token ids.

What decoders read is made by `predict.Predictor`. Inputs longer than a window are cut, and
what is lost is told; answers are never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ecomjax.errors import UserError
from ecomjax.tasks.base import Example, Task


@runtime_checkable
class EncoderTokenizer(Protocol):
    """What is asked of an encoder's tokenizer; `hf.tokenizer.Tokenizer` is one."""

    @property
    def fingerprint(self) -> str: ...

    def enclosed(self, first: str, second: str | None = None) -> Any: ...


@runtime_checkable
class SourceTokenizer(EncoderTokenizer, Protocol):
    """What is asked of an encoder-decoder's tokenizer; `hf.tokenizer.Tokenizer` is one."""

    @property
    def eos_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class EncodedPair:
    """A text or a pair of texts, and its class.

    Attributes:
        id: the example's id.
        tokens: with the special tokens around each text.
        token_types: which text a token counts as; all 0 for tokenizers that have no types.
        label: index of the target in the task's labels.
        lost: tokens cut off.
    """

    id: str
    tokens: tuple[int, ...]
    token_types: tuple[int, ...]
    label: int
    lost: int = 0


@dataclass(frozen=True)
class EncodedWords:
    """Words, and the class of each.

    Attributes:
        id: the example's id.
        tokens: with the special tokens around them.
        slots: for each word the place of its first token in `tokens`; None where that was
            cut off, or the tokenizer knows nothing of the word (a lone control character).
        tags: for each word the index of its tag in the task's tags.
    """

    id: str
    tokens: tuple[int, ...]
    slots: tuple[int | None, ...]
    tags: tuple[int, ...]

    @property
    def lost(self) -> int:
        """Words without a slot."""
        return self.slots.count(None)


@dataclass(frozen=True)
class EncodedSource:
    """What an encoder-decoder reads, and what it is to write.

    Attributes:
        id: the example's id.
        source: with the special tokens around the text, the end token last.
        target: the answer and the end token; what opens it is the model's to say.
        lost: tokens of the source cut off.
    """

    id: str
    source: tuple[int, ...]
    target: tuple[int, ...]
    lost: int = 0


def encode_pair(
    task: Task, example: Example, tokenizer: EncoderTokenizer, window: int
) -> EncodedPair:
    """The example for a classifier of sequences; `Task.pair` and the label.

    Args:
        task: one with labels.
        example: of the task.
        tokenizer: of the model.
        window: most tokens. Those beyond it are cut from the end of the longer text, until
            both are equally long, then from both.

    Raises:
        UserError: the task has no pairs, or the window holds no text.
    """
    texts = task.pair(example)
    if texts is None or task.labels is None:
        raise _no_such(task, "sequence classification")
    first, second = texts
    encoding = tokenizer.enclosed(first, second or None)
    kept = _within(encoding, window)
    return EncodedPair(
        example.id,
        tuple(encoding.ids[i] for i in kept),
        tuple(encoding.type_ids[i] for i in kept),
        task.labels.index(example.target),
        len(encoding.ids) - len(kept),
    )


def encode_words(
    task: Task, example: Example, tokenizer: EncoderTokenizer, window: int
) -> EncodedWords:
    """The example for a classifier of tokens; `Task.words` and their tags.

    The words are tokenized as one text, joined by spaces, as the model has read texts in
    pretraining; where a word stands in it says which tokens are its own.

    Args:
        task: one with tags.
        example: of the task.
        tokenizer: of the model.
        window: most tokens; those beyond it are cut from the end.

    Raises:
        UserError: the task has no words, or the window holds no text.
    """
    words = task.words(example)
    if words is None or task.tags is None:
        raise _no_such(task, "token classification")
    encoding = tokenizer.enclosed(" ".join(words))
    kept = _within(encoding, window)
    spans = [encoding.offsets[i] if encoding.sequence_ids[i] == 0 else (0, 0) for i in kept]
    slots: list[int | None] = []
    slot = start = 0
    for word in words:
        end = start + len(word)
        found = next(
            (i for i in range(slot, len(spans)) if spans[i][0] < end and spans[i][1] > start), None
        )
        slots.append(found)
        slot = slot if found is None else found + 1
        start = end + 1
    tokens = tuple(encoding.ids[i] for i in kept)
    tags = tuple(task.tags.index(tag) for tag in example.target)
    return EncodedWords(example.id, tokens, tuple(slots), tags)


def encode_source(
    task: Task, example: Example, tokenizer: SourceTokenizer, window: int
) -> EncodedSource:
    """The example for an encoder-decoder; `Task.source` and `Task.answer`.

    Args:
        task: any.
        example: of the task.
        tokenizer: of the model.
        window: most tokens of the source; those beyond it are cut from its end.

    Raises:
        UserError: the window holds no text.
    """
    encoding, end = tokenizer.enclosed(task.source(example)), tokenizer.eos_id
    open_ended = encoding.ids[-1:] != [end]
    kept = _within(encoding, window - open_ended)
    source = (*(encoding.ids[i] for i in kept), *([end] if open_ended else []))
    target = (*tokenizer.encode(task.answer(example)), end)
    return EncodedSource(example.id, source, target, len(encoding.ids) - len(kept))


def _within(encoding: Any, window: int) -> list[int]:
    """Which tokens of an encoding are kept, so that they are at most `window`."""
    owners: Sequence[int | None] = encoding.sequence_ids
    sizes = (owners.count(0), owners.count(1))
    special = len(owners) - sum(sizes)
    if window <= special:
        raise UserError(
            f"a window of {window} tokens holds no text",
            "the tokenizer",
            f"it adds {special} special tokens: use a longer window",
        )
    room = _shares(sizes, window - special)
    seen = [0, 0]
    kept = []
    for place, owner in enumerate(owners):
        if owner is None:
            kept.append(place)
        else:
            seen[owner] += 1
            if seen[owner] <= room[owner]:
                kept.append(place)
    return kept


def _shares(sizes: tuple[int, int], room: int) -> tuple[int, int]:
    """How many tokens of each text fit, the longer one cut first (as transformers does it)."""
    if sum(sizes) <= room:
        return sizes
    short = min(min(sizes), room // 2)
    long = room - short
    return (short, long) if sizes[0] <= sizes[1] else (long, short)


def _no_such(task: Task, what: str) -> UserError:
    return UserError(f"no {what}", f"task {task.name}", "use a model that writes text")


def check_window(
    task: Task, examples: Sequence[Example], read: Sequence[Sequence[int]], window: int
) -> None:
    """UserError where what is read of an example has more tokens than the window."""
    for example, tokens in zip(examples, read, strict=True):
        if len(tokens) > window:
            raise UserError(
                f"input of {len(tokens)} tokens in a window of {window}",
                f"{task.name}, example {example.id}",
                "use shorter inputs, or set config.evaluation.too_long=truncate",
            )
