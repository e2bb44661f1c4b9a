"""Tasks by name."""

from __future__ import annotations

import inspect
from typing import Any

from ecomjax.errors import UserError
from ecomjax.tasks.base import Task
from ecomjax.tasks.description_generation import DescriptionGeneration
from ecomjax.tasks.esci import Esci
from ecomjax.tasks.instruction import Instruction
from ecomjax.tasks.queryner import QueryNer
from ecomjax.tasks.review_summarization import ReviewSummarization

TASKS: dict[str, type[Task]] = {
    kind.name: kind
    for kind in (Esci, QueryNer, ReviewSummarization, DescriptionGeneration, Instruction)
}


def get_task(name: str, **options: Any) -> Task:
    """The task of a name, made with its options; UserError if there is none."""
    if name not in TASKS:
        raise UserError(f"unknown task '{name}'", "task", f"known: {', '.join(sorted(TASKS))}")
    kind = TASKS[name]
    known = inspect.signature(kind).parameters
    for option in options:
        if option not in known:
            raise UserError(
                f"unknown option '{option}'", f"task {name}", f"known: {', '.join(known) or 'none'}"
            )
    return kind(**options)
