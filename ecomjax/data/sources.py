"""Where rows come from: a folder, the Hugging Face Hub or the synthetic shop.

All of them hand out the same columns, named as in the folder form
`<folder>/<name>/{train,validation,test}.jsonl`: for `esci` those of the Shopping Queries
data, for `queryner` example_id, tokens and ner_tags. What the columns must hold is the
task's to say; a row remembers where it stands so that the task can point there.
"""

from __future__ import annotations

from ecomjax.data import store
from ecomjax.data.hub import HubSource
from ecomjax.data.local import LocalSource
from ecomjax.data.rows import SPLITS, Row, Rows, Source, check_split, digest
from ecomjax.errors import UserError

__all__ = ["SPLITS", "HubSource", "LocalSource", "Row", "Rows", "Source", "SyntheticSource"]


class SyntheticSource:
    """Rows of the seeded synthetic shop, generated anew: no file and no network.

    Args:
        seed: equal seeds give equal rows.
        sizes: numbers of rows by split.
    """

    def __init__(self, seed: int = 0, sizes: store.Sizes | None = None):
        self.name = "synthetic"
        self.seed = seed
        self.sizes = sizes or store.Sizes()

    def rows(self, name: str, split: str) -> Rows:
        check_split(split, SPLITS, self.name)
        if name not in store.TASKS:
            raise UserError(
                f"the synthetic shop has no {name!r}",
                "config.data.source",
                f"it has {', '.join(store.TASKS)}; use local with config.data.path, or hub",
            )
        values = store.rows(name, split, self.seed, getattr(self.sizes, split))
        if not values:
            raise UserError("split of size 0", f"synthetic {split}", "ask for at least one row")
        return [
            Row(columns, f"synthetic/{name}/{split}:{number}")
            for number, columns in enumerate(values, start=1)
        ]

    def fingerprint(self, name: str, split: str) -> str:
        return digest(self.rows(name, split))
