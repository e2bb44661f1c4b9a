"""Hugging Face names, shapes and config fields of Mixtral: Mistral's, and those of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ecomjax.hf import llama
from ecomjax.hf.fields import FieldTable, check_values, refused
from ecomjax.hf.rules import Rule, RuleTable
from ecomjax.models.llama import LlamaConfig

MODEL_TYPES = ("mixtral",)

_SPARSE, _MLP = "model.layers.{layer}.block_sparse_moe.", "layers/mlp/"
_RULES = (
    Rule(_SPARSE + "gate.weight", _MLP + "router/kernel", "E D -> D E"),
    Rule(_SPARSE + "experts.{expert}.w1.weight", _MLP + "experts/gate/kernel", "F D -> D F"),
    Rule(_SPARSE + "experts.{expert}.w3.weight", _MLP + "experts/up/kernel", "F D -> D F"),
    Rule(_SPARSE + "experts.{expert}.w2.weight", _MLP + "experts/down/kernel", "D F -> F D"),
)
_PARAMETERS = {
    "model.layers.{layer}.mlp.gate.weight": (_MLP + "router/kernel",),
    "model.layers.{layer}.mlp.experts.gate_up_proj": (
        _MLP + "experts/gate/kernel",
        _MLP + "experts/up/kernel",
    ),
    "model.layers.{layer}.mlp.experts.down_proj": (_MLP + "experts/down/kernel",),
}
"""What transformers 5 calls them in its model; its checkpoints have kept the old names."""

_TABLE = FieldTable(
    "mixtral",
    "MixtralForCausalLM",
    names={
        "num_local_experts": "experts",
        "num_experts_per_tok": "experts_per_token",
        "router_aux_loss_coef": "balance_coefficient",
    },
    optional={
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    only={"router_jitter_noise": (0.0, 0)},
    ignored=frozenset({"output_router_logits"}),
)
"""The fields that Mistral lacks."""

_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "sliding_window": None}
"""What absent fields mean, where it is not what they mean for Mistral."""


def rule_table(config: LlamaConfig) -> RuleTable:
    """The rules of a Mixtral of this config."""
    table = llama.rule_table(config)
    shared = (rule for rule in table.rules if not rule.ours.startswith(_MLP))
    sizes = {**table.sizes, "E": config.experts}
    return dataclasses.replace(table, rules=(*shared, *_RULES), sizes=sizes, parameters=_PARAMETERS)


def config_from_hf(fields: Mapping[str, Any], where: str, **overrides: Any) -> LlamaConfig:
    """See `hf.llama.config_from_hf`."""
    own = {"model_type", *_TABLE.names, *_TABLE.only, *_TABLE.ignored}
    values = _TABLE.read({k: v for k, v in fields.items() if k in own}, where)
    check_values(LlamaConfig, values, where)
    if not 0 < values["experts_per_token"] <= values["experts"]:
        raise refused(f"{values['experts_per_token']} of {values['experts']} experts", where)
    rest = {k: v for k, v in fields.items() if k not in own}
    rest = _DEFAULTS | rest | {"model_type": "mistral"}
    config = llama.config_from_hf(rest, where, **overrides)
    return dataclasses.replace(config, model_type="mixtral", **values)


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """See `hf.llama.config_to_hf`."""
    mistral = dataclasses.replace(config, model_type="mistral")
    fields = llama.config_to_hf(mistral) | _TABLE.write(config)
    return fields | {name: allowed[0] for name, allowed in _TABLE.only.items()}
