"""Adapters in PEFT's layout: exact round trips, PEFT as the oracle, bad folders refused."""

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
from ecomjax.hf.peft import CONFIG, WEIGHTS, read_adapter, write_adapter
from ecomjax.models import registry
from ecomjax.models.bart import BartConfig
from ecomjax.models.t5 import T5Config
from ecomjax.typing import LowRank

Q, DOWN = "layers/attn/q/kernel", "layers/mlp/down/kernel"
Q_A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def make_adapter(config):
    """Function (ranks by path, alpha, dtype) -> adapter tree with random factors."""
    table = families.rule_table(config)
    rules = {rule.ours: rule for rule in table.rules if rule.linear}

    def make(ranks=None, alpha=7.0, dtype=np.float32):
        rng = np.random.default_rng(0)
        leaves = {}
        for path, rank in (ranks or dict.fromkeys(rules, 3)).items():
            rule = rules[path]
            (d_out, d_in), stack = rule.shape(table.sizes), rule.stack(table.sizes)
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


@pytest.mark.parametrize(
    "config",
    [
        T5Config(264, 16, 2, 3, 3, 8, 20, gated=True),
        BartConfig(264, 16, 2, 3, 2, 4, 20, 28, max_positions=24),
    ],
    ids=["t5", "bart"],
)
def test_encoder_and_decoder_apart(config, tokenizer, identity, make_adapter, tokens, tmp_path):
    """Kernels of one name have ranks of their own; all, or those of one side alone."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = registry.build(config)
    shapes = registry.describe(model)[0]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), shapes)
    save_pretrained(tmp_path / "base", config, params, tokenizer)
    paths = [path for path in trees.flatten(shapes) if path.endswith("kernel")]
    side = [path for path in paths if path.startswith("encoder")]
    for ranks in ({path: 2 + (path in side) for path in paths}, dict.fromkeys(side, 4)):
        adapter = make_adapter(ranks)
        write_adapter(tmp_path / "adapter", adapter, config, identity)
        assert_equal(read_adapter(tmp_path / "adapter", config, identity), adapter)
        base = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        with torch.no_grad():
            inputs = torch.from_numpy(tokens.astype(np.int64))
            theirs = adapted(input_ids=inputs, decoder_input_ids=inputs).logits.numpy()
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        batch = (tokens, positions, np.ones_like(tokens))

        def own(variables, *batch):
            return model.apply(variables, *batch, method="everything")

        variables = jax.tree.map(jax.numpy.asarray, {"params": params, "lora": adapter})
        ours = jax.jit(own)(variables, *batch)
        assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("rslora", [False, True])
def test_reads_what_peft_writes(
    config, params, identity, logits, torch_model, tokens, tmp_path, rslora
):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=rslora, target_modules=r".*\.(k_proj|o_proj|gate_proj)"
    )
    model = peft.get_peft_model(torch_model, settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", config, identity)
    theirs = logits_of(model, tokens)
    ours = logits(config, params, tokens, adapter)
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
        ({"rank_pattern": {"layers.1.self_attn.v_proj": 5}}, "one positive rank for all layers"),
        ({"r": 0}, "lacks 'r'"),
        ({"r": 3.0}, "one positive rank"),
        ({"lora_alpha": "7"}, "is no number"),
        ({"alpha_pattern": {"(": 1}}, "broken pattern"),
        ({"use_dora": True}, "'use_dora' is True"),
        ({"bias": "all"}, "'bias' is 'all'"),
        ({"modules_to_save": ["embed_tokens"]}, "'modules_to_save'"),
        ({"init_lora_weights": "pissa"}, "'init_lora_weights' is 'pissa'"),
        ({"peft_type": "IA3"}, "'peft_type' is 'IA3'"),
        ({"layers_to_transform": [1]}, "'layers_to_transform'"),
        ({"shiny_new_variant": 1}, "'shiny_new_variant' is 1"),
        ({"target_modules": ["q_proj"]}, "belongs to no target module"),
        ({"target_modules": ["layers.0.self_attn.q_proj"]}, "not every layer"),
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


def test_adapter_without_effect_is_allowed(folder, config, identity):
    tensors = load_file(folder / WEIGHTS)
    save_file({k: 0 * v if "lora_B" in k else v for k, v in tensors.items()}, folder / WEIGHTS)
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
