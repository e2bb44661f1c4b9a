"""T5 and BART against transformers: tiny, random, every number off its default."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.decoding.beam import BeamOptions, beam_search
from ecomjax.decoding.generate import GenerateOptions, generate
from ecomjax.errors import UserError
from ecomjax.hf import checkpoints, families
from ecomjax.models import registry

T5 = {
    "model_type": "t5",
    "vocab_size": 264,
    "d_model": 24,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 5,
    "d_kv": 8,
    "d_ff": 40,
    "relative_attention_num_buckets": 10,
    "relative_attention_max_distance": 13,
    "layer_norm_epsilon": 1e-3,
    "decoder_start_token_id": 5,
}
CASES = {
    "t5": T5 | {"feed_forward_proj": "silu"},
    "flan": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": {
        "model_type": "bart",
        "vocab_size": 264,
        "d_model": 24,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 3,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 28,
        "max_position_embeddings": 33,
        "activation_function": "silu",
        "scale_embedding": True,
        "decoder_start_token_id": 5,
        "forced_bos_token_id": 9,
    },
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FIRST = {"t5": (5,), "flan": (5,), "bart": (5, 9)}


@pytest.fixture(scope="module", params=CASES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def torch_model(name):
    """A random model, its norms and biases shaken off what they start as, the head free or not.

    Transformers ties the head of every new model, and leaves it free where a checkpoint has one.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    given = {key: value for key, value in CASES[name].items() if key != "model_type"}
    given |= {"init_std": 0.3} if name == "bart" else {}
    config = transformers.AutoConfig.for_model(CASES[name]["model_type"], **given, **SPECIAL)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        if name == "bart":
            model.final_logits_bias.normal_(std=0.3)
        # Or else the tied heads repeat the last token.
        if name == "bart":
            model.model.decoder.embed_positions.weight.mul_(8.0)
            for layer in model.model.decoder.layers:
                layer.encoder_attn.out_proj.weight.mul_(6.0)
        else:
            model.shared.weight.mul_(0.2)
        if name == "flan":
            model.lm_head.weight = torch.nn.Parameter(torch.randn(264, 24))
    return model.eval()


@pytest.fixture(scope="module")
def config(name, torch_model):
    """As a published one: newer ones keep the forced token with the decoding options."""
    fields = json.loads(torch_model.config.to_json_string(use_diff=False))
    forced = {k: v for k, v in CASES[name].items() if k.startswith("forced")}
    return families.config_from_hf(fields | forced, "config.json")


@pytest.fixture(scope="module")
def params(torch_model, config):
    tensors = {name: tensor.numpy() for name, tensor in torch_model.state_dict().items()}
    params = families.rule_table(config).import_params(tensors, "float32", "here")
    return jax.tree.map(jax.numpy.asarray, params)


@pytest.fixture(scope="module")
def sources():
    return np.random.default_rng(1).integers(3, 264, (3, 33)).astype(np.int32)


@pytest.fixture(scope="module")
def targets():
    return np.random.default_rng(2).integers(3, 264, (3, 21)).astype(np.int32)


