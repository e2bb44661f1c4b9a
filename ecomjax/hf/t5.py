"""Hugging Face names, shapes and config fields of T5 and FLAN-T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ecomjax.hf.fields import ACTIVATIONS, FieldTable, check_values, refused
from ecomjax.hf.rules import Rule, RuleTable
from ecomjax.models.t5 import T5Config

_SHARED = Rule("shared.weight", "embed/embedding", "V D -> V D")
_HEAD = Rule("lm_head.weight", "lm_head/kernel", "V D -> D V")


def _attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        Rule(theirs + ".q.weight", ours + "/q/kernel", "(N H) D -> D N H"),
        Rule(theirs + ".k.weight", ours + "/k/kernel", "(N H) D -> D N H"),
        Rule(theirs + ".v.weight", ours + "/v/kernel", "(N H) D -> D N H"),
        Rule(theirs + ".o.weight", ours + "/o/kernel", "D (N H) -> N H D"),
    )


def _side(side: str, layer: str, parts: tuple[str, ...], gated: bool) -> tuple[Rule, ...]:
    """Rules of the encoder or the decoder, whose blocks have these parts, each with a norm."""
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rules = [
        Rule(bias, f"{side}/relative_bias/embedding", "P N -> P N"),
        Rule(f"{side}.final_layer_norm.weight", f"{side}/final_norm/scale", "D -> D"),
    ]
    ups = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
    for place, part in enumerate(parts):
        theirs, ours = f"{side}.block.{{{layer}}}.layer.{place}.", f"{side}/layers/{part}"
        rules.append(Rule(theirs + "layer_norm.weight", ours + "_norm/scale", "D -> D"))
        if part == "mlp":
            theirs += "DenseReluDense."
            rules.append(Rule(theirs + "wo.weight", ours + "/down/kernel", "D F -> F D"))
            for up, name in ups.items():
                rules.append(Rule(f"{theirs}{name}.weight", f"{ours}/{up}/kernel", "F D -> D F"))
        else:
            name = "SelfAttention" if part == "attn" else "EncDecAttention"
            rules += _attention(theirs + name, ours)
    return tuple(rules)


def rule_table(config: T5Config) -> RuleTable:
    """The rules of a T5 of this config."""
    rules = (
        _SHARED,
        *_side("encoder", "encoder_layer", ("attn", "mlp"), config.gated),
        *_side("decoder", "layer", ("attn", "cross", "mlp"), config.gated),
    )
    head = {_HEAD.theirs: _SHARED.theirs}
    copies = {f"{side}.embed_tokens.weight": _SHARED.theirs for side in ("encoder", "decoder")}
    sizes = {
        "V": config.vocab_size,
        "D": config.width,
        "encoder_L": config.encoder_layers,
        "L": config.layers,
        "N": config.heads,
        "H": config.head_dim,
        "F": config.ffn,
        "P": config.buckets,
    }
    return RuleTable(
        rules=rules if config.tied_embeddings else (*rules, _HEAD),
        sizes=sizes,
        copies=copies | head if config.tied_embeddings else copies,
        absent={} if config.tied_embeddings else head,
        ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    )


_TABLE = FieldTable(
    "t5",
    "T5ForConditionalGeneration",
    {
        "vocab_size": "vocab_size",
        "d_model": "width",
        "num_layers": "encoder_layers",
        "num_decoder_layers": "layers",
        "num_heads": "heads",
        "d_kv": "head_dim",
        "d_ff": "ffn",
        "relative_attention_num_buckets": "buckets",
        "relative_attention_max_distance": "max_distance",
        "layer_norm_epsilon": "norm_eps",
    },
    optional={
        "num_decoder_layers": None,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
    },
    only={"is_encoder_decoder": (True,), "is_decoder": (False,)},
    ignored=frozenset(
        "dropout_rate classifier_dropout initializer_factor n_positions output_past".split()
    ),
    apart=frozenset(
        """feed_forward_proj dense_act_fn is_gated_act tie_word_embeddings scale_decoder_outputs
        decoder_start_token_id""".split()
    ),
)
MODEL_TYPES = (_TABLE.model_type,)


def config_from_hf(fields: Mapping[str, Any], where: str, **overrides: Any) -> T5Config:
    """Our config from a Hugging Face one; what we do not build is refused by name.

    Transformers 5 ties the embeddings of every config, whatever it says: that they are not
    shows in `scale_decoder_outputs`, which is what `tie_word_embeddings` said before, and in
    a head among the tensors.
    """
    values = _TABLE.read(fields, where)
    if values["layers"] is None:
        values["layers"] = values["encoder_layers"]
    projection = fields.get("feed_forward_proj") or "relu"
    kind, _, name = str(projection).rpartition("-")
    name = "gelu_new" if projection == "gated-gelu" else name
    name = fields.get("dense_act_fn") or name
    if kind not in ("", "gated") or name not in ACTIVATIONS:
        raise refused(f"config field 'feed_forward_proj' is {projection!r} with {name!r}", where)
    gated, tied = fields.get("is_gated_act"), fields.get("scale_decoder_outputs")
    values |= {
        "activation": ACTIVATIONS[name],
        "gated": kind == "gated" if gated is None else gated,
        "tied_embeddings": fields.get("tie_word_embeddings") is not False if tied is None else tied,
        "start": (fields.get("decoder_start_token_id") or 0,),
    }
    check_values(T5Config, values, where)
    if values["tied_embeddings"] and fields.get("tie_word_embeddings") is False:
        raise refused("config field 'scale_decoder_outputs' is True with a free head", where)
    if values["buckets"] < 4 or values["buckets"] // 2 >= values["max_distance"]:
        raise refused(
            f"{values['buckets']} buckets of relative positions up to {values['max_distance']}",
            where,
        )
    return T5Config(**values, **overrides)


def config_to_hf(config: T5Config) -> dict[str, Any]:
    """The content of a `config.json` that any release of transformers reads."""
    name = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.activation]
    projection = "gelu" if config.gated and name == "gelu_new" else name
    return _TABLE.write(config) | {
        "feed_forward_proj": f"gated-{projection}" if config.gated else name,
        "dense_act_fn": name,
        "is_gated_act": config.gated,
        "tie_word_embeddings": config.tied_embeddings,
        "scale_decoder_outputs": config.tied_embeddings,
        "decoder_start_token_id": config.start[0],
        "is_encoder_decoder": True,
    }
