"""Adapters of every family through PEFT and back: PEFT's logits are ours, in both directions."""

import copy
import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.hf import families
from ecomjax.hf.checkpoints import Identity
from ecomjax.hf.peft import read_adapter, write_adapter
from ecomjax.hf.peft_config import CONFIG
from ecomjax.hf.safetensors_io import SafetensorsFolder
from ecomjax.models import registry
from ecomjax.typing import DoRA, LowRank

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Model has `tie_word_embeddings=True` and a tied layer is part",
        "fan_in_fan_out is set to",
        "Setting `save_embedding_layers`",
        "The following (rank|alpha)_pattern keys did not match",
    )
]

VOCABULARY = 67
SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 77,
    "initializer_range": 0.2,
}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 6, "n_inner": 40, "initializer_range": 0.2}
BERT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 41,
    "num_labels": 3,
    "initializer_range": 0.2,
}
T5 = {
    "d_model": 24,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 5,
    "d_kv": 8,
    "d_ff": 40,
    "decoder_start_token_id": 5,
}
BART = {
    "d_model": 24,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 28,
    "max_position_embeddings": 33,
    "scale_embedding": True,
    "init_std": 0.2,
}
MIXTRAL = {"num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": False}
CASES = {
    "llama_tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "llama": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": False}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert": ("BertForSequenceClassification", BERT),
    "roberta": ("RobertaForSequenceClassification", BERT),
    "distilbert": (
        "DistilBertForTokenClassification",
        {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "num_labels": 3},
    ),
    "t5_tied": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "relu"}),
    "flan": (
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", BART),
    "mixtral": ("MixtralForCausalLM", LLAMA | MIXTRAL),
}
EMBEDDINGS_APART = ("t5_tied", "flan", "bart")
"""Where PEFT trains each reader of the embedding by itself."""
TOKENS = np.random.default_rng(1).integers(5, VOCABULARY, (2, 9)).astype(np.int32)
BASE = Identity("tiny", "local", "tiny", "0" * 64, "0" * 64)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of torch, and ours."""

    name: str
    torch_model: Any
    config: Any
    params: dict[str, Any]
    forward: Any

    def logits(self, adapter) -> np.ndarray:
        """Ours with the adapter, whose equations are written out here."""
        flat = trees.flatten(self.params)
        for path, leaf in trees.flatten(adapter).items():
            flat[path] = adapted(flat[path], leaf)
        return np.asarray(self.forward(trees.unflatten(flat)))

    def torch_logits(self, model) -> np.ndarray:
        import torch

        tokens = torch.from_numpy(TOKENS.astype(np.int64))
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if self.torch_model.config.is_encoder_decoder:
            given["decoder_input_ids"] = tokens
        with torch.no_grad():
            return model(**given).logits.numpy()

    def with_peft(self, folder):
        import peft

        return peft.PeftModel.from_pretrained(copy.deepcopy(self.torch_model), folder).eval()


def adapted(kernel, leaf):
    whole = kernel.reshape(*leaf.a.shape[:-1], leaf.b.shape[-1])
    whole = whole + leaf.scale[..., None, None] * (leaf.a @ leaf.b)
    if isinstance(leaf, DoRA):
        whole *= (leaf.magnitude / np.linalg.norm(whole, axis=-2))[..., None, :]
    return whole.reshape(kernel.shape)


@pytest.fixture(scope="module")
def torch():
    """On one thread: those of tiny products wait for each other longer than they work."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES)
def case(request, torch, tmp_path_factory) -> Case:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    name, given = CASES[request.param]
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**SPECIAL, **given)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        if request.param == "flan":
            model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn(VOCABULARY, 24))
        if name.startswith("T5"):
            model.shared.weight.mul_(0.3)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    config = families.config_from_hf(fields, "config.json")
    table = families.rule_table(config)
    params = table.import_params(SafetensorsFolder(folder), "float32", str(folder))
    ours = registry.build(config)
    positions = np.cumsum(np.ones_like(TOKENS), axis=1, dtype=np.int32) - 1
    batch = [jax.numpy.asarray(x) for x in (TOKENS, positions, np.ones_like(TOKENS))]

    @jax.jit
    def forward(params):
        return ours.apply({"params": params}, *batch, method="everything")

    return Case(request.param, model, config, params, forward)


