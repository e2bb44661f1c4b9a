"""Hugging Face names, shapes and config fields of BERT, RoBERTa and DistilBERT.

Published encoders are saved bare or under the masked-language-model head they were trained
with; either loads as the encoder alone. Those with a classification head load with it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ecomjax.hf.fields import FieldTable, check_values, refused
from ecomjax.hf.rules import Rule, RuleTable
from ecomjax.models.bert import BertConfig
from ecomjax.models.heads import (
    ClassifierConfig,
    SequenceClassifierConfig,
    TokenClassifierConfig,
)

_LINEARS = {
    "attn/q": ("(N H) D -> D N H", "(N H) -> N H"),
    "attn/k": ("(N H) D -> D N H", "(N H) -> N H"),
    "attn/v": ("(N H) D -> D N H", "(N H) -> N H"),
    "attn/o": ("D (N H) -> N H D", "D -> D"),
    "mlp/up": ("F D -> D F", "F -> F"),
    "mlp/down": ("D F -> F D", "D -> D"),
    "dense": ("out D -> D out", "out -> out"),
    "out": ("C D -> D C", "C -> C"),
}
"""Layouts of kernels and biases."""

_TABLES = {
    "embed": ("embeddings.word_embeddings", "V D -> V D"),
    "position_embed": ("embeddings.position_embeddings", "P D -> P D"),
    "type_embed": ("embeddings.token_type_embeddings", "types D -> types D"),
}

_BERT_LAYER = {
    "attn/q": "attention.self.query",
    "attn/k": "attention.self.key",
    "attn/v": "attention.self.value",
    "attn/o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_DISTILBERT_LAYER = {
    "attn/q": "attention.q_lin",
    "attn/k": "attention.k_lin",
    "attn/v": "attention.v_lin",
    "attn/o": "attention.out_lin",
    "attn_norm": "sa_layer_norm",
    "mlp/up": "ffn.lin1",
    "mlp/down": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
}

_UNREAD = r"embeddings\.position_ids|pooler\.dense\.(weight|bias)"
"""Within encoders: a constant that old checkpoints hold, and what only heads read."""


@dataclasses.dataclass(frozen=True)
class _Variant:
    """One architecture.

    Attributes:
        table: its fields.
        stem: how the names of its classes start.
        layer: names of the modules in a layer, by our path.
        block: where the layers are.
        sequence_head: names of the modules of the head over first tokens, by our path.
        pretraining: heads over bare encoders, which are let pass.
        fixed: values of ours that no field says.
    """

    table: FieldTable
    stem: str
    layer: Mapping[str, str]
    block: str
    sequence_head: Mapping[str, str]
    pretraining: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "token_types",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
}
_OPTIONAL = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
_ONLY = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({},),
}
_IGNORED = frozenset(
    """hidden_dropout_prob attention_probs_dropout_prob classifier_dropout tie_word_embeddings
    output_past directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
    pooler_size_per_head pooler_type _num_labels sbert_ce_default_activation_function
    sentence_transformers""".split()
)
"""Dropout among them: how much a model is regularised is for its training to say. What
cross-encoders apply to their logits is for their task to say."""

_DISTILBERT_NAMES = {
    "vocab_size": "vocab_size",
    "dim": "width",
    "n_layers": "layers",
    "n_heads": "heads",
    "hidden_dim": "ffn",
    "max_position_embeddings": "max_positions",
    "activation": "activation",
}

VARIANTS = {
    variant.table.model_type: variant
    for variant in (
        _Variant(
            FieldTable("bert", "BertModel", _NAMES, _OPTIONAL, only=_ONLY, ignored=_IGNORED),
            "Bert",
            _BERT_LAYER,
            "encoder.layer.",
            {"dense": "bert.pooler.dense", "out": "classifier"},
            r"cls\.predictions\.(bias|(decoder|transform\.(dense|LayerNorm))\.(weight|bias))|"
            r"cls\.seq_relationship\.(weight|bias)",
        ),
        _Variant(
            FieldTable(
                "roberta",
                "RobertaModel",
                _NAMES,
                _OPTIONAL | {"vocab_size": 50265},
                only=_ONLY,
                ignored=_IGNORED,
            ),
            "Roberta",
            _BERT_LAYER,
            "encoder.layer.",
            {"dense": "classifier.dense", "out": "classifier.out_proj"},
            r"lm_head\.(bias|(dense|layer_norm|decoder)\.(weight|bias))",
        ),
        _Variant(
            FieldTable(
                "distilbert",
                "DistilBertModel",
                _DISTILBERT_NAMES,
                {
                    "vocab_size": 30522,
                    "dim": 768,
                    "n_layers": 6,
                    "n_heads": 12,
                    "hidden_dim": 3072,
                    "max_position_embeddings": 512,
                    "activation": "gelu",
                },
                only={"pruned_heads": ({},)},
                ignored=frozenset(
                    """dropout attention_dropout qa_dropout seq_classif_dropout tie_weights_
                    tie_word_embeddings sinusoidal_pos_embds output_past _num_labels""".split()
                ),
            ),
            "DistilBert",
            _DISTILBERT_LAYER,
            "transformer.layer.",
            {"dense": "pre_classifier", "out": "classifier"},
            r"vocab_(transform|layer_norm|projector)\.(weight|bias)",
            {"token_types": 0, "norm_eps": 1e-12},
        ),
    )
}
MODEL_TYPES = tuple(VARIANTS)

_ENDS: Mapping[type[BertConfig], str] = {
    BertConfig: "Model",
    SequenceClassifierConfig: "ForSequenceClassification",
    TokenClassifierConfig: "ForTokenClassification",
}
"""How the names of their classes end, by config."""

_PRETRAINING_ENDS = ("ForMaskedLM", "ForPreTraining")
"""Of classes that are read as the encoder alone."""


def rule_table(config: BertConfig) -> RuleTable:
    """The rules of an encoder, or of a classifier, of this config."""
    variant, bare = VARIANTS[config.model_type], type(config) is BertConfig
    prefix = config.model_type + "."
    rules = list(_encoder_rules(variant, config, *(("", "") if bare else (prefix, "encoder/"))))
    if isinstance(config, SequenceClassifierConfig):
        for ours, theirs in variant.sequence_head.items():
            rules += _linear(theirs, "head/" + ours, _LINEARS[ours])
    elif isinstance(config, TokenClassifierConfig):
        rules += _linear("classifier", "head/out", _LINEARS["out"])
    sizes = {
        "V": config.vocab_size,
        "P": config.position_offset + config.max_positions,
        "types": config.token_types,
        "D": config.width,
        "out": config.width,
        "L": config.layers,
        "N": config.heads,
        "H": config.head_dim,
        "F": config.ffn,
        "C": len(config.labels) if isinstance(config, ClassifierConfig) else 0,
    }
    spellings = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}
    if bare:
        ignored = f"{_UNREAD}|{variant.pretraining}"
        spellings[f"^{re.escape(prefix)}"] = ""
    else:
        ignored = f"{re.escape(prefix)}({_UNREAD})"
    return RuleTable(rules=tuple(rules), sizes=sizes, ignored=ignored, spellings=spellings)


def config_from_hf(fields: Mapping[str, Any], where: str, **overrides: Any) -> BertConfig:
    """Our config from a Hugging Face one; what we do not build is refused by name.

    Args:
        fields: the content of `config.json`; its `architectures` say which head there is.
        where: its path, for error messages.
        overrides: fields of ours that theirs do not hold, such as `param_dtype`.
    """
    model_type = fields.get("model_type")
    if model_type not in VARIANTS:
        raise refused(f"config field 'model_type' is {model_type!r}", where)
    variant = VARIANTS[model_type]
    config_class = _config_class(variant, fields, where)
    values = variant.table.read(fields, where)
    check_values(BertConfig, values, where)
    if values["width"] % values["heads"]:
        raise refused(f"width {values['width']} over {values['heads']} heads", where)
    if model_type == "roberta":
        padding = fields.get("pad_token_id", 1)
        if type(padding) is not int or not 0 <= padding < values["max_positions"] - 1:
            raise refused(f"config field 'pad_token_id' is {padding!r}", where)
        values["position_offset"] = padding + 1
        values["max_positions"] -= padding + 1
    if issubclass(config_class, ClassifierConfig):
        values["labels"] = _labels(fields, where)
    return config_class(model_type=model_type, **values, **variant.fixed, **overrides)


def _config_class(variant: _Variant, fields: Mapping[str, Any], where: str) -> type[BertConfig]:
    names = fields.get("architectures") or [variant.table.architecture]
    known = {variant.stem + end: config for config, end in _ENDS.items()}
    known |= {variant.stem + end: BertConfig for end in _PRETRAINING_ENDS}
    if not isinstance(names, list) or len(names) != 1 or names[0] not in known:
        raise refused(f"config field 'architectures' is {names!r}", where)
    return known[names[0]]


def _labels(fields: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Names of the classes; numbered, and two, where a config says nothing."""
    named = fields.get("id2label")
    if named is None:
        named = {"0": "LABEL_0", "1": "LABEL_1"}
    by_number = {str(n): label for n, label in named.items()} if isinstance(named, dict) else {}
    numbers = [str(i) for i in range(len(by_number))]
    if not by_number or not all(isinstance(by_number.get(i), str) for i in numbers):
        raise refused(f"config field 'id2label' is {named!r}", where)
    return tuple(by_number[i] for i in numbers)


