"""What costs nothing: predictors that any model has to beat, copied from the input or
learnt from the training split.

Their predictions are of the type that `Task.parse` returns, so that they are scored
through the same statistics as a model's.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

from ecomjax.tasks.base import Example, Task

Floor = Callable[[Task, Sequence[Example], Sequence[Example]], list[Any]]

FIELD_SHARE = 0.5
"""Of the training texts, more than which a name opens a line of if it is that of a field."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s")


def majority(task: Task, train: Sequence[Example], examples: Sequence[Example]) -> list[str]:
    """The most frequent target of the training split, for every example."""
    del task
    return [_most_frequent(example.target for example in train)] * len(examples)


def word_tags(
    task: Task, train: Sequence[Example], examples: Sequence[Example]
) -> list[tuple[str, ...]]:
    """For each word the tag it has most often in training, wherever it stands.

    Words are compared in lower case; those not seen get the most frequent tag of all.
    """
    tags = defaultdict(list)
    for example in train:
        for word, tag in zip(task.words(example) or (), example.target, strict=True):
            tags[word.lower()].append(tag)
    default = _most_frequent(tag for seen in tags.values() for tag in seen)
    best = {word: _most_frequent(seen) for word, seen in tags.items()}
    return [
        tuple(best.get(word.lower(), default) for word in task.words(example) or ())
        for example in examples
    ]


def bag_of_words(task: Task, train: Sequence[Example], examples: Sequence[Example]) -> list[str]:
    """Logistic regression on the words of the input, by field.

    The text is what the task shows a model; where a line is a field, as most texts have it, a
    word counts apart in it (`Query: red` is not `Color: red`). Weights are tf-idf, classes are
    balanced. Where training has one class, or no word, there is nothing to learn but the majority.
    """
    shown = [task.user(example) for example in train]
    opened = Counter(name for text in shown for name in {name for name, _ in _lines(text)})
    fields = {name for name, count in opened.items() if count > FIELD_SHARE * len(shown)}
    analyzer: Any = partial(_field_words, fields)  # scikit-learn's annotation has no callables
    if len({example.target for example in train}) == 1 or not any(map(analyzer, shown)):
        return majority(task, train, examples)
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(analyzer=analyzer, sublinear_tf=True),
        LogisticRegression(max_iter=1000, class_weight="balanced"),
    )
    model.fit(shown, [example.target for example in train])
    return [str(label) for label in model.predict([task.user(example) for example in examples])]


def lead_review(task: Task, train: Sequence[Example], examples: Sequence[Example]) -> list[str]:
    """The first review as it is."""
    del task, train
    return [example.inputs["reviews"][0] for example in examples]


def lead_sentences(task: Task, train: Sequence[Example], examples: Sequence[Example]) -> list[str]:
    """The first sentence of every review; one ends at a full stop and the like, and a blank."""
    del task, train
    return [
        " ".join(_SENTENCE_END.split(review, maxsplit=1)[0] for review in example.inputs["reviews"])
        for example in examples
    ]


def copied_title(task: Task, train: Sequence[Example], examples: Sequence[Example]) -> list[str]:
    """The product's title as its description."""
    del task, train
    return [example.inputs["title"] for example in examples]


def copied_bullets(task: Task, train: Sequence[Example], examples: Sequence[Example]) -> list[str]:
    """The product's bullet points as its description, or its title where it has none."""
    del task, train
    return [example.inputs.get("bullets", example.inputs["title"]) for example in examples]


OF_LABELS: dict[str, Floor] = {"majority class": majority, "bag of words": bag_of_words}

OF_TAGS: dict[str, Floor] = {"most frequent tag per word": word_tags}

OF_TEXTS: dict[str, dict[str, Floor]] = {
    "review_summarization": {
        "first review": lead_review,
        "first sentence of each review": lead_sentences,
    },
    "description_generation": {"title": copied_title, "bullet points": copied_bullets},
}
"""Floors of tasks answered in free text, by task and by the name they have in tables."""


def floors(
    task: Task, train: Sequence[Example], examples: Sequence[Example]
) -> dict[str, list[Any]]:
    """Predictions of every floor of the task, by name; empty for a task that has none.

    Every task with labels or tags has those of such tasks.
    """
    known = OF_LABELS if task.labels else OF_TAGS if task.tags else OF_TEXTS.get(task.name, {})
    return {name: floor(task, train, examples) for name, floor in known.items()}


def _most_frequent(values: Iterable[str]) -> str:
    """The most frequent value; among equals the first by name."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _lines(text: str) -> list[tuple[str, str]]:
    """Each line in lower case: what stands before its first colon, and what behind."""
    split = (line.partition(":") for line in text.lower().split("\n"))
    return [(name.strip(), content) if colon else ("", name) for name, colon, content in split]


def _field_words(fields: Collection[str], text: str) -> list[str]:
    """Words of a text, each with the field whose line it is in, as `Field: words`, if any."""
    words = []
    for name, content in _lines(text):
        field, content = (name, content) if name in fields else ("", f"{name} {content}")
        words.extend(f"{field}:{word}" for word in re.findall(r"\w+", content))
    return words
