"""Hugging Face names, shapes and config fields of the Llama family and its variants."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ecomjax.hf.fields import FieldTable, check_values, refused
from ecomjax.hf.rules import Rule, RuleTable
from ecomjax.models.llama import LlamaConfig
from ecomjax.models.rope import RopeScaling

_BLOCK, _LAYERS = "model.layers.{layer}.", "layers/"
_RULES = (
    Rule("model.embed_tokens.weight", "embed/embedding", "V D -> V D"),
    Rule(_BLOCK + "input_layernorm.weight", _LAYERS + "attn_norm/scale", "D -> D"),
    Rule(_BLOCK + "self_attn.q_proj.weight", _LAYERS + "attn/q/kernel", "(N H) D -> D N H"),
    Rule(_BLOCK + "self_attn.k_proj.weight", _LAYERS + "attn/k/kernel", "(K H) D -> D K H"),
    Rule(_BLOCK + "self_attn.v_proj.weight", _LAYERS + "attn/v/kernel", "(K H) D -> D K H"),
    Rule(_BLOCK + "self_attn.o_proj.weight", _LAYERS + "attn/o/kernel", "D (N H) -> N H D"),
    Rule("model.norm.weight", "final_norm/scale", "D -> D"),
)
_FEED_FORWARD = (
    Rule(_BLOCK + "mlp.gate_proj.weight", _LAYERS + "mlp/gate/kernel", "F D -> D F"),
    Rule(_BLOCK + "mlp.up_proj.weight", _LAYERS + "mlp/up/kernel", "F D -> D F"),
    Rule(_BLOCK + "mlp.down_proj.weight", _LAYERS + "mlp/down/kernel", "D F -> F D"),
)
_TWO_NORMS = (
    Rule(_BLOCK + "post_attention_layernorm.weight", _LAYERS + "mlp_norm/scale", "D -> D"),
)
_FOUR_NORMS = (
    Rule(_BLOCK + "post_attention_layernorm.weight", _LAYERS + "attn_post_norm/scale", "D -> D"),
    Rule(_BLOCK + "pre_feedforward_layernorm.weight", _LAYERS + "mlp_norm/scale", "D -> D"),
    Rule(_BLOCK + "post_feedforward_layernorm.weight", _LAYERS + "mlp_post_norm/scale", "D -> D"),
)
_BIASES = (
    Rule(_BLOCK + "self_attn.q_proj.bias", _LAYERS + "attn/q/bias", "(N H) -> N H"),
    Rule(_BLOCK + "self_attn.k_proj.bias", _LAYERS + "attn/k/bias", "(K H) -> K H"),
    Rule(_BLOCK + "self_attn.v_proj.bias", _LAYERS + "attn/v/bias", "(K H) -> K H"),
)
_HEAD_NORMS = (
    Rule(_BLOCK + "self_attn.q_norm.weight", _LAYERS + "attn/q_norm/scale", "H -> H"),
    Rule(_BLOCK + "self_attn.k_norm.weight", _LAYERS + "attn/k_norm/scale", "H -> H"),
)
_HEAD = Rule("lm_head.weight", "lm_head/kernel", "V D -> D V")


def rule_table(config: LlamaConfig) -> RuleTable:
    """The rules of a variant of this config."""
    rules = (
        *_RULES,
        *_FEED_FORWARD,
        *(_FOUR_NORMS if config.post_norms else _TWO_NORMS),
        *(_BIASES if config.qkv_bias else ()),
        *(_HEAD_NORMS if config.qk_norm else ()),
        *(() if config.tied_embeddings else (_HEAD,)),
    )
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
        rules=rules,
        sizes=sizes,
        copies={_HEAD.theirs: _RULES[0].theirs} if config.tied_embeddings else {},
        ignored=r"(.*\.)?rotary_emb\.inv_freq",
    )


@dataclasses.dataclass(frozen=True)
class _Variant:
    """An architecture of the family: its fields, and what it fixes without saying so."""

    table: FieldTable
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_NAMES = {
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
    "hidden_act": "activation",
}
_OPTIONAL = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
}
_NULLABLE = frozenset({"num_key_value_heads", "head_dim"})
_ONLY = {"attention_dropout": (0, 0.0), "rope_interleaved": (False,)}
_NO_BIAS = {"attention_bias": (False,), "mlp_bias": (False,)}
_ROPE = frozenset({"rope_theta", "rope_parameters", "rope_scaling"})
_SLIDING = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
_GEMMA = {
    "names": {k: v for k, v in _NAMES.items() if k != "hidden_act"}
    | {
        "hidden_activation": "activation",
        "query_pre_attn_scalar": "attention_scalar",
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "logit_softcap",
    },
    "nullable": frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
    "only": _ONLY | {"attention_bias": (False,), "use_bidirectional_attention": (False,)},
    "ignored": frozenset({"hidden_act", "cache_implementation"}),
    "apart": _ROPE | {"sliding_window", "layer_types"},
}
_GEMMA_OPTIONAL = _OPTIONAL | {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_tanh",
    "query_pre_attn_scalar": 256,
}
_GEMMA_FIXED = {"norm_offset": 1.0, "post_norms": True, "scaled_embeddings": True}


def _table(model_type: str, architecture: str, optional: Mapping[str, Any], **more) -> FieldTable:
    given = {"names": _NAMES, "nullable": _NULLABLE, "only": _ONLY, "apart": _ROPE} | more
    return FieldTable(model_type, architecture, optional=_OPTIONAL | dict(optional), **given)


VARIANTS = {
    variant.table.model_type: variant
    for variant in (
        _Variant(
            _table(
                "llama",
                "LlamaForCausalLM",
                {},
                only=_ONLY | _NO_BIAS | {"pretraining_tp": (1,)},
                ignored=frozenset({"is_llama_config"}),
            )
        ),
        _Variant(
            _table(
                "mistral",
                "MistralForCausalLM",
                {"num_key_value_heads": 8, "max_position_embeddings": 131072},
                apart=_ROPE | {"sliding_window"},
            )
        ),
        _Variant(
            _table(
                "qwen2",
                "Qwen2ForCausalLM",
                {"num_key_value_heads": 32, "max_position_embeddings": 32768},
                apart=_ROPE | _SLIDING,
            ),
            {"qkv_bias": True},
        ),
        _Variant(
            _table(
                "qwen3",
                "Qwen3ForCausalLM",
                {
                    "num_key_value_heads": 32,
                    "head_dim": 128,
                    "max_position_embeddings": 32768,
                },
                only=_ONLY | {"attention_bias": (False,)},
                apart=_ROPE | _SLIDING,
            ),
            {"qk_norm": True},
        ),
        _Variant(
            _table(
                "smollm3",
                "SmolLM3ForCausalLM",
                {
                    "num_key_value_heads": 4,
                    "max_position_embeddings": 32768,
                    "tie_word_embeddings": True,
                },
                only=_ONLY | _NO_BIAS,
                apart=_ROPE | _SLIDING | {"no_rope_layers", "no_rope_layer_interval"},
            )
        ),
        _Variant(
            FieldTable(
                "gemma2",
                "Gemma2ForCausalLM",
                optional=_GEMMA_OPTIONAL
                | {
                    "max_position_embeddings": 8192,
                    "attn_logit_softcapping": 50.0,
                    "final_logit_softcapping": 30.0,
                },
                **_GEMMA,
            ),
            _GEMMA_FIXED,
        ),
        _Variant(
            FieldTable(
                "gemma3_text",
                "Gemma3ForCausalLM",
                optional=_GEMMA_OPTIONAL
                | {
                    "max_position_embeddings": 131072,
                    "attn_logit_softcapping": 0.0,
                    "final_logit_softcapping": 0.0,
                },
                **_GEMMA
                | {
                    "apart": _GEMMA["apart"]
                    | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"}
                },
            ),
            _GEMMA_FIXED | {"qk_norm": True},
        ),
    )
}
MODEL_TYPES = tuple(VARIANTS)


def config_from_hf(fields: Mapping[str, Any], where: str, **overrides: Any) -> LlamaConfig:
    """Our config from a Hugging Face one; what we do not build is refused by name.

    Args:
        fields: the content of `config.json`.
        where: its path, for error messages.
        overrides: fields of ours that theirs do not hold, such as `param_dtype`.
    """
    model_type = fields.get("model_type")
    if model_type not in VARIANTS:
        raise refused(f"config field 'model_type' is {model_type!r}", where)
    variant = VARIANTS[model_type]
    values = variant.table.read(fields, where) | dict(variant.fixed)
    for name in ("attention_softcap", "logit_softcap"):
        values[name] = values.get(name) or 0.0
    if values["kv_heads"] is None:
        values["kv_heads"] = values["heads"]
    if values["head_dim"] is None:
        values["head_dim"] = values["width"] // max(values["heads"], 1)
    values |= _rotation(fields, where)
    check_values(LlamaConfig, values, where)
    if values["heads"] % values["kv_heads"] or values["head_dim"] % 2:
        raise refused(
            f"{values['heads']} heads over {values['kv_heads']} key/value heads "
            f"of width {values['head_dim']}",
            where,
        )
    values |= _layers(fields, values["layers"], where)
    return LlamaConfig(model_type=model_type, **values, **overrides)


_THETAS = {"smollm3": 2_000_000.0, "gemma3_text": 1_000_000.0}
"""Bases of the rotation where a config names none; 10,000 for the rest."""

_SCALINGS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_factor",
        "high_freq_factor": "high_factor",
        "original_max_position_embeddings": "original_positions",
    },
}
"""Their fields of each kind of rotation to those of `RopeScaling`."""


def _rotation(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a config says of the rotation: at top level until transformers 4, nested since 5."""
    nested = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(nested, Mapping):
        raise refused(f"config field 'rope_scaling' is {nested!r}", where)
    top = fields.get("rope_theta") or _THETAS.get(fields["model_type"], 10_000.0)
    if fields["model_type"] != "gemma3_text":
        theta, scaling = _rope(nested, top, where)
        return {"rope_theta": theta, "rope_scaling": scaling}
    if "full_attention" not in nested:
        nested = {"full_attention": nested}
    local = fields.get("rope_local_base_freq") or 10_000.0
    theta, scaling = _rope(nested["full_attention"], top, where)
    sliding_theta, sliding_scaling = _rope(nested.get("sliding_attention") or {}, local, where)
    if sliding_scaling is not None:
        raise refused("config field 'rope_parameters' that scales sliding layers", where)
    return {"rope_theta": theta, "rope_scaling": scaling, "sliding_theta": sliding_theta}


