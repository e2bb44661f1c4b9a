"""Adapters in PEFT's layout: exact round trips, PEFT as the oracle, bad folders refused."""

import dataclasses
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.hf import families
from ecomjax.hf.checkpoints import save_pretrained
from ecomjax.hf.peft import WEIGHTS, read_adapter, read_base, write_adapter
from ecomjax.hf.peft_config import CONFIG
from ecomjax.hf.peft_record import BASE
from ecomjax.typing import DoRA, LowRank

Q, DOWN = "layers/attn/q/kernel", "layers/mlp/down/kernel"
Q_A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def make_adapter(config):
    """Function (ranks by path, alpha, dtype) -> adapter tree with random factors."""
    table = families.rule_table(config)
    rules = {rule.ours: rule for rule in table.rules if rule.linear}

    def make(ranks=None, alpha=7.0, dtype=np.float32, layers=config.layers):
        rng = np.random.default_rng(0)
        leaves = {}
        for path, rank in (ranks or dict.fromkeys(rules, 3)).items():
            rule = rules[path]
            d_out, d_in = rule.shape(table.sizes)
            stack = rule.stack({**table.sizes, "L": layers})
            a = 0.2 * rng.standard_normal((*stack, d_in, rank), np.float32)
            b = 0.2 * rng.standard_normal((*stack, rank, d_out), np.float32)
            scale = np.full(stack, alpha / rank, np.float32)
            leaves[path] = LowRank(a.astype(dtype), b.astype(dtype), scale, dropout=0.05)
        return trees.unflatten(leaves)

    return make


def assert_equal(one, other):
    one, other = trees.flatten(one), trees.flatten(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert leaf.dropout == other[path].dropout
        for name in ("a", "b", "scale"):
            ours, theirs = getattr(leaf, name), getattr(other[path], name)
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha": 16.0, "ranks": {Q: 12}},
        {"ranks": {Q: 2, DOWN: 5}, "alpha": 0.3},
        {"dtype": ml_dtypes.bfloat16},
    ],
    ids=["every kernel", "one kernel", "two ranks", "bfloat16"],
)
def test_round_trip_is_bit_equal(config, identity, make_adapter, tmp_path, settings):
    adapter = make_adapter(**settings)
    write_adapter(tmp_path / "adapter", adapter, config, identity)
    assert_equal(read_adapter(tmp_path / "adapter", config, identity), adapter)


def test_round_trip_of_a_scale_per_layer(config, identity, make_adapter, tmp_path):
    adapter = make_adapter()
    leaf = adapter["layers"]["attn"]["q"]["kernel"]
    scale = np.array([0.1, 1 / 3, 2.0], np.float32)
    adapter["layers"]["attn"]["q"]["kernel"] = leaf.replace(scale=scale)
    write_adapter(tmp_path / "adapter", adapter, config, identity)
    assert_equal(read_adapter(tmp_path / "adapter", config, identity), adapter)


def test_layout(config, identity, make_adapter, tmp_path):
    adapter = make_adapter({Q: 12, DOWN: 12}, alpha=16.0)
    write_adapter(tmp_path / "adapter", jax.tree.map(jax.numpy.asarray, adapter), config, identity)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert len(tensors) == 2 * 2 * config.layers
    np.testing.assert_array_equal(tensors[Q_A0], adapter["layers"]["attn"]["q"]["kernel"].a[0].T)
    assert tensors[Q_A0.replace("lora_A", "lora_B")].shape == (48, 12)
    fields = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert fields["target_modules"] == ["down_proj", "q_proj"]
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"]) == (12, 16, 0.05)
    assert not fields["rank_pattern"] and not fields["alpha_pattern"]


