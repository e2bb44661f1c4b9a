"""What tasks share whose answer is free text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ecomjax.metrics import text as metrics
from ecomjax.tasks.base import Example, Invalid, Task


class TextTask(Task):
    """A task that is answered in free text.

    Targets are references, of which the first is trained on; predictions are texts.
    """

    headline = "rougeL"

    def answer(self, example: Example) -> str:
        return example.target[0]

    def parse(self, text: str, example: Example) -> str | Invalid:
        """The output without the blanks around it; one that is blank is invalid."""
        del example
        return text.strip() or Invalid(text, "no text")

    def statistics(
        self, predictions: Sequence[str | Invalid], examples: Sequence[Example]
    ) -> np.ndarray:
        texts = [None if isinstance(guess, Invalid) else guess for guess in predictions]
        sources = [self.user(example) for example in examples]
        return metrics.statistics([example.target for example in examples], texts, sources)

    def summarize(self, totals: np.ndarray) -> dict[str, np.ndarray]:
        return metrics.summarize(totals)
