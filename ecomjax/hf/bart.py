"""Hugging Face names, shapes and config fields of BART."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ecomjax.hf.fields import FieldTable, check_values, refused
from ecomjax.hf.rules import Rule, RuleTable
from ecomjax.models.bart import POSITION_OFFSET, BartConfig

_SHARED = Rule("model.shared.weight", "embed/embedding", "V D -> V D")
_BIAS = Rule("final_logits_bias", "logits_bias", "One V -> (One V)")


def _norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        Rule(theirs + ".weight", ours + "/scale", "D -> D"),
        Rule(theirs + ".bias", ours + "/bias", "D -> D"),
    )


def _attention(theirs: str, ours: str, heads: str) -> tuple[Rule, ...]:
    rules = [
        Rule(theirs + ".out_proj.weight", ours + "/o/kernel", f"D ({heads}) -> {heads} D"),
        Rule(theirs + ".out_proj.bias", ours + "/o/bias", "D -> D"),
    ]
    for part in "qkv":
        name, own = f"{theirs}.{part}_proj", f"{ours}/{part}"
        rules.append(Rule(name + ".weight", own + "/kernel", f"({heads}) D -> D {heads}"))
        rules.append(Rule(name + ".bias", own + "/bias", f"({heads}) -> {heads}"))
    return tuple(rules)


def _side(side: str, layer: str, attentions: Mapping[str, str], axes: str) -> tuple[Rule, ...]:
    """Rules of the encoder or the decoder.

    Args:
        side: "encoder" or "decoder".
        layer: the placeholder of its layers.
        attentions: their name of each attention to ours.
        axes: what the names of its axes start with.
    """
    theirs, ours = f"model.{side}.layers.{{{layer}}}.", f"{side}/layers/"
    heads, ffn = f"{axes}N {axes}H", f"{axes}F"
    rules = (
        Rule(
            f"model.{side}.embed_positions.weight",
            f"{side}/inputs/position_embed/embedding",
            "P D -> P D",
        ),
        *_norm(f"model.{side}.layernorm_embedding", f"{side}/inputs/embed_norm"),
        Rule(theirs + "fc1.weight", ours + "mlp/up/kernel", f"{ffn} D -> D {ffn}"),
        Rule(theirs + "fc1.bias", ours + "mlp/up/bias", f"{ffn} -> {ffn}"),
        Rule(theirs + "fc2.weight", ours + "mlp/down/kernel", f"D {ffn} -> {ffn} D"),
        Rule(theirs + "fc2.bias", ours + "mlp/down/bias", "D -> D"),
        *_norm(theirs + "final_layer_norm", ours + "mlp_norm"),
    )
    for name, own in attentions.items():
        rules += _attention(theirs + name, ours + own, heads)
        rules += _norm(f"{theirs}{name}_layer_norm", f"{ours}{own}_norm")
    return rules


_RULES = (
    _SHARED,
    _BIAS,
    *_side("encoder", "encoder_layer", {"self_attn": "attn"}, "encoder_"),
    *_side("decoder", "layer", {"self_attn": "attn", "encoder_attn": "cross"}, ""),
)
_COPIES = (
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "lm_head.weight",
)

_TABLE = FieldTable(
    "bart",
    "BartForConditionalGeneration",
    {
        "vocab_size": "vocab_size",
        "d_model": "width",
        "encoder_layers": "encoder_layers",
        "decoder_layers": "layers",
        "encoder_attention_heads": "encoder_heads",
        "decoder_attention_heads": "heads",
        "encoder_ffn_dim": "encoder_ffn",
        "decoder_ffn_dim": "ffn",
        "max_position_embeddings": "max_positions",
        "activation_function": "activation",
        "scale_embedding": "scaled_embeddings",
    },
    optional={
        "max_position_embeddings": 1024,
        "activation_function": "gelu",
        "scale_embedding": False,
    },
    only={
        "is_encoder_decoder": (True,),
        "is_decoder": (False,),
        "tie_word_embeddings": (True,),
        "normalize_before": (False,),
        "normalize_embedding": (True,),
        "add_final_layer_norm": (False,),
        "add_bias_logits": (False,),
        "static_position_embeddings": (False,),
        "extra_pos_embeddings": (POSITION_OFFSET,),
    },
    ignored=frozenset(
        """dropout attention_dropout activation_dropout classifier_dropout classif_dropout
        encoder_layerdrop decoder_layerdrop init_std output_past forced_eos_token_id max_length
        min_length num_beams length_penalty no_repeat_ngram_size early_stopping prefix""".split()
    ),
    apart=frozenset({"decoder_start_token_id", "forced_bos_token_id", "num_hidden_layers"}),
)
"""What is ignored besides dropout is how to decode, which the caller says."""
MODEL_TYPES = (_TABLE.model_type,)


def rule_table(config: BartConfig) -> RuleTable:
    """The rules of a BART of this config."""
    sizes = {
        "V": config.vocab_size,
        "One": 1,
        "P": config.max_positions + POSITION_OFFSET,
        "D": config.width,
        "encoder_L": config.encoder_layers,
        "encoder_N": config.encoder_heads,
        "encoder_H": config.encoder.head_dim,
        "encoder_F": config.encoder_ffn,
        "L": config.layers,
        "N": config.heads,
        "H": config.head_dim,
        "F": config.ffn,
    }
    return RuleTable(
        rules=_RULES,
        sizes=sizes,
        copies=dict.fromkeys(_COPIES, _SHARED.theirs),
        absent={_BIAS.theirs: ""},
        ignored=r"model\.(encoder|decoder)\.version",
        prefix="model.",
    )


def config_from_hf(fields: Mapping[str, Any], where: str, **overrides: Any) -> BartConfig:
    """Our config from a Hugging Face one; what we do not build is refused by name."""
    values = _TABLE.read(fields, where)
    start, forced = fields.get("decoder_start_token_id"), fields.get("forced_bos_token_id")
    values["start"] = (2 if start is None else start, *(() if forced is None else (forced,)))
    check_values(BartConfig, values, where)
    if fields.get("num_hidden_layers") not in (None, values["encoder_layers"]):
        raise refused(f"config field 'num_hidden_layers' is {fields['num_hidden_layers']!r}", where)
    for heads in (values["encoder_heads"], values["heads"]):
        if values["width"] % heads:
            raise refused(f"width {values['width']} over {heads} heads", where)
    return BartConfig(**values, **overrides)


def config_to_hf(config: BartConfig) -> dict[str, Any]:
    """The content of a `config.json` that any release of transformers reads."""
    start, *forced = config.start
    return _TABLE.write(config) | {
        "decoder_start_token_id": start,
        "forced_bos_token_id": forced[0] if forced else None,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }
