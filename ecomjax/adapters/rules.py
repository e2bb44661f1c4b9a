"""Which kernels are adapted, and how."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.typing import Params

EVERY_LINEAR = r"(.*/)?layers/.*(?<!/router)/kernel"
"""Every linear layer of every stack but the routers of experts; the LM head stands outside."""


@dataclasses.dataclass(frozen=True)
class LoraRule:
    """Adapts every kernel whose whole path matches `pattern`.

    Attributes:
        pattern: regular expression over paths such as `layers/attn/q/kernel`.
        rank: R, at least 1.
        alpha: the adapter is scaled by alpha / rank.
        dropout: probability of dropping an input of the adapter while training.
    """

    pattern: str = EVERY_LINEAR
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(
                f"rank {self.rank}", f"rule '{self.pattern}'", "use a rank of 1 or more"
            )


def resolve(rules: Sequence[LoraRule], axes: Params) -> dict[str, LoraRule]:
    """{path: rule} over the kernels that are matrices; where several match, the last wins.

    Raises:
        UserError: a rule matches no kernel.
    """
    kernels = [path for path, leaf in trees.flatten(axes).items() if leaf.inputs > 0]
    chosen: dict[str, LoraRule] = {}
    for rule in rules:
        hits = [path for path in kernels if re.fullmatch(rule.pattern, path)]
        if not hits:
            raise UserError(
                "LoRA rule matches no kernel",
                f"pattern '{rule.pattern}'",
                f"the kernels are {', '.join(sorted(kernels))}",
            )
        chosen.update(dict.fromkeys(hits, rule))
    return chosen
