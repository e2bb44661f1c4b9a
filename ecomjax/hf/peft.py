"""Adapters as folders in the layout of PEFT, which PEFT, vLLM and others load.

For every adapted matrix `lora_A.weight` [R, in] is our `a` transposed, `lora_B.weight`
[out, R] our `b` transposed, and alpha is scale * R. Beside PEFT's two files, `base.json`
says which base the adapter belongs to.
"""

from __future__ import annotations

import collections
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.hf import families
from ecomjax.hf.checkpoints import Identity
from ecomjax.hf.files import read_json, replace_file, replace_folder
from ecomjax.hf.presets import PRESETS
from ecomjax.hf.rules import FLOATS, Rule, RuleTable
from ecomjax.hf.safetensors_io import check_header, read_tensor, write_file
from ecomjax.models.config import ModelConfig
from ecomjax.typing import Adapter, LowRank

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"

_ORIGIN = ("name", "source", "sha256", "fingerprint")
"""What the last says of a base."""

_READ = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
}
_ONLY = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian"),
}
"""Fields with few values here; other initial values change the base as well."""
_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}
"""What PEFT calls the task of a class, by the end of its name."""
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "revision",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "task_type",
}
"""Fields that say nothing about what the adapter computes."""


def write_adapter(
    folder: str | os.PathLike[str], adapter: Adapter, config: ModelConfig, base: Identity
) -> None:
    """Writes a LoRA adapter, all or nothing.

    Args:
        folder: made, or replaced if it holds an adapter.
        adapter: tree of `LowRank` leaves at the paths of kernels, layers stacked.
        config: of the base.
        base: which weights the base is.
    """
    leaves = trees.flatten(adapter)
    write_leaves(folder, leaves, leaves, config, base)


def write_leaves(
    folder: str | os.PathLike[str],
    expected: Mapping[str, LowRank],
    leaves: Mapping[str, LowRank],
    config: ModelConfig,
    base: Identity | None,
) -> None:
    """`write_adapter`, kernel by kernel: each is written before the next is asked for.

    Args:
        folder: see `write_adapter`.
        expected: kernels by path, of which shapes, dtypes and dropout are read.
        leaves: the kernels themselves, by the same paths.
        config: see `write_adapter`.
        base: see `write_adapter`; None where that is not known, and then not said.
    """
    table = families.rule_table(config)
    rules = {rule.ours: rule for rule in table.rules if rule.linear}
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, leaf in expected.items():
        rank = leaf.a.shape[-1]
        ranks |= {target: rank for target in _targets(rules[path], table)}
        for _, module in _modules(rules[path], table):
            for name, shape, factor in zip(
                _names(module), _shapes(rules[path], table, rank), (leaf.a, leaf.b), strict=True
            ):
                shapes[name] = jax.ShapeDtypeStruct(shape, factor.dtype)

    def tensors_of(path: str, leaf: LowRank) -> Iterator[tuple[str, np.ndarray]]:
        a, b, scale = (np.asarray(x) for x in (leaf.a, leaf.b, leaf.scale))
        found = {}
        for index, module in _modules(rules[path], table):
            for name, factor in zip(_names(module), (a, b), strict=True):
                tensor = np.ascontiguousarray(factor[index].T)
                _check_tensor(tensor, name, shapes[name].shape, str(folder))
                yield name, tensor
            found[module] = _alpha(float(scale[index]), a.shape[-1])
        uniform = len(set(found.values())) == 1
        alpha = next(iter(found.values()))
        targets = _targets(rules[path], table)
        alphas.update({target: alpha for target in targets} if uniform else found)

    dropouts = {leaf.dropout for leaf in expected.values()}
    if len(dropouts) != 1:
        raise UserError(
            f"adapter has the dropout rates {sorted(dropouts)}",
            str(folder),
            "use one rate for all kernels, as PEFT does",
        )
    (architecture,) = families.config_to_hf(config)["architectures"]
    task_types = [kind for end, kind in _TASK_TYPES.items() if architecture.endswith(end)]
    with replace_folder(folder) as new:
        tensors = (pair for path in expected for pair in tensors_of(path, leaves[path]))
        write_file(new / WEIGHTS, shapes, tensors)
        fields = {
            "peft_type": "LORA",
            "task_type": task_types[0] if task_types else "FEATURE_EXTRACTION",
            "base_model_name_or_path": None if base is None else _reference(base),
            "inference_mode": True,
            "target_modules": sorted(ranks),
            "r": _commonest(ranks),
            "rank_pattern": {k: v for k, v in ranks.items() if v != _commonest(ranks)},
            "lora_alpha": _commonest(alphas),
            "alpha_pattern": {k: v for k, v in alphas.items() if v != _commonest(alphas)},
            "lora_dropout": dropouts.pop(),
            "bias": "none",
            "fan_in_fan_out": not all(rules[path].transposed for path in leaves),
            "init_lora_weights": True,
            "modules_to_save": None,
            "use_dora": False,
            "use_rslora": False,
        }
        replace_file(new / CONFIG, json.dumps(fields, indent=2))
        if base is not None:
            origin = {key: getattr(base, key) for key in _ORIGIN}
            replace_file(new / BASE, json.dumps(origin, indent=2))


