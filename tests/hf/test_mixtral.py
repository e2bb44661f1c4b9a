"""What Mixtral has besides a decoder: experts, their dispatch and the balance of their load."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.errors import UserError
from ecomjax.hf import families
from ecomjax.hf.safetensors_io import SafetensorsFolder
from ecomjax.models import registry

FIELDS = {
    "model_type": "mixtral",
    "vocab_size": 264,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 77,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
    "hidden_act": "gelu",
    "sliding_window": 5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "router_aux_loss_coef": 0.3,
    "output_router_logits": True,
}
BATCH, SLOTS = 3, 19


@pytest.fixture(scope="module")
def torch_model():
    """A random model, its norms shaken off one."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    given = {key: value for key, value in FIELDS.items() if key != "model_type"}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
    model = transformers.MixtralForCausalLM._from_config(
        transformers.MixtralConfig(**given, **special), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def folder(torch_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral")
    torch_model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def config(folder):
    return families.config_from_hf(json.loads((folder / "config.json").read_text()), "config.json")


@pytest.fixture(scope="module")
def params(folder, config):
    tensors = SafetensorsFolder(folder)
    return families.rule_table(config).import_params(tensors, "float32", str(folder))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(3, 264, (BATCH, SLOTS)).astype(np.int32)


@pytest.fixture(scope="module", params=["none", "right", "left"])
def padded(request):
    """(mask, positions): 7 slots of padding in the first row."""
    mask = np.ones((BATCH, SLOTS), np.int32)
    slots = {"none": slice(0), "right": slice(SLOTS - 7, None), "left": slice(7)}[request.param]
    mask[0, slots] = 0
    return mask, np.maximum(np.cumsum(mask, axis=1, dtype=np.int32) - 1, 0)


def run_torch(model, *arrays):
    """(logits, load-balance loss) of transformers for tokens, mask and positions."""
    import torch

    with torch.no_grad():
        inputs, mask, positions = (torch.from_numpy(x.astype(np.int64)) for x in arrays)
        out = model(inputs, attention_mask=mask, position_ids=positions)
        return out.logits.numpy(), float(out.aux_loss)


def run(config, params, tokens, mask, positions, adapter=None):
    """(logits, load-balance loss) of ours."""
    model = registry.build(config)
    variables = {"params": params if config.scan else trees.unstack_layers(params)}
    variables |= {} if adapter is None else {"lora": adapter}

    @jax.jit
    def forward(variables, *batch):
        hidden, balance = model.apply(variables, *batch, method="with_balance")
        logits = model.apply(variables, hidden, method="logits")
        return logits, balance.sum / balance.weight

    logits, balance = forward(variables, *map(jnp.asarray, (tokens, positions, mask)))
    return np.asarray(logits), float(balance)


def assert_close(ours, theirs, tolerance=1e-5):
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize(
    "changes",
    [{"dispatch": "dense"}, {"dispatch": "ragged"}, {"dispatch": "ragged", "scan": False}],
    ids=["dense", "ragged", "unrolled"],
)
def test_logits_and_balance_are_those_of_transformers(
    torch_model, config, params, tokens, padded, changes
):
    mask, positions = padded
    theirs, balance = run_torch(torch_model, tokens, mask, positions)
    ours, own = run(dataclasses.replace(config, **changes), params, tokens, mask, positions)
    assert_close(ours[mask > 0], theirs[mask > 0])
    assert own == pytest.approx(balance, rel=1e-5)
    assert abs(balance - 3) > 1e-3


def test_the_published_names(folder, config):
    """What transformers writes is what is published: a tensor for every expert."""
    names = set(SafetensorsFolder(folder))
    prefix = "model.layers.2.block_sparse_moe"
    assert {f"{prefix}.gate.weight", f"{prefix}.experts.4.w3.weight"} <= names
    table = families.rule_table(config)
    assert names == {name for rule in table.rules for _, name in rule.names(table.sizes)}


def test_lora_in_both_dispatches(config, params, tokens):
    _, axes = registry.describe(registry.build(config))
    _, adapter = lora.init(params, axes, [LoraRule(rank=3, alpha=7.0)], jax.random.key(0))
    shaken = trees.map_leaves(lambda leaf: leaf.replace(b=leaf.b + 0.05), adapter)
    mask = np.ones(tokens.shape, np.int32)
    positions = np.cumsum(mask, axis=1, dtype=np.int32) - 1
    base, _ = run(config, params, tokens, mask, positions)
    merged, _ = run(config, lora.fuse(params, shaken), tokens, mask, positions)
    assert np.abs(merged - base).max() > 1e-2 * np.abs(base).max()
    for dispatch in ("dense", "ragged"):
        dispatched = dataclasses.replace(config, dispatch=dispatch)
        side, _ = run(dispatched, params, tokens, mask, positions, shaken)
        assert_close(side, merged)


def test_config_round_trip(config):
    assert (config.experts, config.experts_per_token, config.balance_coefficient) == (5, 3, 0.3)
    fields = json.loads(json.dumps(families.config_to_hf(config)))
    assert families.config_from_hf(fields, "config.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router_jitter_noise": 0.1}, "'router_jitter_noise' is 0.1"),
        ({"num_local_experts": 2}, "3 of 2 experts"),
        ({"num_experts_per_tok": 0}, "0 of 5 experts"),
        ({"num_local_experts": "8"}, "experts is '8'"),
        ({"num_shared_experts": 1}, "'num_shared_experts'"),
        ({"quantization_config": {}}, "'quantization_config'"),
        ({"intermediate_size": None}, "'intermediate_size'"),
    ],
)
def test_config_refuses_by_name(change, message):
    with pytest.raises(UserError) as error:
        families.config_from_hf(FIELDS | change, "there/config.json")
    assert message in str(error.value) and "there/config.json" in str(error.value)
