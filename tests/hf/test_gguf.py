"""GGUF: written by the `gguf` package in llama.cpp's layout, read back; broken files refused."""

import dataclasses
import os
import struct
import time

import numpy as np
import pytest

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.hf import checkpoints, llama
from ecomjax.hf.gguf import GGUFFile, unpermute

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(weights, n_head):
    """As llama.cpp's convert_hf_to_gguf.py publishes it."""
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def gguf_name(name):
    name = name.removesuffix(".weight")
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest]}.weight" if layer.isdigit() else f"{NAMES[name]}.weight"


def write_gguf(path, config, tensors, backend, kind="F32", **changes):
    """Writes a Llama; tensors whose rows do not divide into blocks stay F32."""
    writer = gguf.GGUFWriter(str(path), changes.get("architecture", "llama"))
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(changes.get("value_length", config.head_dim))
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for key, value in changes.get("keys", {}).items():
        writer.add_uint32(key, value)
    vocabulary = backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he", "o r", "Ã ¼"])
    writer.add_eos_token_id(2)
    for name, tensor in tensors.items():
        if "q_proj" in name:
            tensor = permute(tensor, config.heads)
        if "k_proj" in name:
            tensor = permute(tensor, config.kv_heads)
        quantization = gguf.GGMLQuantizationType[kind]
        if tensor.ndim < 2 or tensor.shape[-1] % 32:
            quantization = gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(tensor.astype(np.float32), quantization)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tensors(config, params):
    return dict(llama.rule_table(config).export_tensors(params))


@pytest.fixture
def file(config, tensors, backend, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, config, tensors, backend)
    return path


def test_unpermute_undoes_the_published_permutation():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6 * 8, 5)).astype(np.float32)
    assert not np.array_equal(permute(weight, 6), weight)
    np.testing.assert_array_equal(unpermute(permute(weight, 6), 6), weight)


def test_loads_what_was_written(config, params, tokenizer, file):
    loaded = checkpoints.load_pretrained("tiny", str(file))
    assert loaded.config == config
    assert loaded.identity.fingerprint == checkpoints.fingerprint(config, params)
    assert loaded.tokenizer.encode("the shoe") == tokenizer.encode("the shoe")
    ours = trees.flatten(loaded.params)
    for path, leaf in trees.flatten(params).items():
        np.testing.assert_array_equal(ours[path], leaf)


@pytest.mark.parametrize(("kind", "error"), [("F16", 1e-3), ("Q8_0", 1e-2), ("Q4_1", 0.1)])
def test_quantized_tensors(kind, error, config, backend, tmp_path):
    """Rows of the FFN matrices made 32 long, so that they fall into blocks."""
    config = dataclasses.replace(config, ffn=64, width=32)
    table = llama.rule_table(config)
    rng = np.random.default_rng(0)
    shapes = {n: r.shape(table.sizes) for r in table.rules for _, n in r.names(table.sizes)}
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    write_gguf(tmp_path / "x.gguf", config, tensors, backend, kind)
    weights = GGUFFile(tmp_path / "x.gguf")
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"):
        expected = tensors[name]
        difference = np.abs(weights[name] - expected).max() / np.abs(expected).max()
        assert weights[name].dtype == np.float32
        assert 0 < difference < error


def test_transformers_reads_the_same(config, file, logits):
    """Its own GGUF reader, on the same file."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if not config.tied_embeddings:
        pytest.skip("one file is enough")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    ).eval()
    loaded = checkpoints.load_pretrained("tiny", str(file))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 21)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    ours = logits(loaded.config, loaded.params, tokens)
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("part", [0.0, 0.001, 0.02, 0.1, 0.5, 0.999])
def test_truncated(file, part):
    os.truncate(file, int(part * file.stat().st_size))
    with pytest.raises(UserError, match=r"GGUF file .*tiny\.gguf; fetch the file again"):
        GGUFFile(file)


def patched(file, offset, data):
    with open(file, "r+b") as opened:
        opened.seek(offset)
        opened.write(data)
    return file


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"GGML", "does not start with GGUF"),
        (4, struct.pack("<I", 1), "is of version 1"),
        (8, struct.pack("<Q", 2**63), "breaks off|0 axes"),
        (16, struct.pack("<Q", 2**63), "breaks off|unknown type"),
        (24, struct.pack("<Q", 2**63), "breaks off"),
    ],
)
def test_forged_counts(file, offset, data, message):
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        GGUFFile(patched(file, offset, data))
    assert time.monotonic() - start < 1.0


def test_forged_array_length(file):
    data = file.read_bytes()
    at = data.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    with pytest.raises(UserError, match="breaks off"):
        GGUFFile(patched(file, at, struct.pack("<Q", 2**61)))


def test_forged_tensor_shape(file):
    data = file.read_bytes()
    at = data.index(b"blk.1.ffn_up.weight") + len("blk.1.ffn_up.weight") + 4
    with pytest.raises(UserError, match=r"tensor 'blk\.\d\.\w+\.weight'"):
        GGUFFile(patched(file, at, struct.pack("<Q", 2**40)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "bert"}, "architecture 'bert'"),
        ({"value_length": 4}, "'llama.attention.value_length' is 4"),
        ({"keys": {"llama.expert_count": 8}}, "'llama.expert_count' is 8"),
        ({"keys": {"llama.attention.sliding_window": 9}}, "'llama.attention.sliding_window' is 9"),
    ],
)
def test_other_models_are_refused(config, tensors, backend, tmp_path, changes, message):
    write_gguf(tmp_path / "x.gguf", config, tensors, backend, **changes)
    with pytest.raises(UserError, match=message):
        checkpoints.load_pretrained("tiny", str(tmp_path / "x.gguf"))


def test_wrong_number_of_rows(config, tensors, backend, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    write_gguf(tmp_path / "x.gguf", config, tensors | {name: tensors[name][:36]}, backend)
    with pytest.raises(UserError, match=r"q_proj.weight' has shape \[36, 24\].*\[48, 24\]"):
        checkpoints.load_pretrained("tiny", str(tmp_path / "x.gguf"))


def test_expert_count_of_zero_is_no_expert(config, tensors, backend, tmp_path):
    write_gguf(tmp_path / "x.gguf", config, tensors, backend, keys={"llama.expert_count": 0})
    assert GGUFFile(tmp_path / "x.gguf").config["num_hidden_layers"] == config.layers
