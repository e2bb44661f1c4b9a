"""Hugging Face names, shapes and config fields of GPT-2.

Its kernels are stored [in, out], unlike those of every other family; q, k and v are one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ecomjax.hf.fields import FieldTable, check_values, refused
from ecomjax.hf.rules import Rule, RuleTable
from ecomjax.models.gpt2 import GPT2Config

_BLOCK = "transformer.h.{layer}."
_RULES = (
    Rule("transformer.wte.weight", "embed/embedding", "V D -> V D"),
    Rule("transformer.wpe.weight", "position_embed/embedding", "P D -> P D"),
    Rule(_BLOCK + "ln_1.weight", "layers/attn_norm/scale", "D -> D"),
    Rule(_BLOCK + "ln_1.bias", "layers/attn_norm/bias", "D -> D"),
    Rule(_BLOCK + "attn.c_attn.weight", "layers/attn/qkv/kernel", "D (Q N H) -> D Q N H"),
    Rule(_BLOCK + "attn.c_attn.bias", "layers/attn/qkv/bias", "(Q N H) -> Q N H"),
    Rule(_BLOCK + "attn.c_proj.weight", "layers/attn/o/kernel", "(N H) D -> N H D"),
    Rule(_BLOCK + "attn.c_proj.bias", "layers/attn/o/bias", "D -> D"),
    Rule(_BLOCK + "ln_2.weight", "layers/mlp_norm/scale", "D -> D"),
    Rule(_BLOCK + "ln_2.bias", "layers/mlp_norm/bias", "D -> D"),
    Rule(_BLOCK + "mlp.c_fc.weight", "layers/mlp/up/kernel", "D F -> D F"),
    Rule(_BLOCK + "mlp.c_fc.bias", "layers/mlp/up/bias", "F -> F"),
    Rule(_BLOCK + "mlp.c_proj.weight", "layers/mlp/down/kernel", "F D -> F D"),
    Rule(_BLOCK + "mlp.c_proj.bias", "layers/mlp/down/bias", "D -> D"),
    Rule("transformer.ln_f.weight", "final_norm/scale", "D -> D"),
    Rule("transformer.ln_f.bias", "final_norm/bias", "D -> D"),
)
_HEAD = Rule("lm_head.weight", "lm_head/kernel", "V D -> D V")

_TABLE = FieldTable(
    "gpt2",
    "GPT2LMHeadModel",
    {
        "vocab_size": "vocab_size",
        "n_embd": "width",
        "n_layer": "layers",
        "n_head": "heads",
        "n_inner": "ffn",
        "n_positions": "max_positions",
        "layer_norm_epsilon": "norm_eps",
        "activation_function": "activation",
        "tie_word_embeddings": "tied_embeddings",
    },
    optional={
        "n_inner": None,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_tanh",
        "tie_word_embeddings": True,
    },
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    ignored=frozenset(
        """n_ctx attn_pdrop embd_pdrop resid_pdrop summary_activation summary_first_dropout
        summary_proj_to_labels summary_type summary_use_proj reorder_and_upcast_attn""".split()
    ),
)
MODEL_TYPES = (_TABLE.model_type,)


def rule_table(config: GPT2Config) -> RuleTable:
    """The rules of a GPT-2 of this config."""
    sizes = {
        "V": config.vocab_size,
        "P": config.max_positions,
        "D": config.width,
        "L": config.layers,
        "Q": 3,
        "N": config.heads,
        "H": config.head_dim,
        "F": config.ffn,
    }
    return RuleTable(
        rules=_RULES if config.tied_embeddings else (*_RULES, _HEAD),
        sizes=sizes,
        copies={_HEAD.theirs: _RULES[0].theirs} if config.tied_embeddings else {},
        ignored=r".*\.attn\.(masked_)?bias",
        prefix="transformer.",
    )


def config_from_hf(fields: Mapping[str, Any], where: str, **overrides: Any) -> GPT2Config:
    """Our config from a Hugging Face one; what we do not build is refused by name."""
    values = _TABLE.read(fields, where)
    if values["ffn"] is None:
        values["ffn"] = 4 * values["width"]
    check_values(GPT2Config, values, where)
    if values["width"] % values["heads"]:
        raise refused(f"width {values['width']} over {values['heads']} heads", where)
    return GPT2Config(**values, **overrides)


def config_to_hf(config: GPT2Config) -> dict[str, Any]:
    """The content of a `config.json` that any release of transformers reads."""
    return _TABLE.write(config)