def draw(case, dora=False, patterns=False):
    """An adapter of everything that can be adapted so."""
    table, rng = families.rule_table(case.config), np.random.default_rng(0)
    flat = trees.flatten(case.params)
    leaves = {}
    for number, rule in enumerate(table.rules):
        expert = "experts" in rule.ours or "router" in rule.ours
        if not (rule.linear or rule.embedding) or (dora and (rule.embedding or expert)):
            continue
        stack, shape = rule.stack(table.sizes), rule.shape(table.sizes)
        d_in, d_out = shape[::-1] if rule.transposed else shape
        most = 2 + number % 3 if patterns else 3
        ranks = np.full(stack, most, np.int32)
        scale = np.full(stack, 7 / 3, np.float32)
        for layer in range(stack[0] if stack and patterns else 0):
            # Parts of one parameter have one scale, experts of one layer one rank.
            ranks[layer], scale[layer] = most - layer % 2, 0.3 + layer
        inside = np.arange(most) < ranks[..., None]
        a = 0.1 * rng.standard_normal((*stack, d_in, most), np.float32)
        b = 0.1 * rng.standard_normal((*stack, most, d_out), np.float32)
        own = {}
        if patterns and (ranks < most).any():
            a, b = np.where(inside[..., None, :], a, 0), np.where(inside[..., None], b, 0)
            own = {"ranks": ranks}
        given = (a.astype(np.float32), b.astype(np.float32), scale)
        if dora:
            kernel = flat[rule.ours].reshape(*stack, d_in, d_out)
            noise = rng.standard_normal((*stack, d_out), np.float32)
            magnitude = np.linalg.norm(kernel, axis=-2) * (1 + np.float32(0.2) * noise)
            leaves[rule.ours] = DoRA(*given, magnitude, dropout=0.05, **own)
        else:
            leaves[rule.ours] = LowRank(*given, dropout=0.05, **own)
    return trees.unflatten(leaves)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def assert_close(ours, theirs, plain):
    theirs, plain = theirs.reshape(ours.shape), plain.reshape(ours.shape)
    assert np.abs(theirs - plain).max() > 1e-2 * np.abs(plain).max()
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("dora", "patterns"),
    [(False, False), (False, True), (True, True)],
    ids=["lora", "lora patterns", "dora patterns"],
)
def test_written(case, tmp_path, dora, patterns):
    """Read back it is bit-equal, and PEFT computes with it what we do."""
    adapter = draw(case, dora, patterns)
    write_adapter(tmp_path / "adapter", adapter, case.config, BASE)
    assert_same(read_adapter(tmp_path / "adapter", case.config, BASE), adapter)
    theirs = case.torch_logits(case.with_peft(tmp_path / "adapter"))
    assert_close(case.logits(adapter), theirs, case.torch_logits(case.torch_model))


@pytest.mark.parametrize(
    ("dora", "patterns"), [(False, True), (True, False)], ids=["lora patterns", "dora"]
)
def test_read(case, tmp_path, dora, patterns):
    """What PEFT made and saved, with rsLoRA, gives its logits here."""
    import peft
    import torch

    write_adapter(tmp_path / "ours", draw(case, dora, patterns), case.config, BASE)
    fields = json.loads((tmp_path / "ours" / CONFIG).read_text())
    if case.name in EMBEDDINGS_APART:
        kept = [name for name in fields["target_modules"] if not name.endswith("embed_tokens")]
        tied = case.name != "flan"
        fields["target_modules"] = [name for name in kept if not (tied and name == "lm_head")]
    own = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora")
    more = ("target_parameters", "ensure_weight_tying", "fan_in_fan_out")
    settings = {key: fields[key] for key in own + more}
    model = copy.deepcopy(case.torch_model)
    model = peft.get_peft_model(model, peft.LoraConfig(use_rslora=True, **settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs", case.config, BASE)
    theirs = case.torch_logits(model)
    assert_close(case.logits(adapter), theirs, case.torch_logits(case.torch_model))
