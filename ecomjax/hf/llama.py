"""Hugging Face names, shapes and config fields of the Llama family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ecomjax.errors import UserError
from ecomjax.hf.rules import Rule, RuleTable
from ecomjax.models.llama import LlamaConfig

_BLOCK = "model.layers.{layer}."
_RULES = (
    Rule("model.embed_tokens.weight", "embed/embedding", "V D -> V D"),
    Rule(_BLOCK + "input_layernorm.weight", "layers/attn_norm/scale", "D -> D"),
    Rule(_BLOCK + "self_attn.q_proj.weight", "layers/attn/q/kernel", "(N H) D -> D N H"),
    Rule(_BLOCK + "self_attn.k_proj.weight", "layers/attn/k/kernel", "(K H) D -> D K H"),
    Rule(_BLOCK + "self_attn.v_proj.weight", "layers/attn/v/kernel", "(K H) D -> D K H"),
    Rule(_BLOCK + "self_attn.o_proj.weight", "layers/attn/o/kernel", "D (N H) -> N H D"),
    Rule(_BLOCK + "post_attention_layernorm.weight", "layers/mlp_norm/scale", "D -> D"),
    Rule(_BLOCK + "mlp.gate_proj.weight", "layers/mlp/gate/kernel", "F D -> D F"),
    Rule(_BLOCK + "mlp.up_proj.weight", "layers/mlp/up/kernel", "F D -> D F"),
    Rule(_BLOCK + "mlp.down_proj.weight", "layers/mlp/down/kernel", "D F -> F D"),
    Rule("model.norm.weight", "final_norm/scale", "D -> D"),
)
_HEAD = Rule("lm_head.weight", "lm_head/kernel", "V D -> D V")

_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_embeddings",
    "max_position_embeddings": "max_positions",
}
"""Their field to ours; `rope_theta` is apart, since it has two places."""

_OPTIONAL = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
"""Their fields that may be absent or null, and what they then mean (None: derived)."""

_ONLY = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "attention_dropout": (0, 0.0),
    "rope_scaling": (None,),
    "rope_interleaved": (False,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
}
"""Fields of the architecture that have one value here; null reads as the first."""

_IGNORED = frozenset(
    """architectures torch_dtype dtype transformers_version transformers.js_config use_cache
    initializer_range bos_token_id eos_token_id pad_token_id unk_token_id _name_or_path
    is_llama_config id2label label2id problem_type return_dict output_hidden_states
    output_attentions chunk_size_feed_forward auto_map unsloth_fixed unsloth_version
    tokenizer_class name_or_path""".split()
)
"""Fields that say nothing about the forward pass. `auto_map` names code, which never runs."""

_ROPE = {"rope_theta", "rope_type", "type"}


def rule_table(config: LlamaConfig) -> RuleTable:
    """The rules of a Llama of this config."""
    sizes = {
        "V": config.vocab_size,
        "D": config.width,
        "L": config.layers,
        "N": config.heads,
        "K": config.kv_heads,
        "H": config.head_dim,
        "F": config.ffn,
    }
    return RuleTable(
        rules=_RULES if config.tied_embeddings else (*_RULES, _HEAD),
        sizes=sizes,
        copies={_HEAD.theirs: _RULES[0].theirs} if config.tied_embeddings else {},
        ignored=r"(.*\.)?rotary_emb\.inv_freq",
    )


def config_from_hf(fields: Mapping[str, Any], where: str, **overrides: Any) -> LlamaConfig:
    """Our config from a Hugging Face one; what we do not build is refused by name.

    Args:
        fields: the content of `config.json`.
        where: its path, for error messages.
        overrides: fields of ours that theirs do not hold, such as `param_dtype`.
    """
    known = {*_FIELDS, *_ONLY, *_IGNORED, "rope_theta", "rope_parameters"}
    for key in fields:
        if key not in known:
            raise _refused(f"unknown config field {key!r}", where)
    for key, allowed in _ONLY.items():
        value = fields.get(key)
        if value is not None and value not in allowed:
            raise _refused(f"config field {key!r} is {value!r}, built is {allowed[0]!r}", where)
    values: dict[str, Any] = {"rope_theta": _rope_theta(fields, where)}
    for theirs, ours in _FIELDS.items():
        value = fields.get(theirs)
        if value is None:
            if theirs not in _OPTIONAL:
                raise _refused(f"missing config field {theirs!r}", where)
            value = _OPTIONAL[theirs]
        values[ours] = value
    if values["kv_heads"] is None:
        values["kv_heads"] = values["heads"]
    if values["head_dim"] is None:
        values["head_dim"] = values["width"] // max(values["heads"], 1)
    _check_numbers(values, where)
    return LlamaConfig(**values, **overrides)


def _rope_theta(fields: Mapping[str, Any], where: str) -> float:
    """Base of the rotary angles: top level until transformers 4, nested since 5."""
    nested = fields.get("rope_parameters") or {}
    kind = nested.get("rope_type", nested.get("type", "default"))
    extra = sorted(set(nested) - _ROPE)
    if kind != "default" or extra:
        raise _refused(f"config field 'rope_parameters' of type {kind!r} with {extra}", where)
    theta = nested.get("rope_theta", fields.get("rope_theta"))
    return 10000.0 if theta is None else theta


def _check_numbers(values: Mapping[str, Any], where: str) -> None:
    for key, value in values.items():
        kind = {"tied_embeddings": bool, "norm_eps": float, "rope_theta": (int, float)}.get(
            key, int
        )
        positive = kind is bool or (
            not isinstance(value, bool) and isinstance(value, kind) and value > 0
        )
        if not (isinstance(value, kind) and positive):
            raise _refused(f"config value of {key} is {value!r}", where)
    if values["heads"] % values["kv_heads"] or values["head_dim"] % 2:
        raise _refused(
            f"{values['heads']} heads over {values['kv_heads']} key/value heads "
            f"of width {values['head_dim']}",
            where,
        )


def _refused(what: str, where: str) -> UserError:
    return UserError(what, where, "use a checkpoint of a Llama variant that is built here")


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The content of a `config.json` that any release of transformers reads."""
    fields = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    return fields | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "torch_dtype": config.param_dtype,
    }
