"""Adapters on their way to other programs."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import export as configs
from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.errors import UserError
from ecomjax.experiments import export
from ecomjax.experiments.config import from_config
from ecomjax.experiments.files import read_json
from ecomjax.hf.checkpoints import load_pretrained, save_pretrained
from ecomjax.hf.peft import CONFIG, read_adapter, write_adapter
from ecomjax.typing import DoRA

Q, DOWN = "layers/attn/q/kernel", "layers/mlp/down/kernel"


@pytest.fixture
def make_config(tiny_base):
    """Function (adapter, changes) -> config on the tiny base."""

    def make(adapter, **changes):
        raw = configs.get_config()
        raw.model.path, raw.adapter = str(tiny_base), str(adapter)
        raw.update(changes)
        return from_config(raw)

    return make


@pytest.fixture
def make_dora(base, make_adapter, tmp_path):
    """Function () -> folder of a random DoRA adapter."""

    def make():
        plain = trees.flatten(read_adapter(make_adapter(5, {Q: 2, DOWN: 3}), base.config))
        rng = np.random.default_rng(5)
        leaves = {
            path: DoRA(
                leaf.a,
                leaf.b,
                leaf.scale,
                rng.uniform(0.5, 2.0, (*leaf.b.shape[:-2], leaf.b.shape[-1])).astype(np.float32),
            )
            for path, leaf in plain.items()
        }
        write_adapter(tmp_path / "dora", trees.unflatten(leaves), base.config, base.identity())
        return tmp_path / "dora"

    return make


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_fused_model_is_base_and_delta(
    base, tiny_base, make_config, make_adapter, make_dora, tmp_path, kind
):
    adapter = make_dora() if kind == "dora" else make_adapter(1, {Q: 2, DOWN: 3})
    export.run(make_config(adapter), str(tmp_path / "run"))
    loaded = load_pretrained("tiny", str(tiny_base))
    params = jax.tree.map(jax.numpy.asarray, loaded.params)
    fused = lora.fuse(params, read_adapter(adapter, base.config))
    save_pretrained(tmp_path / "whole", loaded.config, fused, loaded.tokenizer)
    found, whole = (load_file(tmp_path / f / "model.safetensors") for f in ("run/model", "whole"))
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-6)
    changed = max(np.abs(v - base.tensors[name]).max() for name, v in found.items())
    assert changed > 0.01
    assert read_json(tmp_path / "run" / "export.json")["output"] == "model"


def test_an_adapter_for_vllm_has_one_rank_and_one_scale(base, make_config, make_adapter, tmp_path):
    adapter = make_adapter(1, {Q: 2, DOWN: 3}, alpha=5.0)
    config = make_config(adapter, output="adapter", vllm=True)
    export.run(config, str(tmp_path / "run"))
    fields = json.loads((tmp_path / "run" / "adapter" / CONFIG).read_text())
    assert fields["r"] == fields["lora_alpha"] == 3
    assert not fields.get("rank_pattern") and not fields.get("alpha_pattern")
    old, new = (read_adapter(f, base.config) for f in (adapter, tmp_path / "run" / "adapter"))
    for path in (Q, DOWN):
        one, other = (trees.flatten(tree)[path] for tree in (old, new))
        products = [np.asarray(x.scale[..., None, None] * (x.a @ x.b)) for x in (one, other)]
        np.testing.assert_allclose(*products, atol=1e-6)


def test_transformers_and_peft_compute_the_same_of_all_that_is_written(
    make_config, make_adapter, tiny_base, tmp_path
):
    torch = pytest.importorskip("torch")
    import peft
    import transformers

    adapter, tokens = make_adapter(1, {Q: 2, DOWN: 3}), torch.arange(5, 45).reshape(2, 20)
    export.run(make_config(adapter), str(tmp_path / "fused"))
    export.run(make_config(adapter, output="adapter", vllm=True), str(tmp_path / "alone"))

    def logits(model):
        with torch.no_grad():
            return model.eval()(tokens).logits.numpy()

    load = transformers.AutoModelForCausalLM.from_pretrained
    alone = [
        logits(peft.PeftModel.from_pretrained(load(tiny_base), folder))
        for folder in (adapter, tmp_path / "alone" / "adapter")
    ]
    fused = logits(load(tmp_path / "fused" / "model"))
    for found in (alone[1], fused):
        np.testing.assert_allclose(found, alone[0], atol=2e-5)
    assert np.abs(fused - logits(load(tiny_base))).max() > 0.01


def test_what_vllm_refuses_is_named_and_not_left_behind(
    make_config, make_adapter, make_dora, tmp_path, capsys
):
    wide = make_adapter(1, {Q: 4})
    config = make_config(wide, output="adapter", vllm=True, vllm_rank=1)
    with pytest.raises(UserError, match=r"rank 4 is above max_lora_rank 1.*config\.vllm_rank"):
        export.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(UserError, match=r"DoRA has no deltas alone: layers/.*fuse"):
        export.run(make_config(make_dora(), output="adapter", vllm=True), str(tmp_path / "dora2"))
    export.run(make_config(make_dora(), output="adapter"), str(tmp_path / "told"))
    assert "vLLM: DoRA is not supported; rank_pattern" in capsys.readouterr().err


def test_an_export_that_is_done_is_not_repeated(make_config, make_adapter, tmp_path, monkeypatch):
    adapter = make_adapter(1, {Q: 2})
    config = make_config(adapter, output="adapter")
    export.run(config, str(tmp_path / "run"))
    monkeypatch.setattr(export, "write_adapter", None)
    export.run(config, str(tmp_path / "run"))
    fields = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(fields | {"lora_alpha": 99}))
    with pytest.raises(UserError, match="has changed since"):
        export.run(config, str(tmp_path / "run"))


def test_mistakes(make_config, make_adapter, tmp_path):
    for changes, told in (
        ({"adapter": ""}, r"no adapter: config\.adapter"),
        ({"adapter": str(tmp_path / "none")}, "no such folder"),
        ({"adapter": "x", "model.quantization": "int8"}, "not quantized"),
        ({"vllm": True}, r"does not use it: config\.vllm; .*output=adapter"),
        ({"vllm_rank": 32}, r"does not use it: config\.vllm_rank"),
        ({"output": "adapter", "vllm_rank": 24}, r"unknown value 24: config\.vllm_rank"),
    ):
        raw = configs.get_config()
        raw.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=told):
            export.run(from_config(raw), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_neither_replaced_nor_removed_by_its_own_export(
    make_config, make_adapter, tmp_path
):
    kept = make_adapter(1, {Q: 4}).rename(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    for rank in (1, 16):
        config = make_config(kept, output="adapter", vllm=True, vllm_rank=rank)
        with pytest.raises(UserError, match="what no export has made"):
            export.run(config, str(tmp_path))
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
