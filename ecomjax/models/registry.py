"""Building a model from its config, and describing its parameters without making them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecomjax import trees
from ecomjax.models.bart import Bart, BartConfig
from ecomjax.models.bert import Bert, BertConfig
from ecomjax.models.config import ModelConfig
from ecomjax.models.gpt2 import GPT2, GPT2Config
from ecomjax.models.heads import (
    SequenceClassifier,
    SequenceClassifierConfig,
    TokenClassifier,
    TokenClassifierConfig,
)
from ecomjax.models.layers import DeclaredAxes
from ecomjax.models.llama import Llama, LlamaConfig
from ecomjax.models.t5 import T5, T5Config
from ecomjax.typing import Params

FAMILIES: dict[type[ModelConfig], type[nn.Module]] = {
    LlamaConfig: Llama,
    GPT2Config: GPT2,
    BertConfig: Bert,
    SequenceClassifierConfig: SequenceClassifier,
    TokenClassifierConfig: TokenClassifier,
    T5Config: T5,
    BartConfig: Bart,
}


def build(config: Any) -> Any:
    """The module for a config."""
    return FAMILIES[type(config)](config)  # pyright: ignore[reportCallIssue]


def _init_boxed(model: nn.Module, key: jax.Array) -> Mapping[str, Any]:
    one = jnp.ones((1, 1), jnp.int32)
    return model.init(key, one, one, one, method="everything")["params"]


def init(model: nn.Module, key: jax.Array) -> Params:
    """Random parameters, as a nested dict of bare arrays."""
    return nn.unbox(_init_boxed(model, key))


def describe(model: nn.Module) -> tuple[Params, Params]:
    """Two trees shaped like the parameters: shapes and dtypes, and `ParamAxes`.

    Nothing is computed, so a model of any size is described in milliseconds.
    """
    boxed = jax.eval_shape(lambda key: _init_boxed(model, key), jax.random.key(0))
    flat = jax.tree_util.tree_flatten_with_path(
        boxed, is_leaf=lambda x: isinstance(x, DeclaredAxes)
    )[0]
    axes = {"/".join(str(k.key) for k in path): box.axes() for path, box in flat}
    return nn.unbox(boxed), trees.unflatten(axes)