@pytest.fixture
def torch_model(config, params, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    save_pretrained(tmp_path / "base", config, params, tokenizer)
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()


@pytest.fixture
def tokens(config):
    return np.random.default_rng(1).integers(0, config.vocab_size, (2, 17)).astype(np.int32)


def logits_of(model, tokens):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "patterns"])
def test_peft_computes_the_same(
    config, params, identity, make_adapter, logits, torch_model, tokens, tmp_path, uniform
):
    peft = pytest.importorskip("peft")
    adapter = make_adapter(None if uniform else {Q: 2, DOWN: 5})
    if not uniform:
        leaf = adapter["layers"]["attn"]["q"]["kernel"]
        scale = np.array([0.5, 1.0, 3.0], np.float32)
        adapter["layers"]["attn"]["q"]["kernel"] = leaf.replace(scale=scale)
    write_adapter(tmp_path / "adapter", adapter, config, identity)
    plain = logits_of(torch_model, tokens)
    theirs = logits_of(peft.PeftModel.from_pretrained(torch_model, tmp_path / "adapter"), tokens)
    ours = logits(config, params, tokens, adapter)
    assert np.abs(theirs - plain).max() > 1e-2 * np.abs(plain).max()
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.fixture
def folder(config, identity, make_adapter, tmp_path):
    write_adapter(tmp_path / "adapter", make_adapter(), config, identity)
    return tmp_path / "adapter"


def test_another_base_is_refused(folder, config, other_identity):
    with pytest.raises(UserError, match="base 'tiny' from 'local', whose weights differ"):
        read_adapter(folder, config, other_identity)
    assert read_adapter(folder, config, other_identity, any_base=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 4}, r"lora_A\.weight' has shape \[3, 24\], config and base say \[4, 24\]"),
        ({"rank_pattern": {"v_proj": 5}}, r"v_proj\.lora_A.* \[3, 24\], .* say \[5, 24\]"),
        (
            {"rank_pattern": {"layers.1.self_attn.v_proj": 5}},
            r"1\.self_attn\.v_proj.* say \[5, 24\]",
        ),
        ({"rank_pattern": {"v_proj": -1}}, "rank of 'model.layers.0.self_attn.v_proj' is -1"),
        ({"r": 0}, "lacks 'r'"),
        ({"r": 3.0}, r"rank of .* is 3\.0"),
        ({"alpha_pattern": {"v_proj": float("nan")}}, "is no number"),
        ({"lora_alpha": "7"}, "is no number"),
        ({"alpha_pattern": {"(": 1}}, "broken pattern"),
        ({"use_dora": True}, r"missing tensor '.*\.lora_magnitude_vector'"),
        ({"use_dora": "yes"}, "'use_dora' is 'yes'"),
        ({"bias": "all"}, "'bias' is 'all'"),
        ({"modules_to_save": ["embed_tokens"]}, "'modules_to_save'"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "'init_lora_weights' is 'olora'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "is 'loftq'.*merge it"),
        ({"peft_type": "IA3"}, "'peft_type' is 'IA3'"),
        ({"layers_to_transform": [1]}, "'layers_to_transform'"),
        ({"shiny_new_variant": 1}, "'shiny_new_variant' is 1"),
        ({"target_modules": ["q_proj"]}, "belongs to no target module"),
        ({"target_modules": ["layers.0.self_attn.q_proj"]}, "not every layer"),
        ({"target_modules": ["q_proj", "c_attn"]}, "target 'c_attn' is no linear layer"),
        ({"target_modules": ".*c_attn"}, r"target '\.\*c_attn' is no linear layer"),
        ({"target_modules": {"q_proj": 1}}, "'target_modules' is {'q_proj': 1}"),
        ({"target_parameters": ["q_proj.weight"]}, r"target 'q_proj\.weight' is no"),
    ],
)
def test_config_refused(folder, config, identity, fields, message):
    changed = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(changed))
    with pytest.raises(UserError, match=message):
        read_adapter(folder, config, identity)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q_A0: None}, "missing tensor '.*q_proj.lora_A.weight'"),
        ({Q_A0.replace("_A", "_B"): None}, "missing tensor '.*q_proj.lora_B.weight'"),
        ({"base_model.model.stray": np.zeros(2)}, r"'base_model\.model\.stray' belongs to no"),
        ({Q_A0: np.zeros((3, 23), np.float32)}, r"has shape \[3, 23\], config and base say"),
        ({Q_A0: np.full((3, 24), np.nan, np.float32)}, "holds NaN or infinity"),
        ({Q_A0: np.full((3, 24), np.inf, np.float32)}, "holds NaN or infinity"),
        ({Q_A0: np.zeros((3, 24), np.int32)}, "has dtype int32"),
        ({Q_A0: np.zeros((3, 24), np.float16)}, "that of other layers"),
    ],
)
def test_tensors_refused(folder, config, identity, change, message):
    tensors = load_file(folder / WEIGHTS) | change
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)
    with pytest.raises(UserError, match=message):
        read_adapter(folder, config, identity)