def read_adapter(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    base: Identity | None = None,
    any_base: bool = False,
) -> Adapter:
    """Reads an adapter that we or PEFT wrote, into numpy arrays.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        config: of the base it is to be used with.
        base: which weights that base is, where they are loaded; another one than at writing is
            an error,
        any_base: unless this is set. Adapters of PEFT do not say, and pass.
    """
    folder, table = Path(folder), families.rule_table(config)
    fields = _read_config(folder)
    if base and not any_base:
        _check_base(folder, base)
    weights = _weights(folder)
    held = set(check_header(weights))
    flat: dict[str, LowRank] = {}
    for rule in table.rules:
        modules = list(_modules(rule, table)) if rule.linear else []
        targeted = [module for _, module in modules if _is_target(fields, module)]
        if not targeted:
            continue
        if len(targeted) < len(modules):
            raise UserError(
                f"adapter targets {targeted[0]!r} but not every layer",
                str(folder / CONFIG),
                "use an adapter of whole stacks of layers",
            )
        flat[rule.ours] = _read_leaf(rule, table, fields, weights, held)
    if held or not flat:
        stray = f"tensor {min(held)!r} belongs to no target module" if held else "adapter is empty"
        raise UserError(stray, str(weights), "use an adapter of this model's architecture")
    return trees.unflatten(flat)


def read_base(folder: str | os.PathLike[str]) -> Identity | None:
    """Which base an adapter says that it belongs to; None if it does not say."""
    folder = Path(folder)
    if not (folder / BASE).is_file():
        return None
    origin = read_json(folder / BASE)
    if not all(isinstance(origin.get(key), str) for key in _ORIGIN):
        raise UserError(f"lacks one of {_ORIGIN}", str(folder / BASE), "fetch the adapter again")
    path = read_json(folder / CONFIG).get("base_model_name_or_path")
    return Identity(path=str(path), **{key: origin[key] for key in _ORIGIN})


def _read_leaf(
    rule: Rule, table: RuleTable, fields: Mapping[str, Any], weights: Path, held: set[str]
) -> LowRank:
    """The leaf of a rule; takes the names of its tensors out of `held`."""
    modules = list(_modules(rule, table))
    ranks = {module: _setting(fields, "rank_pattern", "r", module) for _, module in modules}
    rank = ranks[modules[0][1]]
    if len(set(ranks.values())) > 1 or type(rank) is not int or rank < 1:
        raise UserError(
            f"ranks of {rule.theirs!r} are {sorted({str(r) for r in ranks.values()})}",
            str(weights.parent / CONFIG),
            "use an adapter with one positive rank for all layers of a kernel",
        )
    shapes = _shapes(rule, table, rank)
    stack = rule.stack(table.sizes)
    factors: list[Any] = [None, None]
    scale: Any = np.empty(stack, np.float32)
    for index, module in modules:
        alpha = _setting(fields, "alpha_pattern", "lora_alpha", module)
        divisor = math.sqrt(rank) if fields.get("use_rslora") else rank
        scale[index] = alpha / divisor
        for side, (name, shape) in enumerate(zip(_names(module), shapes, strict=True)):
            if name not in held:
                raise UserError(f"missing tensor {name!r}", str(weights), "fetch the adapter again")
            held.remove(name)
            tensor = read_tensor(weights, name)
            _check_tensor(tensor, name, shape, str(weights))
            if factors[side] is None:
                factors[side] = np.empty((*stack, *shape[::-1]), tensor.dtype)
            if factors[side].dtype != tensor.dtype:
                raise UserError(
                    f"tensor {name!r} is {tensor.dtype}, that of other layers "
                    f"{factors[side].dtype}",
                    str(weights),
                    "save the adapter in one dtype",
                )
            factors[side][index] = tensor.T
    return LowRank(a=factors[0], b=factors[1], scale=scale, dropout=fields["lora_dropout"])


def _modules(rule: Rule, table: RuleTable) -> Iterator[tuple[tuple[int, ...], str]]:
    """Index into the stack, and name of the module of the torch model that lies there."""
    for index, name in rule.names(table.sizes):
        yield index, name.removesuffix(".weight")


def _names(module: str) -> list[str]:
    """Names of the tensors of the factors a and b."""
    return [f"base_model.model.{module}.lora_{letter}.weight" for letter in "AB"]


