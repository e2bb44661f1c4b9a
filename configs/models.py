"""Presets of the section `model`, by the name of the pretrained model."""

from ml_collections import ConfigDict

FLOAT32 = {"param_dtype": "float32", "compute_dtype": "float32", "remat": "none"}
"""For what fits anywhere, a laptop included."""
BFLOAT16 = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16", "remat": "dots"}
"""For accelerators; the adapter stays in float32."""

PRESETS = {
    "smollm2_135m": FLOAT32,
    "smollm2_360m": FLOAT32,
    "smollm2_1_7b": BFLOAT16,
    "smollm3_3b": BFLOAT16,
    "llama2_7b": BFLOAT16,
    "llama2_13b": BFLOAT16,
    "llama2_70b": BFLOAT16,
    "llama3_1_8b": BFLOAT16,
    "llama3_1_70b": BFLOAT16,
    "llama3_3_70b": BFLOAT16,
    "llama3_2_1b": BFLOAT16,
    "llama3_2_3b": BFLOAT16,
    "mistral_7b": BFLOAT16,
    "mixtral_8x7b": BFLOAT16,
    "mixtral_8x22b": BFLOAT16,
    "qwen2_5_0_5b": FLOAT32,
    "qwen2_5_1_5b": BFLOAT16,
    "qwen2_5_3b": BFLOAT16,
    "qwen2_5_7b": BFLOAT16,
    "qwen2_5_72b": BFLOAT16,
    "qwen3_0_6b": FLOAT32,
    "qwen3_4b": BFLOAT16,
    "qwen3_8b": BFLOAT16,
    "gemma2_2b": BFLOAT16,
    "gemma2_9b": BFLOAT16,
    "gemma3_1b": BFLOAT16,
    "gpt2": FLOAT32,
    "gpt2_medium": FLOAT32,
    "gpt2_xl": BFLOAT16,
    "bert_base": FLOAT32,
    "bert_large": FLOAT32,
    "roberta_base": FLOAT32,
    "distilbert_base": FLOAT32,
    "minilm_l6": FLOAT32,
    "t5_small": FLOAT32,
    "t5_base": FLOAT32,
    "t5_large": FLOAT32,
    "flan_t5_small": FLOAT32,
    "flan_t5_base": FLOAT32,
    "flan_t5_large": FLOAT32,
    "flan_t5_xl": BFLOAT16,
    "bart_base": FLOAT32,
    "bart_large": FLOAT32,
}

ENCODERS = ("bert_base", "bert_large", "roberta_base", "distilbert_base", "minilm_l6")
"""Those that give classes, and write nothing."""

ENCODER_DECODERS = (
    *("t5_small", "t5_base", "t5_large", "bart_base", "bart_large"),
    *("flan_t5_small", "flan_t5_base", "flan_t5_large", "flan_t5_xl"),
)
"""Those that read a source and write an answer."""

DEFAULT = "smollm2_135m"


def get(name: str) -> ConfigDict:
    shared = {
        "name": name,
        "path": "",
        "dispatch": "ragged",
        "quantization": "none",
        "kv_cache": "compute",
    }
    return ConfigDict(shared | PRESETS[name])