def test_adapter_without_effect_is_told(folder, config, identity, caplog):
    read_adapter(folder, config, identity)
    assert not caplog.text
    tensors = load_file(folder / WEIGHTS)
    still = {k: 0 * v if "q_proj.lora_B" in k else v for k, v in tensors.items()}
    save_file(still, folder / WEIGHTS)
    read_adapter(folder, config, identity)
    kernels = 7 if config.tied_embeddings else 8
    assert f"B is zero in 1 of {kernels} kernels, such as {Q}" in caplog.text


def test_base_is_read_without_a_model(folder, config, identity):
    base = read_base(folder)
    assert base == identity
    assert read_adapter(folder, config)
    (folder / BASE).write_text(json.dumps({"name": "tiny"}))
    with pytest.raises(UserError, match=r"not the record of an adapter.*base\.json"):
        read_base(folder)
    (folder / BASE).unlink()
    assert read_base(folder) is None
    assert read_adapter(folder, config, identity)


def test_ranks_by_layer(config, identity, make_adapter, tmp_path):
    """Every layer is written at its own, and padded again; names do not match longer ones."""
    config = dataclasses.replace(config, layers=12)
    adapter = make_adapter({Q: 3}, layers=12)
    leaf = adapter["layers"]["attn"]["q"]["kernel"]
    ranks = np.full(12, 3, np.int32)
    ranks[1], ranks[11] = 2, 1
    inside = np.arange(3) < ranks[:, None]
    padded = leaf.replace(
        a=np.where(inside[:, None], leaf.a, 0), b=np.where(inside[..., None], leaf.b, 0)
    )
    adapter["layers"]["attn"]["q"]["kernel"] = padded.replace(ranks=ranks)
    write_adapter(tmp_path / "adapter", adapter, config, identity)
    fields = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    name = "model.layers.{}.self_attn.q_proj"
    assert fields["rank_pattern"] == {name.format(1): 2, name.format(11): 1}
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert tensors[Q_A0.replace(".0.", ".11.")].shape == (1, 24)
    again = read_adapter(tmp_path / "adapter", config, identity)
    assert_equal(again, adapter)
    np.testing.assert_array_equal(again["layers"]["attn"]["q"]["kernel"].ranks, ranks)
    adapter["layers"]["attn"]["q"]["kernel"] = leaf.replace(ranks=ranks)
    with pytest.raises(UserError, match="is of rank 2 in factors of 3"):
        write_adapter(tmp_path / "adapter", adapter, config, identity)


def test_patterns_match_ends_of_names(folder, config):
    plain = read_adapter(folder, config)
    fields = json.loads((folder / CONFIG).read_text())
    fields["rank_pattern"] = {"self_attn": 5, "layers.1": 5, "proj": 5}
    (folder / CONFIG).write_text(json.dumps(fields))
    assert_equal(read_adapter(folder, config), plain)


def with_magnitude(leaf):
    magnitude = np.ones((*leaf.scale.shape, leaf.b.shape[-1]), np.float32)
    return DoRA(leaf.a, leaf.b, leaf.scale, magnitude, leaf.dropout)


def test_dora_and_plain_kernels_are_not_written_together(config, identity, make_adapter, tmp_path):
    adapter = trees.map_leaves(with_magnitude, make_adapter({Q: 3, DOWN: 3}))
    write_adapter(tmp_path / "adapter", adapter, config, identity)
    adapter["layers"]["mlp"]["down"]["kernel"] = make_adapter()["layers"]["mlp"]["down"]["kernel"]
    with pytest.raises(UserError, match=f"'{Q}' has DoRA and '{DOWN}' plain LoRA"):
        write_adapter(tmp_path / "adapter", adapter, config, identity)