def whole(tokens):
    """Positions and segment ids of rows of one sequence each."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return positions, np.ones(tokens.shape, np.int32)


@pytest.fixture(scope="module")
def forward(config):
    """Function (params, sources, targets, source mask, lora) -> logits, scanned or unrolled."""

    def run(params, sources, targets, mask=None, adapter=None, scan=True):
        model = registry.build(dataclasses.replace(config, scan=scan))
        variables = {"params": params if scan else trees.unstack_layers(params)}
        variables |= {} if adapter is None else {"lora": adapter}
        positions, ones = whole(sources)

        @jax.jit
        def logits(variables, source, target):
            memory = model.apply(variables, *source, method="remember")
            hidden, _ = model.apply(variables, *target, None, memory)
            return model.apply(variables, hidden, method="logits")

        source = (sources, positions, ones if mask is None else mask)
        return np.asarray(logits(variables, source, (targets, *whole(targets))))

    return run


def torch_logits(model, sources, targets, mask=None):
    import torch

    with torch.no_grad():
        return model(
            input_ids=torch.from_numpy(sources.astype(np.int64)),
            decoder_input_ids=torch.from_numpy(targets.astype(np.int64)),
            attention_mask=None if mask is None else torch.from_numpy(mask.astype(np.int64)),
        ).logits.numpy()


@pytest.fixture(scope="module")
def expected(torch_model, sources, targets):
    return torch_logits(torch_model, sources, targets)


def assert_close(ours, theirs):
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("scan", [True, False])
def test_logits_are_those_of_transformers(forward, params, sources, targets, expected, scan):
    assert_close(forward(params, sources, targets, scan=scan), expected)


@pytest.mark.parametrize("left", [0, 9])
def test_padding_of_sources_on_either_side(torch_model, forward, params, sources, targets, left):
    """9 slots of it, with what stands there told to neither; positions count it in both."""
    mask = np.ones(sources.shape, np.int32)
    mask[0, :left] = mask[0, 33 - (9 - left) :] = 0
    theirs = torch_logits(torch_model, sources, targets, mask)
    assert_close(forward(params, sources, targets, mask), theirs)
    assert np.abs(theirs[0] - torch_logits(torch_model, sources, targets)[0]).max() > 1e-2


def test_saved_and_loaded_by_both(
    config, params, torch_model, tokenizer, sources, targets, expected, tmp_path
):
    """What transformers saves we load, and what we save it loads, tensor by tensor."""
    import transformers

    torch_model.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    loaded = checkpoints.load_pretrained("tiny", str(tmp_path / "theirs"))
    assert loaded.config == dataclasses.replace(config, start=(5,))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    checkpoints.save_pretrained(tmp_path / "ours", config, params, tokenizer)
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(torch_logits(model.eval(), sources, targets), expected)
    assert_greedy(config, params, model, sources)
    again = checkpoints.load_pretrained("tiny", str(tmp_path / "ours"))
    assert again.config == config


def test_decoding_in_parts_is_the_full_forward(config, params, sources, targets, expected):
    """Nine target tokens at once and then single ones, against the logits of the whole."""
    model, variables = registry.build(config), {"params": params}
    remember = jax.jit(functools.partial(model.apply, method="remember"))
    memory = remember(variables, sources, *whole(sources))

    @jax.jit
    def extend(tokens, positions, segments, cache):
        hidden, cache = model.apply(variables, tokens, positions, segments, cache, memory)
        return model.apply(variables, hidden, method="logits"), cache

    cache, parts = model.new_cache(3, 24), []
    for first, stop in [(0, 9), *((t, t + 1) for t in range(9, 21))]:
        part, cache = extend(*(x[:, first:stop] for x in (targets, *whole(targets))), cache)
        parts.append(part)
    assert_close(np.concatenate(parts, axis=1), expected)


def assert_greedy(config, params, torch_model, sources, **options):
    """The same tokens, one by one there and padded to a batch here."""
    import torch

    prompts = [sources[0, :5].tolist(), sources[1].tolist(), sources[2, :9].tolist()]
    theirs = [
        torch_model.generate(
            torch.tensor([prompt]),
            max_new_tokens=len(config.start) - 1 + 16,
            do_sample=False,
            num_beams=1,
            forced_eos_token_id=None,
            **options,
        )[0].tolist()
        for prompt in prompts
    ]
    options = GenerateOptions(16, 2, start=config.start)
    ours = generate(registry.build(config), {"params": params}, prompts, options)
    assert [[*config.start, *r.tokens, *[2] * r.ended] for r in ours] == theirs
    assert len({r.tokens for r in ours}) == 3 and any(len(set(r.tokens)) > 1 for r in ours)


def test_greedy_tokens_are_those_of_transformers(name, config, params, torch_model, sources):
    assert config.start == FIRST[name]
    forced = {"forced_bos_token_id": 9} if name == "bart" else {}
    assert_greedy(config, params, torch_model, sources, **forced)


@pytest.mark.parametrize(("penalty", "place"), [(-1.0, 0), (0.8, 0), (0.8, -1)])
def test_beam_search_is_that_of_transformers(
    name, config, params, torch_model, sources, penalty, place
):
    """Of four beams and an end that comes early or late; a forced token counts as one."""
    import torch

    prompts = [sources[0, :5].tolist(), sources[1].tolist(), sources[2, :9].tolist()]
    model, variables = registry.build(config), {"params": params}
    free = beam_search(model, variables, prompts, BeamOptions(9, 2, start=config.start))
    end = free[1].tokens[place]
    options = BeamOptions(9, end, start=config.start, beams=4, length_penalty=penalty)
    ours = beam_search(model, variables, prompts, options)
    assert any(found.ended for found in ours)
    forced = {"forced_bos_token_id": 9} if name == "bart" else {}
    for prompt, found in zip(prompts, ours, strict=True):
        theirs = torch_model.generate(
            torch.tensor([prompt]),
            max_new_tokens=len(config.start) - 1 + 9,
            do_sample=False,
            num_beams=4,
            early_stopping=False,
            length_penalty=penalty,
            eos_token_id=end,
            forced_eos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,
            **forced,
        )
        answer = [*config.start, *found.tokens, *[end] * found.ended]
        assert answer == theirs.sequences[0].tolist()
        assert found.score == pytest.approx(theirs.sequences_scores.item(), rel=1e-4)


def test_lora_on_every_linear_layer(config, params, sources, targets, forward):
    """Its side path is the fused model, in the encoder, the decoder and between them."""
    _, axes = registry.describe(registry.build(config))
    _, adapter = lora.init(params, axes, [LoraRule(rank=3, alpha=7.0)], jax.random.key(0))
    linear = {path for path in trees.flatten(axes) if path.endswith("kernel")}
    assert set(trees.flatten(adapter)) == linear - {"lm_head/kernel"}
    plain = forward(params, sources, targets)
    assert_close(forward(params, sources, targets, adapter=adapter), plain)
    rng = np.random.default_rng(3)
    shaken = trees.map_leaves(
        lambda leaf: leaf.replace(b=rng.uniform(-0.1, 0.1, leaf.b.shape).astype(np.float32)),
        adapter,
    )
    side = forward(params, sources, targets, adapter=shaken)
    assert_close(side, forward(lora.fuse(params, shaken), sources, targets))
    assert np.abs(side - plain).max() > 1e-2 * np.abs(side).max()


@pytest.mark.parametrize("left_out", ["t5", "bart"])
def test_fields_that_configs_leave_out(left_out):
    """Mean what transformers takes them for."""
    transformers = pytest.importorskip("transformers")
    optional = ("num_decoder", "relative", "layer_norm", "feed_forward", "max_pos", "scale", "act")
    optional += ("decoder_start", "forced", "model_type")
    case = CASES[left_out]
    bare = {key: value for key, value in case.items() if not key.startswith(optional)}
    full = transformers.AutoConfig.for_model(case["model_type"], **bare)
    theirs = json.loads(full.to_json_string(use_diff=False))
    ours = families.config_from_hf(bare | {"model_type": left_out}, "config.json")
    assert ours == families.config_from_hf(theirs, "config.json")


def test_config_round_trip(config):
    fields = json.loads(json.dumps(families.config_to_hf(config)))
    assert families.config_from_hf(fields, "config.json") == config


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("t5", {"feed_forward_proj": "gated-mish"}, "'feed_forward_proj' is 'gated-mish'"),
        ("t5", {"feed_forward_proj": "wide-relu"}, "'feed_forward_proj' is 'wide-relu'"),
        ("t5", {"is_gated_act": "no"}, "gated is 'no'"),
        ("t5", {"is_encoder_decoder": False}, "'is_encoder_decoder' is False"),
        ("t5", {"relative_attention_max_distance": 5}, "10 buckets of relative positions up to 5"),
        ("t5", {"relative_attention_num_buckets": 3}, "3 buckets"),
        ("t5", {"num_layers": None}, "missing config field 'num_layers'"),
        ("flan", {"scale_decoder_outputs": True}, "'scale_decoder_outputs' is True"),
        ("t5", {"encoder_only": True}, "unknown config field 'encoder_only'"),
        ("bart", {"normalize_before": True}, "'normalize_before' is True"),
        ("bart", {"tie_word_embeddings": False}, "'tie_word_embeddings' is False"),
        ("bart", {"activation_function": "mish"}, "'activation_function' is 'mish'"),
        ("bart", {"num_hidden_layers": 4}, "'num_hidden_layers' is 4"),
        ("bart", {"encoder_attention_heads": 5}, "width 24 over 5 heads"),
        ("bart", {"decoder_attention_heads": 7}, "width 24 over 7 heads"),
        ("bart", {"d_model": "24"}, "width is '24'"),
    ],
)
def test_unsupported_fields_are_refused_by_name(case, change, message):
    with pytest.raises(UserError) as error:
        families.config_from_hf(CASES[case] | change, "there/config.json")
    assert message in str(error.value) and "there/config.json" in str(error.value)


def drawn(table):
    """A random tensor under each name of theirs."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(rule.shape(table.sizes), np.float32)
        for rule in table.rules
        for _, name in rule.names(table.sizes)
    }


