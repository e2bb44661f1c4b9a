"""Encoders and their heads against transformers, every number off its default."""

import dataclasses
import functools
import json
import os

import jax
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.hf import bert, families
from ecomjax.hf.files import read_json
from ecomjax.hf.safetensors_io import SafetensorsFolder, write_folder
from ecomjax.models import registry
from ecomjax.models.bert import BertConfig
from ecomjax.models.heads import (
    ClassifierConfig,
    SequenceClassifierConfig,
    TokenClassifierConfig,
)

LABELS = ("exact", "substitute", "complement")
NUMBERS = {"vocab_size": 67, "width": 24, "layers": 3, "heads": 3, "ffn": 40, "max_positions": 21}
OURS = {
    "bert": {"token_types": 3, "norm_eps": 1e-3, "activation": "gelu_tanh"},
    "roberta": {
        "token_types": 2,
        "norm_eps": 1e-3,
        "activation": "relu",
        "position_offset": 5,
    },
    "distilbert": {"token_types": 0, "activation": "relu"},
}
_COMMON = {"vocab_size": 67, "id2label": dict(enumerate(LABELS)), "initializer_range": 0.3}
_SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-3,
}
THEIRS = {
    "bert": _COMMON
    | _SHAPE
    | {"max_position_embeddings": 21, "type_vocab_size": 3, "hidden_act": "gelu_new"},
    "roberta": _COMMON
    | _SHAPE
    | {
        "max_position_embeddings": 26,
        "type_vocab_size": 2,
        "hidden_act": "relu",
        "pad_token_id": 4,
    },
    "distilbert": _COMMON
    | {"dim": 24, "n_layers": 3, "n_heads": 3, "hidden_dim": 40}
    | {"max_position_embeddings": 21, "activation": "relu"},
}
STEMS = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
CONFIGS = {
    "Model": BertConfig,
    "ForSequenceClassification": SequenceClassifierConfig,
    "ForTokenClassification": TokenClassifierConfig,
}

T, LENGTHS = 11, (9, 6)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(5, 67, (2, T)).astype(np.int32)
TYPES = (np.arange(T)[None] >= np.array([[4], [3]])).astype(np.int32)

every_class = pytest.mark.parametrize("end", CONFIGS)
every_variant = pytest.mark.parametrize("model_type", STEMS)


def our_config(model_type, end="Model", **changes):
    labels = {"labels": LABELS} if issubclass(CONFIGS[end], ClassifierConfig) else {}
    return CONFIGS[end](model_type=model_type, **NUMBERS, **OURS[model_type], **labels, **changes)