MAGNITUDE = Q_A0.replace("lora_A.weight", "lora_magnitude_vector")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"missing tensor '.*0\.self_attn\.q_proj\.lora_magnitude_vector'"),
        (np.ones(24, np.float32), r"magnitude_vector' has shape \[24\], .* say \[48\]"),
        (np.ones((1, 48), np.float32), r"magnitude_vector' has shape \[1, 48\]"),
        (np.full(48, np.nan, np.float32), "magnitude_vector' holds NaN"),
    ],
)
def test_magnitudes_refused(config, identity, make_adapter, tmp_path, value, message):
    folder = tmp_path / "adapter"
    adapter = trees.map_leaves(with_magnitude, make_adapter({Q: 3}))
    write_adapter(folder, adapter, config, identity)
    tensors = load_file(folder / WEIGHTS) | {MAGNITUDE: value}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)
    with pytest.raises(UserError, match=message):
        read_adapter(folder, config, identity)


@pytest.fixture
def embedding_folder(config, identity, tmp_path):
    """Function (fields, tensors) -> the folder of an adapter of the embedding, so changed."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape, np.float32) for shape in ((264, 3), (3, 24)))
    adapter = {"embed": {"embedding": LowRank(a, b, np.array(2.0, np.float32))}}
    folder = tmp_path / "embedding"

    def make(fields=(), tensors=()):
        write_adapter(folder, adapter, config, identity)
        assert_equal(read_adapter(folder, config, identity), adapter)
        changed = json.loads((folder / CONFIG).read_text()) | dict(fields)
        (folder / CONFIG).write_text(json.dumps(changed))
        changed = load_file(folder / WEIGHTS) | dict(tensors)
        save_file({k: v for k, v in changed.items() if v is not None}, folder / WEIGHTS)
        return folder

    return make


@pytest.mark.parametrize("config", [True], indirect=True)
@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        (
            {"ensure_weight_tying": False, "target_modules": ["embed_tokens"]},
            {},
            "targets 'model.embed_tokens' but not 'lm_head', which has the same weights",
        ),
        (
            {"ensure_weight_tying": False, "target_modules": ["lm_head"]},
            {},
            "targets 'lm_head' but not 'model.embed_tokens', which has the same weights",
        ),
        (
            {},
            {"base_model.model.lm_head.lora_B.weight": np.zeros((264, 3), np.float32)},
            "adapter of 'lm_head' is another than that of the embedding",
        ),
        ({"alpha_pattern": {"lm_head": 1}}, {}, "adapter of 'lm_head' is another"),
        ({"use_dora": True}, {}, "DoRA of 'model.embed_tokens', which is no linear layer"),
    ],
)
def test_tied_embeddings_refused(config, identity, embedding_folder, fields, tensors, message):
    folder = embedding_folder(fields, tensors)
    with pytest.raises(UserError, match=message):
        read_adapter(folder, config, identity)


def test_missing_and_broken_files(folder, config, identity):
    os.truncate(folder / WEIGHTS, 1000)
    with pytest.raises(UserError, match="safetensors file"):
        read_adapter(folder, config, identity)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"'adapter_model\.bin' are not read"):
        read_adapter(folder, config, identity)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"missing adapter_model\.safetensors"):
        read_adapter(folder, config, identity)
    (folder / CONFIG).unlink()
    with pytest.raises(UserError, match=r"cannot read .*adapter_config\.json"):
        read_adapter(folder, config, identity)


def test_nan_is_not_written(config, identity, make_adapter, tmp_path):
    adapter = make_adapter()
    adapter["layers"]["attn"]["q"]["kernel"].a[1, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj.*holds NaN"):
        write_adapter(tmp_path / "adapter", adapter, config, identity)
    assert not (tmp_path / "adapter").exists()