def _rope(
    nested: Mapping[str, Any], default_theta: float, where: str
) -> tuple[float, RopeScaling | None]:
    kind = nested.get("rope_type", nested.get("type", "default"))
    names = _SCALINGS.get(kind)
    extra = sorted(set(nested) - {"rope_theta", "rope_type", "type", *(names or ())})
    if names is None or extra or set(names) - set(nested):
        raise refused(f"config field 'rope_parameters' of type {kind!r} with {extra}", where)
    theta = nested.get("rope_theta", default_theta)
    if kind == "default":
        return theta, None
    values = {ours: nested[theirs] for theirs, ours in names.items()}
    check_values(RopeScaling, values, where)
    return theta, RopeScaling(kind, **values)


def _layers(fields: Mapping[str, Any], layers: int, where: str) -> dict[str, Any]:
    """Which layers slide, how far, and which have no rotation."""
    model_type, values = fields["model_type"], {}
    if model_type == "smollm3":
        every = fields.get("no_rope_layer_interval") or 4
        rotated = fields.get("no_rope_layers") or [(i + 1) % every for i in range(layers)]
        _check_length("no_rope_layers", rotated, layers, where)
        values["unrotated_layers"] = tuple(i for i in range(layers) if not rotated[i])
    if model_type == "llama":
        return values
    window = fields.get("sliding_window", None if model_type == "smollm3" else 4096)
    if "use_sliding_window" in VARIANTS[model_type].table.apart:
        window = window if fields.get("use_sliding_window") else None
    if window is None:
        return values
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise refused(f"config field 'sliding_window' is {window!r}", where)
    kinds = fields.get("layer_types")
    if kinds is None:
        after = fields.get("max_window_layers", 28)
        pattern = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
        if not all(isinstance(x, int) and x >= least for x, least in ((after, 0), (pattern, 1))):
            raise refused(f"windows from layer {after!r} on, or by a pattern of {pattern!r}", where)
        slides = {
            "mistral": lambda i: True,
            "gemma2": lambda i: i % 2 == 0,
            "gemma3_text": lambda i: (i + 1) % pattern != 0,
            "smollm3": lambda i: i in values["unrotated_layers"],
        }.get(model_type, lambda i: i >= after)
        kinds = [f"{'sliding' if slides(i) else 'full'}_attention" for i in range(layers)]
    _check_length("layer_types", kinds, layers, where)
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        raise refused(f"config field 'layer_types' holds {unknown[0]!r}", where)
    sliding = tuple(i for i in range(layers) if kinds[i] == "sliding_attention")
    return values | ({"sliding_window": window, "sliding_layers": sliding} if sliding else {})


