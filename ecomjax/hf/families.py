"""Which module knows the names, shapes and config fields of which architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ecomjax.hf import bart, bert, gpt2, llama, mixtral, t5
from ecomjax.hf.fields import refused
from ecomjax.hf.rules import RuleTable
from ecomjax.models.bart import BartConfig
from ecomjax.models.bert import BertConfig
from ecomjax.models.config import ModelConfig
from ecomjax.models.gpt2 import GPT2Config
from ecomjax.models.heads import SequenceClassifierConfig, TokenClassifierConfig
from ecomjax.models.llama import LlamaConfig
from ecomjax.models.t5 import T5Config

_BY_CONFIG: dict[type[ModelConfig], tuple[Any, ...]] = {
    LlamaConfig: (llama, mixtral),
    GPT2Config: (gpt2,),
    BertConfig: (bert,),
    SequenceClassifierConfig: (bert,),
    TokenClassifierConfig: (bert,),
    T5Config: (t5,),
    BartConfig: (bart,),
}
_BY_MODEL_TYPE = {
    name: family
    for families in _BY_CONFIG.values()
    for family in families
    for name in family.MODEL_TYPES
}


def _family(config: Any) -> Any:
    """Where modules share a config class, its model type says which is meant."""
    families = _BY_CONFIG[type(config)]
    return families[0] if len(families) == 1 else _BY_MODEL_TYPE[config.model_type]


def config_from_hf(fields: Mapping[str, Any], where: str, **overrides: Any) -> Any:
    """Our config from the content of a `config.json`.

    Args:
        fields: the content.
        where: its path, for error messages.
        overrides: fields of ours that theirs do not hold, such as `param_dtype`.

    Raises:
        UserError: an architecture, field or value that is not built here.
    """
    model_type = fields.get("model_type")
    if model_type not in _BY_MODEL_TYPE:
        built = ", ".join(sorted(_BY_MODEL_TYPE))
        raise refused(f"config field 'model_type' is {model_type!r}, built are {built}", where)
    return _BY_MODEL_TYPE[model_type].config_from_hf(fields, where, **overrides)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of a `config.json` for a config of ours."""
    return _family(config).config_to_hf(config)


def rule_table(config: ModelConfig) -> RuleTable:
    """The rules between the tensors of a checkpoint and our parameters."""
    return _family(config).rule_table(config)
