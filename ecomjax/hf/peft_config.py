"""The content of an `adapter_config.json`: which of it is read, and what PEFT means by it."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecomjax.errors import UserError
from ecomjax.hf.files import read_json

CONFIG = "adapter_config.json"

_READ = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "ensure_weight_tying",
}
_ONLY = {"peft_type": ("LORA",), "bias": ("none",)}
"""Fields with few values here."""
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initial values under which the base stays as it is."""
_CONVERTED = r"pissa(_niter_\d+)?|olora|corda|lora_ga"
"""Those that change the base, and that PEFT can convert to plain LoRA when it saves."""
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "fan_in_fan_out",
    "revision",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "task_type",
}
"""Fields that say nothing about what the adapter computes."""


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a config, all of them known here and of sound types.

    Raises:
        UserError: a field or value that is not supported, by its name.
    """
    where = str(folder / CONFIG)
    fields = read_json(folder / CONFIG)
    _check_initial(fields.get("init_lora_weights"), where)
    for key, value in fields.items():
        neutral = value is None or value is False or value in ({}, [], "")
        known = key in _READ | _IGNORED or key == "init_lora_weights"
        if not (value in _ONLY[key] if key in _ONLY else neutral or known):
            raise UserError(
                f"adapter config field {key!r} is {value!r}", where, "use a plain LoRA adapter"
            )
    needed = ["r", "lora_alpha", "peft_type"]
    needed += [] if fields.get("target_parameters") else ["target_modules"]
    for key in needed:
        if not fields.get(key):
            raise UserError(f"adapter config lacks {key!r}", where, "use a plain LoRA adapter")
    for key in ("use_rslora", "use_dora", "ensure_weight_tying"):
        if not isinstance(fields.setdefault(key, False) or False, bool):
            raise UserError(
                f"adapter config field {key!r} is {fields[key]!r}", where, "correct the config"
            )
    _check_targets(fields, where)
    _check_numbers(fields, where)
    return fields


def _check_initial(value: Any, where: str) -> None:
    if value in _INITIAL:
        return
    remedy = "merge it into the base that it was trained on, and load that as a model"
    if isinstance(value, str) and re.fullmatch(_CONVERTED, value.lower()):
        remedy = (
            "save it with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            ", which makes it an adapter of the unchanged base"
        )
    raise UserError(f"adapter config field 'init_lora_weights' is {value!r}", where, remedy)


def _check_targets(fields: dict[str, Any], where: str) -> None:
    for key in ("target_modules", "target_parameters"):
        value = fields.setdefault(key, None) or []
        pattern = key == "target_modules" and isinstance(value, str)
        if not pattern and not (
            isinstance(value, list) and all(isinstance(name, str) for name in value)
        ):
            raise UserError(
                f"adapter config field {key!r} is {value!r}", where, "use a list of names"
            )


def _check_numbers(fields: dict[str, Any], where: str) -> None:
    numbers = [fields["lora_alpha"], fields.setdefault("lora_dropout", 0.0)]
    targets = fields["target_modules"]
    patterns = [targets] if isinstance(targets, str) else []
    try:
        for key in ("rank_pattern", "alpha_pattern"):
            numbers += (fields.get(key) or {}).values()
        for pattern in patterns:
            re.compile(pattern)
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in fields.get(key) or {}:
                re.compile(_at_the_end(pattern))
    except (AttributeError, re.error):
        raise UserError("broken pattern in adapter config", where, "correct the config") from None
    finite = all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
    if not finite:
        raise UserError("rank, alpha or dropout is no number", where, "correct the config")
    if not 0.0 <= fields["lora_dropout"] < 1.0:
        raise UserError(
            f"'lora_dropout' is {fields['lora_dropout']}", where, "use a rate from 0 to below 1"
        )


def is_target(fields: Mapping[str, Any], name: str, parameter: bool) -> bool:
    """Whether PEFT adapts a module, or a parameter: by the end of its name, or a regular
    expression of all of it."""
    targets = fields["target_parameters" if parameter else "target_modules"] or []
    if targets == "all-linear":
        return name != "lm_head"
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(_ends(name, target) for target in targets)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def check_targets_exist(
    fields: Mapping[str, Any], modules: Sequence[str], parameters: Sequence[str], where: str
) -> None:
    """Raises where a target is none of the modules or parameters that can be adapted."""
    targets = fields["target_modules"] or []
    if isinstance(targets, str):
        found = any(is_target(fields, name, False) for name in modules)
        stray = [] if found else [targets]
    else:
        stray = [t for t in targets if not any(_ends(name, t) for name in modules)]
    stray += [
        t
        for t in fields["target_parameters"] or []
        if not any(_ends(name, t) for name in parameters)
    ]
    if stray:
        raise UserError(
            f"target {min(stray)!r} is no linear layer or token embedding of this model",
            where,
            "use an adapter of this model's architecture",
        )


def _setting(fields: Mapping[str, Any], pattern: str, default: str, name: str) -> Any:
    """Rank or alpha of a target, by PEFT's rule: the first pattern that its name ends with."""
    for key, value in (fields.get(pattern) or {}).items():
        if re.match(_at_the_end(key), name):
            return value
    return fields[default]


def _at_the_end(pattern: str) -> str:
    """The expression of names that end with a pattern, as PEFT puts it."""
    return rf"(.*\.)?({pattern})$"


def rank_of(fields: Mapping[str, Any], name: str, where: str) -> int:
    """The rank of a target."""
    rank = _setting(fields, "rank_pattern", "r", name)
    if type(rank) is not int or rank < 1:
        raise UserError(f"rank of {name!r} is {rank!r}", where, "use a whole number above 0")
    return rank


def scale_of(fields: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / R, or alpha / sqrt(R) of rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
    alpha = _setting(fields, "alpha_pattern", "lora_alpha", name)
    return alpha / (math.sqrt(rank) if fields["use_rslora"] else rank)


def alpha_of(scale: float, rank: int) -> float:
    """alpha with float32(alpha / rank) == scale, a float32; a whole number if one does."""
    whole = round(scale * rank)
    return whole if float(np.float32(whole / rank)) == scale else scale * rank


class Pattern:
    """A value for each target, said as PEFT does: a default, and patterns of what differs."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def add(self, keys: Sequence[str], values: Mapping[str, Any]) -> None:
        """Values by the names of a target, which its keys find too; names where they differ."""
        if len(set(values.values())) == 1:
            self._values |= dict.fromkeys(keys, next(iter(values.values())))
        else:
            self._values |= values

    @property
    def default(self) -> Any:
        return collections.Counter(self._values.values()).most_common(1)[0][0]

    @property
    def others(self) -> dict[str, Any]:
        return {key: value for key, value in self._values.items() if value != self.default}