def _shapes(rule: Rule, table: RuleTable, rank: int) -> list[tuple[int, int]]:
    """Shapes of the tensors of the factors a and b."""
    shape = rule.shape(table.sizes)
    d_out, d_in = shape if rule.transposed else shape[::-1]
    return [(rank, d_in), (d_out, rank)]


def _targets(rule: Rule, table: RuleTable) -> list[str]:
    """What PEFT finds a kernel's modules by.

    It is the shortest end of their names that no other kernel's name ends with. Where that
    goes back to the number of the layer, as between encoder and decoder, it is all names.
    """
    parts = rule.theirs.removesuffix(".weight").split(".")
    others = [r.theirs.removesuffix(".weight").split(".") for r in table.rules if r != rule]
    length = next(n for n in range(1, len(parts) + 1) if parts[-n:] not in [o[-n:] for o in others])
    suffix = ".".join(parts[-length:])
    return [module for _, module in _modules(rule, table)] if "{" in suffix else [suffix]


def _alpha(scale: float, rank: int) -> float:
    """alpha with float32(alpha / rank) == scale, a float32; a whole number if one does."""
    whole = round(scale * rank)
    return whole if float(np.float32(whole / rank)) == scale else scale * rank


def _commonest(values: Mapping[str, Any]) -> Any:
    return collections.Counter(values.values()).most_common(1)[0][0]


def _reference(base: Identity) -> str:
    """What other tools load the base by."""
    known = base.source != "local" and base.name in PRESETS
    if known:
        return PRESETS[base.name].hub_id
    return base.path if base.source == "local" else base.name


def _check_tensor(tensor: np.ndarray, name: str, shape: tuple[int, ...], where: str) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"tensor {name!r} has shape {list(tensor.shape)}, config and base say {list(shape)}",
            where,
            "correct the ranks in the config, or use the adapter's own base",
        )
    if tensor.dtype not in FLOATS:
        raise UserError(f"tensor {name!r} has dtype {tensor.dtype}", where, "save it as float32")
    if not np.isfinite(tensor).all():
        raise UserError(f"tensor {name!r} holds NaN or infinity", where, "train it again")


def _read_config(folder: Path) -> dict[str, Any]:
    where = str(folder / CONFIG)
    fields = read_json(folder / CONFIG)
    for key, value in fields.items():
        neutral = value is None or value is False or value in ({}, [], "")
        allowed = value in _ONLY[key] if key in _ONLY else neutral or key in _READ | _IGNORED
        if not allowed:
            raise UserError(
                f"adapter config field {key!r} is {value!r}", where, "use a plain LoRA adapter"
            )
    for key in ("r", "lora_alpha", "target_modules", "peft_type"):
        if not fields.get(key):
            raise UserError(f"adapter config lacks {key!r}", where, "use a plain LoRA adapter")
    numbers = [fields["lora_alpha"], fields.setdefault("lora_dropout", 0.0)]
    patterns = [fields["target_modules"]] if isinstance(fields["target_modules"], str) else []
    try:
        for key in ("rank_pattern", "alpha_pattern"):
            numbers += (fields.get(key) or {}).values()
            patterns += (fields.get(key) or {}).keys()
        for pattern in patterns:
            re.compile(pattern)
    except (AttributeError, re.error):
        raise UserError("broken pattern in adapter config", where, "correct the config") from None
    if any(type(value) not in (int, float) for value in numbers):
        raise UserError("rank, alpha or dropout is no number", where, "correct the config")
    return fields


def _setting(fields: Mapping[str, Any], pattern: str, default: str, module: str) -> Any:
    """Rank or alpha of a module, by PEFT's rule: the first pattern that its name ends with."""
    for key, value in (fields.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return fields[default]


def _is_target(fields: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adapts a linear module: by the end of its name, or a regex of all of it."""
    targets = fields["target_modules"]
    if targets == "all-linear":
        return module != "lm_head"
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _weights(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / "adapter_model.bin").is_file():
        raise UserError(
            "adapter weights in the format of 'adapter_model.bin' are not read",
            str(folder),
            "save it with peft's save_pretrained, which writes safetensors",
        )
    raise UserError(f"missing {WEIGHTS}", str(folder), "check the path")


def _check_base(folder: Path, base: Identity) -> None:
    if not (folder / BASE).is_file():
        return
    written = read_json(folder / BASE)
    if written.get("fingerprint") != base.fingerprint:
        raise UserError(
            f"adapter was trained on base {written.get('name')!r} from {written.get('source')!r}, "
            f"whose weights differ from those of {base.name!r} from {base.source!r}",
            str(folder),
            "load its own base, or allow any base",
        )