def _check_length(name: str, given: Any, layers: int, where: str) -> None:
    if not isinstance(given, list) or len(given) != layers:
        raise refused(f"config field {name!r} does not name {layers} layers", where)


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The content of a `config.json` that any release of transformers reads."""
    variant = VARIANTS[config.model_type]
    fields, apart = variant.table.write(config), variant.table.apart
    fields |= {name: allowed[0] for name, allowed in variant.table.only.items()}
    rope = _rope_to_hf(config)
    fields |= {"rope_theta": config.rope_theta, "rope_parameters": rope}
    if config.rope_scaling is not None:
        fields["rope_scaling"] = rope
    if config.model_type == "gemma3_text":
        local = {"rope_theta": config.sliding_theta, "rope_type": "default"}
        fields["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
        fields["rope_local_base_freq"] = config.sliding_theta
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if name in fields:
            fields[name] = fields[name] or None
    sliding = set(config.sliding_layers)
    spelled = {
        "sliding_window": config.sliding_window or None,
        "use_sliding_window": bool(sliding),
        "max_window_layers": min(sliding, default=config.layers),
        "layer_types": [
            f"{'sliding' if i in sliding else 'full'}_attention" for i in range(config.layers)
        ],
        "no_rope_layers": [int(i not in config.unrotated_layers) for i in range(config.layers)],
    }
    return fields | {name: value for name, value in spelled.items() if name in apart}


def _rope_to_hf(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_type": "default"}
    values = {theirs: getattr(scaling, ours) for theirs, ours in _SCALINGS[scaling.kind].items()}
    return {"rope_theta": config.rope_theta, "rope_type": scaling.kind, **values}