def make_torch_model(model_type, end):
    """A random model of transformers, norms and biases shaken off their initial values."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, STEMS[model_type] + "Config")(**THEIRS[model_type])
    model = getattr(transformers, STEMS[model_type] + end)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def torch_output(model, model_type):
    """Hidden states, or logits, of both sequences, padded on the right."""
    torch = pytest.importorskip("torch")
    inside = np.arange(T)[None] < np.array(LENGTHS)[:, None]
    offset = OURS[model_type].get("position_offset", 0)
    positions = np.broadcast_to(np.arange(T) + offset, inside.shape)
    fields = {"input_ids": TOKENS, "attention_mask": inside, "position_ids": positions}
    if model_type != "distilbert":
        fields["token_type_ids"] = TYPES
    fields = {k: torch.from_numpy(v.astype(np.int64)) for k, v in fields.items()}
    with torch.no_grad():
        return model(**fields)[0].numpy()


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, args, types):
    return model.apply({"params": params}, *args, token_types=types)


def our_output(config, params, side="right"):
    """The same, from rows padded on that side."""
    model = registry.build(config)
    if not config.scan:
        params = trees.unstack_layers(params)
    left = np.array([[T - n if side == "left" else 0] for n in LENGTHS])
    inside = np.arange(T)[None] - left
    segments = (inside >= 0) & (inside < np.array(LENGTHS)[:, None])
    slots = np.clip(inside, 0, None)
    tokens = np.where(segments, np.take_along_axis(TOKENS, slots, 1), 7)
    types = np.where(segments, np.take_along_axis(TYPES, slots, 1), 0).astype(np.int32)
    args = [x.astype(np.int32) for x in (tokens, slots, segments)]
    if isinstance(config, SequenceClassifierConfig):
        return np.asarray(_apply(model, params, (*args, left.astype(np.int32)), types))[:, 0]
    output = np.asarray(_apply(model, params, args, types))
    assert np.isfinite(output).all()
    return np.stack(
        [np.roll(row, -start, 0) for row, start in zip(output, left[:, 0], strict=True)]
    )


def assert_close(ours, theirs):
    """To 1e-5 of the largest, padding left out."""
    if ours.ndim == 3:
        inside = np.arange(T)[None] < np.array(LENGTHS)[:, None]
        ours, theirs = ours[inside], theirs[inside]
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def load(folder, dtype="float32"):
    """(config, parameters) of a folder of transformers."""
    where = os.path.join(folder, "config.json")
    config = families.config_from_hf(read_json(where), where, param_dtype=dtype)
    table = families.rule_table(config)
    return config, table.import_params(SafetensorsFolder(folder), dtype, str(folder))


def random_params(config):
    shapes, _ = registry.describe(registry.build(config))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes)


@every_variant
@every_class
def test_import_gives_the_output_of_transformers(model_type, end, tmp_path):
    model = make_torch_model(model_type, end)
    model.save_pretrained(tmp_path)
    config, params = load(tmp_path)
    assert config == our_config(model_type, end)
    shapes, _ = registry.describe(registry.build(config))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    expected = torch_output(model, model_type)
    assert_close(our_output(config, params), expected)
    assert_close(our_output(config, params, "left"), expected)
    unrolled = dataclasses.replace(config, scan=False)
    assert_close(our_output(unrolled, params), expected)


@every_variant
@every_class
def test_transformers_loads_what_we_save(model_type, end, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    config = our_config(model_type, end)
    params = random_params(config)
    tensors = dict(families.rule_table(config).export_tensors(params))
    write_folder(tmp_path, tensors, tensors.items())
    fields = json.dumps(families.config_to_hf(config))
    (tmp_path / "config.json").write_text(fields)
    # Its pooler is no part of an encoder here.
    pooler = {"add_pooling_layer": False} if end == "Model" and model_type != "distilbert" else {}
    auto = getattr(transformers, "AutoModel" + end.removeprefix("Model"))
    model, info = auto.from_pretrained(tmp_path, output_loading_info=True, **pooler)
    assert type(model).__name__ == STEMS[model_type] + end
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(our_output(config, params), torch_output(model.eval(), model_type))
    again, same = load(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


PRETRAINED = [("bert", "ForPreTraining")] + [(name, "ForMaskedLM") for name in STEMS]


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize(("model_type", "end"), PRETRAINED)
def test_the_encoder_of_a_published_base(model_type, end, old_names, tmp_path):
    """Heads of pretraining are let pass, and so is what old checkpoints held or called so."""
    model = make_torch_model(model_type, end)
    model.save_pretrained(tmp_path)
    if old_names:
        held = SafetensorsFolder(tmp_path)
        old = {_old_name(name): held[name].copy() for name in held}
        old |= {f"{model_type}.embeddings.position_ids": np.arange(21)[None].astype(np.float32)}
        write_folder(tmp_path, old, old.items())
    config, params = load(tmp_path)
    assert config == our_config(model_type)
    assert_close(our_output(config, params), torch_output(model.base_model, model_type))


def _old_name(name):
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    return name.replace("LayerNorm.bias", "LayerNorm.beta")


def test_bfloat16_weights(tmp_path):
    config = our_config("bert", param_dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype("bfloat16"), random_params(config))
    tensors = dict(families.rule_table(config).export_tensors(params))
    write_folder(tmp_path, tensors, tensors.items())
    (tmp_path / "config.json").write_text(json.dumps(families.config_to_hf(config)))
    again, same = load(tmp_path, "bfloat16")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bert.encoder.layer.0.crossattention.self.query.weight": ()}, "unknown tensor"),
        ({"classifier.weight": (3, 24)}, "unknown tensor 'classifier.weight'"),
        ({"embeddings.LayerNorm.weight": None}, "missing tensor 'embeddings.LayerNorm.weight'"),
        ({"embeddings.LayerNorm.weight": (23,)}, "has shape [23], the config says [24]"),
        ({"embeddings.LayerNorm.gamma": (24,)}, "are both 'embeddings.LayerNorm.weight'"),
    ],
)
def test_tensors_are_refused_by_name(change, message):
    config = our_config("bert")
    table = bert.rule_table(config)
    tensors = dict(table.export_tensors(random_params(config)))
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = np.zeros(shape, np.float32)
    with pytest.raises(UserError) as error:
        table.import_params(tensors, "float32", "there")
    assert message in str(error.value) and "there" in str(error.value)


@every_variant
def test_defaults_of_transformers(model_type):
    """Fields that configs leave out mean what transformers takes them for."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, STEMS[model_type] + "Config")()
    bare = {"model_type": model_type}
    ours = bert.config_from_hf(bare, "config.json")
    assert ours == bert.config_from_hf(theirs.to_dict(), "config.json")
    nulls = {name: None for name in bert.VARIANTS[model_type].table.names}
    assert ours == bert.config_from_hf(bare | nulls, "config.json")
    architectures = [STEMS[model_type] + "ForTokenClassification"]
    headed = bert.config_from_hf(bare | {"architectures": architectures}, "config.json")
    assert headed.labels == tuple(theirs.id2label[i] for i in range(2))


