"""Every decoder against transformers: tiny, random, every number off its default."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.decoding.beam import BeamOptions, beam_search
from ecomjax.decoding.generate import GenerateOptions, generate, until
from ecomjax.errors import UserError
from ecomjax.hf import checkpoints, families
from ecomjax.hf.checkpoints import Identity, fingerprint
from ecomjax.hf.peft import read_adapter, write_adapter
from ecomjax.hf.safetensors_io import SafetensorsFolder
from ecomjax.models import registry

SHAPE = {
    "vocab_size": 264,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 77,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
}
GEMMA = SHAPE | {
    "query_pre_attn_scalar": 5,
    "hidden_activation": "gelu",
    "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.5,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
CASES = {
    "llama": SHAPE | THETA | {"model_type": "llama", "hidden_act": "gelu"},
    "llama3": SHAPE | {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama_linear": SHAPE | {"model_type": "llama", "rope_parameters": LINEAR},
    "mistral": SHAPE | THETA | {"model_type": "mistral", "sliding_window": 5},
    "mixtral": SHAPE
    | THETA
    | {
        "model_type": "mixtral",
        "sliding_window": 5,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
    },
    "qwen2": SHAPE
    | THETA
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen3": SHAPE
    | THETA
    | {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": GEMMA["layer_types"],
    },
    "smollm3": SHAPE | THETA | {"model_type": "smollm3", "no_rope_layers": [1, 0, 0, 1]},
    "gemma2": GEMMA
    | THETA
    | {
        "model_type": "gemma2",
        "attn_logit_softcapping": 0.7,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": GEMMA
    | {
        "model_type": "gemma3_text",
        "rope_parameters": {
            "full_attention": LINEAR,
            "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
        },
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 264,
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 6,
        "n_inner": 40,
        "n_positions": 77,
        "layer_norm_epsilon": 1e-3,
        "activation_function": "gelu",
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def torch_model(case):
    """A random model, its norms and biases shaken off what they start as."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
    given = {key: value for key, value in case.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(case["model_type"], **given, **special)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def config(torch_model):
    fields = json.loads(torch_model.config.to_json_string(use_diff=False))
    return families.config_from_hf(fields, "config.json")


@pytest.fixture(scope="module")
def params(torch_model, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    torch_model.save_pretrained(folder)
    tensors = SafetensorsFolder(folder)
    params = families.rule_table(config).import_params(tensors, "float32", "here")
    return jax.tree.map(jax.numpy.asarray, params)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(3, 264, (3, 33)).astype(np.int32)


@pytest.fixture(scope="module")
def forward(config):
    """Function (params, tokens, positions, segments, lora) -> logits, scanned or unrolled."""

    def run(params, tokens, positions=None, segments=None, adapter=None, scan=True):
        if positions is None:
            positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        if segments is None:
            segments = np.ones(tokens.shape, np.int32)
        model = registry.build(dataclasses.replace(config, scan=scan))
        variables = {"params": params if scan else trees.unstack_layers(params)}
        variables |= {} if adapter is None else {"lora": adapter}

        @jax.jit
        def logits(variables, *batch):
            hidden, _ = model.apply(variables, *batch)
            return model.apply(variables, hidden, method="logits")

        return np.asarray(logits(variables, tokens, positions, segments))

    return run


@pytest.fixture(scope="module")
def expected(torch_model, tokens):
    return torch_logits(torch_model, tokens)


def torch_logits(model, tokens, **arguments):
    import torch

    with torch.no_grad():
        inputs = torch.from_numpy(tokens.astype(np.int64))
        return model(inputs, **arguments).logits.numpy()


def assert_close(ours, theirs):
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("scan", [True, False])
def test_logits_are_those_of_transformers(forward, params, tokens, expected, scan):
    assert_close(forward(params, tokens, scan=scan), expected)


@pytest.mark.parametrize("left", [0, 9])
def test_padding_on_either_side(torch_model, forward, params, tokens, left):
    """9 slots of it, with what stands there told to neither."""
    import torch

    right = 9 - left
    mask = np.ones(tokens.shape, np.int64)
    mask[0, :left] = mask[0, 33 - right :] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    theirs = torch_logits(
        torch_model,
        tokens,
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions),
    )
    ours = forward(params, tokens, positions.astype(np.int32), mask.astype(np.int32))
    assert_close(ours[mask > 0], theirs[mask > 0])


def test_saved_and_loaded_by_both(
    config, params, torch_model, tokenizer, tokens, expected, tmp_path
):
    """What transformers saves we load, and what we save it loads, tensor by tensor."""
    import transformers

    torch_model.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    loaded = checkpoints.load_pretrained("tiny", str(tmp_path / "theirs"))
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    checkpoints.save_pretrained(tmp_path / "ours", config, params, tokenizer)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(torch_logits(model.eval(), tokens), expected)


def test_decoding_in_parts_is_the_full_forward(config, params, tokens, expected):
    """A prefix for all rows, a prompt and single tokens, against the logits of the whole."""
    opened = np.concatenate([np.broadcast_to(tokens[:1, :7], (3, 7)), tokens[:, 7:]], axis=1)
    model, variables = registry.build(config), {"params": params}

    @jax.jit
    def extend(tokens, positions, segments, cache, prefix):
        hidden, cache = model.apply(variables, tokens, positions, segments, cache, prefix)
        return model.apply(variables, hidden, method="logits"), cache

    def slots(first, stop, rows, segment=1):
        at = np.broadcast_to(np.arange(first, stop, dtype=np.int32), (rows, stop - first))
        return opened[:rows, first:stop], at, np.full(at.shape, segment, np.int32)

    _, prefix = extend(*slots(0, 7, 1, -1), model.new_cache(1, 8), None)
    part, cache = extend(*slots(7, 21, 3), model.new_cache(3, 30), prefix)
    parts = [part]
    for t in range(21, 33):
        part, cache = extend(*slots(t, t + 1, 3), cache, prefix)
        parts.append(part)
    assert_close(np.concatenate(parts, axis=1)[0], expected[0, 7:])


def test_greedy_tokens_are_those_of_transformers(config, params, torch_model, tokens):
    import torch

    prompts = [tokens[0, :5].tolist(), tokens[1, :17].tolist(), tokens[2, :9].tolist()]
    theirs = [
        torch_model.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    ours = generate(registry.build(config), {"params": params}, prompts, GenerateOptions(16, 2))
    assert [[*r.tokens, *[2] * r.ended] for r in ours] == theirs


def test_beam_search_is_that_of_transformers(config, params, torch_model, tokens):
    """Of four beams, whose best answer is seldom the greedy one; each prompt alone there."""
    import torch

    prompts = [tokens[0, :5].tolist(), tokens[1, :17].tolist()]
    theirs = [
        torch_model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            num_beams=4,
            do_sample=False,
            early_stopping=False,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    variables = {"params": params}
    ours = beam_search(registry.build(config), variables, prompts, BeamOptions(12, 2, beams=4))
    assert [(r.tokens, r.ended) for r in ours] == [until((2,), answer) for answer in theirs]


def test_lora_on_every_linear_layer(config, params, tokens, forward):
    """Its side path is the fused model, the joint kernel of GPT-2 one of those adapted."""
    model = registry.build(config)
    _, axes = registry.describe(model)
    _, adapter = lora.init(params, axes, [LoraRule(rank=3, alpha=7.0)], jax.random.key(0))
    linear = {p for p, a in trees.flatten(axes).items() if p.startswith("layers/") and a.inputs}
    assert set(trees.flatten(adapter)) == linear - {"layers/mlp/router/kernel"}
    shaken = trees.map_leaves(lambda leaf: leaf.replace(b=leaf.b + 0.1), adapter)
    assert_close(forward(params, tokens, adapter=adapter), forward(params, tokens))
    side = forward(params, tokens, adapter=shaken)
    assert_close(side, forward(lora.fuse(params, shaken), tokens))
    assert np.abs(side - forward(params, tokens)).max() > 1e-2 * np.abs(side).max()


def test_adapters_are_those_of_peft(config, params, torch_model, tokens, forward, tmp_path):
    """Written by us and computed by PEFT; experts are apart, which it holds as one tensor."""
    peft = pytest.importorskip("peft")
    _, axes = registry.describe(registry.build(config))
    rules = [LoraRule(r"layers/(attn|mlp)/\w+/kernel(?<!router/kernel)", rank=3, alpha=7.0)]
    _, adapter = lora.init(params, axes, rules, jax.random.key(0))
    shaken = trees.map_leaves(lambda leaf: leaf.replace(b=leaf.b + 0.1), adapter)
    identity = Identity("tiny", "local", "tiny", "0" * 64, fingerprint(config, params))
    write_adapter(tmp_path / "adapter", shaken, config, identity)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(torch_model), tmp_path / "adapter")
    assert_close(forward(params, tokens, adapter=shaken), torch_logits(model.eval(), tokens))
    again = read_adapter(tmp_path / "adapter", config, identity)
    jax.tree.map(np.testing.assert_array_equal, again, shaken)


def test_fields_that_configs_leave_out(case):
    """Mean what transformers takes them for."""
    transformers = pytest.importorskip("transformers")
    kept = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    bare = {key: case[key] for key in (*kept, "n_embd", "n_layer", "n_head") if key in case}
    if "hidden_size" in bare:
        bare |= {"hidden_size": 64, "num_attention_heads": 32}
    given = {key: value for key, value in bare.items() if key != "model_type"}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    full = transformers.AutoConfig.for_model(bare["model_type"], **given, **special)
    theirs = json.loads(full.to_json_string(use_diff=False))
    ours = families.config_from_hf(bare, "config.json")
    assert ours == families.config_from_hf(theirs, "config.json")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "type 'yarn'"),
        ("llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "'llama3'"),
        ("llama3", {"rope_parameters": LLAMA3 | {"factor": -1.0}}, "factor is -1.0"),
        ("llama3", {"rope_parameters": "linear"}, "'rope_scaling' is 'linear'"),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 0}, "pattern of 0"),
        ("llama", {"hidden_act": "mish"}, "'hidden_act' is 'mish'"),
        ("mistral", {"sliding_window": "5"}, "'sliding_window' is '5'"),
        ("qwen2", {"layer_types": ["full_attention"]}, "'layer_types' does not name 4"),
        ("qwen3", {"attention_bias": True}, "'attention_bias' is True"),
        ("qwen3", {"layer_types": ["linear_attention"] * 4}, "'linear_attention'"),
        ("smollm3", {"no_rope_layers": [1, 1]}, "'no_rope_layers' does not name 4"),
        ("gemma2", {"use_bidirectional_attention": True}, "'use_bidirectional_attention'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx'"),
        ("gpt2", {"n_head": 5}, "width 24 over 5 heads"),
        ("gpt2", {"model_type": "gpt_neox"}, "'gpt_neox'"),
    ],
)
def test_unsupported_fields_are_refused_by_name(name, change, message):
    with pytest.raises(UserError) as error:
        families.config_from_hf(CASES[name] | change, "there/config.json")
    assert message in str(error.value) and "there/config.json" in str(error.value)


def test_gpt2_without_its_prefix():
    """The published checkpoint is of the bare model, constants included."""
    table = families.rule_table(families.config_from_hf(CASES["gpt2"] | {"n_layer": 1}, "here"))
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(rule.shape(table.sizes), np.float32)
        for rule in table.rules
        for _, name in rule.names(table.sizes)
    }
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    expected = table.import_params(tensors, "float32", "here")
    bare["h.0.attn.bias"] = np.ones((1, 1, 77, 77), np.float32)
    found = table.import_params(bare, "float32", "here")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
