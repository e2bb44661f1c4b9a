"""The Llama config and weights against transformers, every number off its default."""

import dataclasses
import json

import numpy as np
import pytest

from ecomjax.errors import UserError
from ecomjax.hf import checkpoints, llama

BASE = {
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-3,
}


def make_torch_model(config, dtype="float32"):
    """A random transformers Llama of our config, norms shaken off one."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    hf_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default"},
        tie_word_embeddings=config.tied_embeddings,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(hf_config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(getattr(torch, dtype))


def torch_logits(model, tokens):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def assert_logits_close(ours, theirs):
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.fixture
def tokens(config):
    return np.random.default_rng(1).integers(0, config.vocab_size, (2, 33)).astype(np.int32)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"], ids=["single", "sharded"])
def test_import_gives_the_logits_of_transformers(
    config, tokenizer, tokens, logits, tmp_path, max_shard_size
):
    model = make_torch_model(config)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_size == "5GB"
    tokenizer.save(tmp_path)
    loaded = checkpoints.load_pretrained("tiny", str(tmp_path))
    assert loaded.config == config
    assert loaded.identity.source == "local"
    assert_logits_close(logits(loaded.config, loaded.params, tokens), torch_logits(model, tokens))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000], ids=["single", "sharded"])
def test_transformers_loads_what_we_save(
    config, params, tokenizer, tokens, logits, tmp_path, max_shard_bytes
):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder = tmp_path / "out"
    checkpoints.save_pretrained(folder, config, params, tokenizer, max_shard_bytes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_shard_bytes < 10**9)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.eos_token_id == tokenizer.eos_id
    assert_logits_close(logits(config, params, tokens), torch_logits(model.eval(), tokens))
    again = checkpoints.load_pretrained("tiny", str(folder))
    assert again.config == config
    assert again.identity.fingerprint == checkpoints.fingerprint(config, params)


def test_bfloat16_weights(config, tokenizer, tmp_path):
    """Loading what is stored in bfloat16 is exact in both dtypes, and the same base."""
    model = make_torch_model(config, "bfloat16")
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    half = checkpoints.load_pretrained("tiny", str(tmp_path), param_dtype="bfloat16")
    full = checkpoints.load_pretrained("tiny", str(tmp_path))
    assert half.config == dataclasses.replace(full.config, param_dtype="bfloat16")
    assert half.identity == full.identity
    kernel = half.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == "bfloat16"
    np.testing.assert_array_equal(
        kernel.astype(np.float32), full.params["layers"]["mlp"]["up"]["kernel"]
    )
    expected = model.model.layers[1].mlp.up_proj.weight.detach().float().numpy().T
    np.testing.assert_array_equal(full.params["layers"]["mlp"]["up"]["kernel"][1], expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5000.0},
        {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}},
        {"rope_theta": 5000, "rope_scaling": None, "rope_parameters": None},
    ],
)
def test_both_places_of_rope_theta(fields):
    assert llama.config_from_hf(BASE | fields, "config.json").rope_theta == 5000.0


def test_defaults_of_transformers():
    """Fields that old configs leave out mean what transformers takes them for."""
    transformers = pytest.importorskip("transformers")
    bare = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "head_dim")}
    del bare["rms_norm_eps"]
    theirs = transformers.LlamaConfig(**bare)
    ours = llama.config_from_hf(bare, "config.json")
    assert ours == llama.config_from_hf(theirs.to_dict(), "config.json")


def test_config_round_trip(config):
    fields = json.loads(json.dumps(llama.config_to_hf(config)))
    assert llama.config_from_hf(fields, "config.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "'attention_bias' is True"),
        ({"mlp_bias": True}, "'mlp_bias' is True"),
        ({"hidden_act": "mish"}, "'hidden_act' is 'mish'"),
        ({"pretraining_tp": 2}, "'pretraining_tp' is 2"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ({"rope_interleaved": True}, "'rope_interleaved'"),
        ({"model_type": "mixtral"}, "'model_type' is 'mixtral'"),
        ({"sliding_window": 512}, "unknown config field 'sliding_window'"),
        ({"_attn_implementation_internal": "evil"}, "'_attn_implementation_internal'"),
        ({"hidden_size": None}, "missing config field 'hidden_size'"),
        ({"num_hidden_layers": 0}, "config value of layers is 0"),
        ({"vocab_size": "264"}, "config value of vocab_size is '264'"),
        ({"num_key_value_heads": 4}, "6 heads over 4 key/value heads"),
    ],
)
def test_config_refuses_by_name(change, message):
    with pytest.raises(UserError) as error:
        llama.config_from_hf(BASE | change, "there/config.json")
    assert message in str(error.value)
    assert "there/config.json" in str(error.value)