PUBLISHED = {
    "bert-base-multilingual-cased": {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "directionality": "bidi",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": 119547,
    },
    "roberta-base": {
        "architectures": ["RobertaForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 514,
        "model_type": "roberta",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "type_vocab_size": 1,
        "vocab_size": 50265,
    },
    "distilbert-base-uncased": {
        "activation": "gelu",
        "architectures": ["DistilBertForMaskedLM"],
        "attention_dropout": 0.1,
        "dim": 768,
        "dropout": 0.1,
        "hidden_dim": 3072,
        "initializer_range": 0.02,
        "max_position_embeddings": 512,
        "model_type": "distilbert",
        "n_heads": 12,
        "n_layers": 6,
        "pad_token_id": 0,
        "qa_dropout": 0.1,
        "seq_classif_dropout": 0.2,
        "sinusoidal_pos_embds": False,
        "tie_weights_": True,
        "vocab_size": 30522,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_as_published(name):
    config = bert.config_from_hf(PUBLISHED[name], "config.json")
    assert type(config) is BertConfig
    assert (config.width, config.heads, config.ffn, config.max_positions) == (768, 12, 3072, 512)
    assert config.position_offset == (2 if config.model_type == "roberta" else 0)


@every_variant
@every_class
def test_config_round_trip(model_type, end):
    config = our_config(model_type, end)
    fields = json.loads(json.dumps(bert.config_to_hf(config)))
    assert bert.config_from_hf(fields, "config.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "'position_embedding_type' is"),
        ({"is_decoder": True}, "'is_decoder' is True"),
        ({"add_cross_attention": True}, "'add_cross_attention' is True"),
        ({"pruned_heads": {"0": [1]}}, "'pruned_heads' is"),
        ({"is_encoder_decoder": True}, "'is_encoder_decoder' is True"),
        ({"hidden_act": "quick_gelu"}, "'hidden_act' is 'quick_gelu'"),
        ({"model_type": "distilbert", "activation": "tanh"}, "'activation' is 'tanh'"),
        ({"model_type": "distilbert", "hidden_size": 24}, "unknown config field 'hidden_size'"),
        ({"model_type": "deberta-v2"}, "'model_type' is 'deberta-v2'"),
        ({"model_type": "roberta", "pad_token_id": None}, "'pad_token_id' is None"),
        ({"model_type": "roberta", "pad_token_id": 511}, "'pad_token_id' is 511"),
        ({"num_hidden_layers": 0}, "config value of layers is 0"),
        ({"type_vocab_size": 0}, "config value of token_types is 0"),
        ({"num_attention_heads": 7}, "width 768 over 7 heads"),
        ({"architectures": ["BertForQuestionAnswering"]}, "['BertForQuestionAnswering']"),
        ({"architectures": ["RobertaModel"]}, "'architectures' is ['RobertaModel']"),
        ({"architectures": "BertModel"}, "'architectures' is 'BertModel'"),
        ({"embedding_size": 128}, "unknown config field 'embedding_size'"),
    ],
)
def test_config_refuses_by_name(change, message):
    with pytest.raises(UserError) as error:
        bert.config_from_hf({"model_type": "bert"} | change, "there/config.json")
    assert message in str(error.value)
    assert "there/config.json" in str(error.value)


@pytest.mark.parametrize("named", [[], {}, {"0": "a", "2": "b"}, {"0": 1}, "ab"])
def test_labels_are_numbered_from_zero(named):
    fields = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    with pytest.raises(UserError, match="id2label"):
        bert.config_from_hf(fields | {"id2label": named}, "config.json")
