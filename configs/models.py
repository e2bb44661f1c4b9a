"""Presets of the section `model`, by the name of the pretrained model."""

from ml_collections import ConfigDict

PRESETS = {
    "smollm2_135m": {"param_dtype": "float32", "compute_dtype": "float32"},
}


def get(name: str) -> ConfigDict:
    shared = {"name": name, "path": "", "scan": True, "remat": "none"}
    return ConfigDict(shared | PRESETS[name])
