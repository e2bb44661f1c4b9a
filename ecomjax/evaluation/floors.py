"""What costs nothing: predictors that any model has to beat, learnt from the training split.

Their predictions are of the type that `Task.parse` returns, so that they are scored
through the same statistics as a model's.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ecomjax.tasks.base import Example, Task

Floor = Callable[[Task, Sequence[Example], Sequence[Example]], list[Any]]


def majority(task: Task, train: Sequence[Example], examples: Sequence[Example]) -> list[str]:
    """The most frequent target of the training split, for every example."""
    del task
    return [_most_frequent(example.target for example in train)] * len(examples)


def word_tags(
    task: Task, train: Sequence[Example], examples: Sequence[Example]
) -> list[tuple[str, ...]]:
    """For each token the tag it has most often in training, wherever it stands.

    Words are compared in lower case; those not seen get the most frequent tag of all.
    """
    del task
    tags = defaultdict(list)
    for example in train:
        for token, tag in zip(example.inputs["tokens"], example.target, strict=True):
            tags[token.lower()].append(tag)
    default = _most_frequent(tag for seen in tags.values() for tag in seen)
    best = {token: _most_frequent(seen) for token, seen in tags.items()}
    return [
        tuple(best.get(token.lower(), default) for token in example.inputs["tokens"])
        for example in examples
    ]


def bag_of_words(task: Task, train: Sequence[Example], examples: Sequence[Example]) -> list[str]:
    """Logistic regression on the words of the input, by field.

    The text is what the task shows a model, one field a line; a word counts apart in each
    field (`Query: red` is not `Color: red`). Weights are tf-idf, classes are balanced.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    analyzer: Any = _field_words  # its annotation in scikit-learn leaves out callables
    model = make_pipeline(
        TfidfVectorizer(analyzer=analyzer, sublinear_tf=True),
        LogisticRegression(max_iter=1000, class_weight="balanced"),
    )
    model.fit([task.user(example) for example in train], [example.target for example in train])
    return [str(label) for label in model.predict([task.user(example) for example in examples])]


FLOORS: dict[str, dict[str, Floor]] = {
    "esci": {"majority class": majority, "bag of words": bag_of_words},
    "queryner": {"most frequent tag per word": word_tags},
}
"""Floors by task, and by the name they have in tables."""


def floors(
    task: Task, train: Sequence[Example], examples: Sequence[Example]
) -> dict[str, list[Any]]:
    """Predictions of every floor of the task, by name; empty for a task that has none."""
    return {name: floor(task, train, examples) for name, floor in FLOORS.get(task.name, {}).items()}


def _most_frequent(values: Iterable[str]) -> str:
    """The most frequent value; among equals the first by name."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _field_words(text: str) -> list[str]:
    """Words of a text of lines `Field: words`, each with its field."""
    words = []
    for line in text.lower().split("\n"):
        field, _, content = line.partition(":")
        words.extend(f"{field}:{word}" for word in re.findall(r"\w+", content))
    return words