def assert_imports(table, tensors, expected):
    found = table.import_params(tensors, "float32", "here")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_tensors_that_checkpoints_of_t5_repeat_or_leave_out():
    """Embeddings under three names, a bias never used; a free head that is the embedding."""
    table = families.rule_table(families.config_from_hf(CASES["flan"], "here"))
    tensors = drawn(table) | {"lm_head.weight": np.zeros((264, 24), np.float32)}
    tensors["lm_head.weight"][:] = tensors["shared.weight"]
    expected = table.import_params(tensors, "float32", "here")
    del tensors["lm_head.weight"]
    assert_imports(table, tensors, expected)
    tensors |= {
        "encoder.embed_tokens.weight": tensors["shared.weight"],
        "decoder.embed_tokens.weight": tensors["shared.weight"],
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones(2),
    }
    assert_imports(table, tensors, expected)
    with pytest.raises(UserError, match=r"'encoder\.embed_tokens\.weight' differs"):
        other = tensors["shared.weight"] + 1
        assert_imports(table, tensors | {"encoder.embed_tokens.weight": other}, expected)
    tied = families.rule_table(families.config_from_hf(CASES["t5"], "here"))
    with pytest.raises(UserError, match=r"'lm_head\.weight' differs"):
        free = drawn(tied) | {"lm_head.weight": np.ones((264, 24), np.float32)}
        assert_imports(tied, free, expected)


def test_bart_without_its_prefix():
    """Published checkpoints of the bare model have no bias of the logits either."""
    table = families.rule_table(families.config_from_hf(CASES["bart"], "here"))
    tensors = drawn(table)
    tensors["final_logits_bias"] *= 0
    expected = table.import_params(tensors, "float32", "here")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    del bare["final_logits_bias"]
    bare |= {"encoder.version": np.ones(1), "decoder.version": np.ones(1)}
    assert_imports(table, bare, expected)
