"""Which kernels are adapted, and how."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.typing import ParamAxes, Params

EVERY_LINEAR = r"(.*/)?layers/.*(?<!/router)/kernel"
"""Every linear layer of every stack but the routers of experts; the LM head stands outside."""


@dataclasses.dataclass(frozen=True)
class LoraRule:
    """Adapts every kernel whose whole path matches `pattern`.

    The token embedding, `embed/embedding`, and the LM head, `lm_head/kernel`, are kernels too.

    Attributes:
        pattern: regular expression over paths such as `layers/attn/q/kernel`.
        rank: R, at least 1.
        alpha: the adapter is scaled by alpha / rank.
        dropout: probability of dropping an input of the adapter while training.
        layers: the layers of the stack that the rule is about; empty for all.
        rslora: scales by alpha / sqrt(rank) instead, so that larger ranks learn as fast
            (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2).
        dora: magnitude and direction apart, see `typing.DoRA`.
        pissa: starts from the principal part of the kernel, see `lora.init`.
    """

    pattern: str = EVERY_LINEAR
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    layers: tuple[int, ...] = ()
    rslora: bool = False
    dora: bool = False
    pissa: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(
                f"rank {self.rank}", f"rule '{self.pattern}'", "use a rank of 1 or more"
            )

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def resolve(rules: Sequence[LoraRule], axes: Params, params: Params) -> dict[str, list[LoraRule]]:
    """{path: rules of its layers} over the kernels that are matrices.

    There is one rule for each layer of the stack, or one alone where layers are not stacked.
    Where several match, the last wins.

    Args:
        rules: of which each has to match a kernel.
        axes: `ParamAxes` at the paths of parameters.
        params: only shapes are read.

    Raises:
        UserError: a rule matches no kernel, or names a layer that there is not; a kernel of
            which some layers have no rule, or rules that differ in more than rank and alpha.
    """
    described, shapes = trees.flatten(axes), trees.flatten(params)
    kernels = [path for path, leaf in described.items() if leaf.inputs > 0]
    chosen: dict[str, list[LoraRule | None]] = {}
    for rule in rules:
        hits = [path for path in kernels if re.fullmatch(rule.pattern, path)]
        if not hits:
            raise UserError(
                "LoRA rule matches no kernel",
                f"pattern '{rule.pattern}'",
                f"the kernels are {', '.join(sorted(kernels))}",
            )
        for path in hits:
            count = _layers(described[path], shapes[path].shape)
            own = chosen.setdefault(path, [None] * count)
            for layer in rule.layers or range(count):
                if not 0 <= layer < count:
                    raise UserError(
                        f"layer {layer} of {count}",
                        f"rule '{rule.pattern}', kernel '{path}'",
                        f"use layers from 0 to {count - 1}",
                    )
                own[layer] = rule
    return {path: _checked(path, own) for path, own in chosen.items()}


def _layers(axes: ParamAxes, shape: tuple[int, ...]) -> int:
    return shape[0] if "layers" in axes.names else 1


def _checked(path: str, rules: list[LoraRule | None]) -> list[LoraRule]:
    """The rules of a kernel's layers, which make one leaf together."""
    found = [rule for rule in rules if rule is not None]
    if len(found) < len(rules):
        raise UserError(
            f"layer {rules.index(None)} has no rule",
            f"kernel '{path}'",
            "add a rule for all layers before those of some",
        )
    for name in ("dropout", "dora", "pissa"):
        values = {getattr(rule, name) for rule in found}
        if len(values) > 1:
            raise UserError(
                f"layers that differ in {name}: {sorted(values)}",
                f"kernel '{path}'",
                "let layers of a kernel differ in rank, alpha and rslora alone",
            )
    return found
