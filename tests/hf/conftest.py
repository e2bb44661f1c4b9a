"""A tiny Llama with every number off its default, and a tokenizer of its size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from ecomjax.hf.checkpoints import Identity, fingerprint
from ecomjax.hf.tokenizer import Tokenizer
from ecomjax.models import registry
from ecomjax.models.llama import LlamaConfig

TEMPLATE = (
    "{% for m in messages %}\n{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("o", "r"), ("Ã", "¼")]


@pytest.fixture
def backend() -> tokenizers.Tokenizer:
    """A byte-level BPE of 3 special tokens, the 256 bytes and 5 merges."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, *("".join(pair) for pair in MERGES)]
    model = tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, MERGES)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return backend


@pytest.fixture
def tokenizer(backend) -> Tokenizer:
    special = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[0], "pad_token": SPECIAL[0]}
    return Tokenizer(backend, special, TEMPLATE, "test")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def config(request) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=264,
        width=24,
        layers=3,
        heads=6,
        kv_heads=2,
        head_dim=8,
        ffn=40,
        rope_theta=5000.0,
        norm_eps=1e-3,
        tied_embeddings=request.param,
        max_positions=77,
    )


@pytest.fixture
def params(config):
    """Random parameters, norms included, as numpy arrays."""
    shapes, _ = registry.describe(registry.build(config))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), shapes)


@pytest.fixture
def identity(config, params) -> Identity:
    return Identity("tiny", "local", "tiny", "0" * 64, fingerprint(config, params))


@pytest.fixture
def other_identity(identity) -> Identity:
    return dataclasses.replace(identity, name="other", fingerprint="1" * 64)


@pytest.fixture
def logits():
    """Function (config, params, tokens [B, T], adapter) -> logits [B, T, V] of our model."""

    def run(config, params, tokens, adapter=None):
        model, tokens = registry.build(config), jnp.asarray(tokens)
        variables = {"params": params} | ({"lora": adapter} if adapter else {})
        variables = jax.tree.map(jnp.asarray, variables)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        segments = jnp.ones_like(positions)
        hidden, _ = model.apply(variables, tokens, positions, segments)
        return np.asarray(model.apply(variables, hidden, method="logits"))

    return run