def config_to_hf(config: BertConfig) -> dict[str, Any]:
    """The content of a `config.json` that any release of transformers reads."""
    variant = VARIANTS[config.model_type]
    fields = variant.table.write(config)
    fields["architectures"] = [variant.stem + _ENDS[type(config)]]
    fields["max_position_embeddings"] = config.position_offset + config.max_positions
    if config.model_type == "roberta":
        fields["pad_token_id"] = config.position_offset - 1
    if isinstance(config, ClassifierConfig):
        fields["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
        fields["label2id"] = {label: i for i, label in enumerate(config.labels)}
    return fields


def _encoder_rules(variant: _Variant, config: BertConfig, theirs: str, ours: str) -> Iterator[Rule]:
    """The rules of the encoder, whose names and paths start so."""
    for path, (name, layout) in _TABLES.items():
        if path != "type_embed" or config.token_types:
            yield Rule(f"{theirs}{name}.weight", f"{ours}{path}/embedding", layout)
    yield from _norm(theirs + "embeddings.LayerNorm", ours + "embed_norm")
    for path, name in variant.layer.items():
        name, path_of = f"{theirs}{variant.block}{{layer}}.{name}", f"{ours}layers/{path}"
        if path in _LINEARS:
            yield from _linear(name, path_of, _LINEARS[path])
        else:
            yield from _norm(name, path_of)


def _linear(theirs: str, ours: str, layouts: tuple[str, str]) -> Iterator[Rule]:
    for name, leaf, layout in zip(("weight", "bias"), ("kernel", "bias"), layouts, strict=True):
        yield Rule(f"{theirs}.{name}", f"{ours}/{leaf}", layout)


def _norm(theirs: str, ours: str) -> Iterator[Rule]:
    yield Rule(theirs + ".weight", ours + "/scale", "D -> D")
    yield Rule(theirs + ".bias", ours + "/bias", "D -> D")
