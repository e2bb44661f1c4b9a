import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data.sources import HubSource, LocalSource, SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.errors import UserError
from ecomjax.experiments import assembly
from ecomjax.experiments.assembly import choose, load_base, load_examples, make_source
from ecomjax.experiments.sections import DataConfig, MeshConfig
from ecomjax.hf.checkpoints import load_pretrained
from ecomjax.hf.files import sha256_of
from ecomjax.models.bert import BertConfig
from ecomjax.tasks.base import Example
from ecomjax.tasks.registry import get_task

EXAMPLES = [Example(f"id{i}", {"query": f"q {i}"}, "Exact") for i in range(20)]


@given(st.integers(0, 30), st.integers(0, 99))
def test_a_draw_keeps_the_order_and_has_the_size(size, seed):
    drawn = choose(EXAMPLES, size, seed)
    assert len(drawn) == (size if 0 < size < 20 else 20)
    places = [EXAMPLES.index(example) for example in drawn]
    assert places == sorted(set(places))
    assert choose(EXAMPLES, size, seed) == drawn


def test_a_draw_is_not_the_head_of_the_split():
    """Files are often sorted; each seed and size draws from all of it."""
    draws = [tuple(e.id for e in choose(EXAMPLES, 5, seed)) for seed in range(50)]
    assert len(set(draws)) > 40
    assert {id for drawn in draws for id in drawn} == {example.id for example in EXAMPLES}


def test_sources_are_what_the_config_says(tmp_path):
    local = make_source(DataConfig(source="local", path=str(tmp_path)))
    assert isinstance(local, LocalSource) and local.folder == tmp_path
    pinned, newest = (make_source(DataConfig(source="hub", revision=r)) for r in ("abc", ""))
    assert isinstance(pinned, HubSource) and pinned.revision == "abc"
    assert isinstance(newest, HubSource) and newest.revision is None
    shop = make_source(DataConfig(seed=4, train_size=7))
    assert isinstance(shop, SyntheticSource) and shop.seed == 4
    assert shop.sizes == Sizes(train=7)


def test_local_data_are_drawn_and_synthetic_are_made_to_size(tmp_path, shared_data):
    task = get_task("queryner")
    config = DataConfig(source="local", path=str(shared_data), validation_size=10)
    everything = task.load(LocalSource(shared_data), "validation")
    some = load_examples(task, config, "validation")
    assert len(some) == 10 and some != everything[:10]
    assert [e for e in everything if e in some] == some
    shop = DataConfig(seed=1, train_size=5)
    assert load_examples(task, shop, "train") == task.load(SyntheticSource(1, Sizes(5)), "train")


def test_the_base_is_told_loaded_once_and_as_the_config_says(make_config, tiny_base, capsys):
    load_base.cache_clear()
    config = make_config("finetune").model
    base = load_base(config)
    assert load_base(config) is base
    told = capsys.readouterr().err
    assert told.count("\n") == 2 and "mesh of 1 of 8 devices" in told
    sha256 = sha256_of([tiny_base / "model.safetensors"])
    assert f"from local: {tiny_base} ({sha256[:12]})" in told
    assert base.identity.sha256 == sha256
    kernel = base.params["layers"]["attn"]["q"]["kernel"]
    assert kernel.shape == (2, 16, 2, 8) and kernel.dtype == np.float32
    other = load_base(
        make_config(
            "finetune", changes={"model.param_dtype": "bfloat16", "model.remat": "full"}
        ).model
    )
    assert other.params["layers"]["attn"]["q"]["kernel"].dtype == "bfloat16"
    assert other.config.remat == "full" and other.config.param_dtype == "bfloat16"


def test_the_mesh_and_what_it_does_not_split_are_told(make_config, capsys):
    load_base.cache_clear()
    base = load_base(make_config("finetune").model, MeshConfig(data=1, fsdp=2, tensor=4))
    told = capsys.readouterr().err
    assert "mesh of 8 of 8 devices: data 1, fsdp 2, tensor 4, expert 1" in told
    assert "layers/attn/q/kernel: heads of 2 does not divide over 4" in told
    assert "layers/attn/k/kernel: kv_heads of 1 does not divide over 4" in told
    kernel = base.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 8)
    load_base.cache_clear()


def test_a_base_must_continue_text(make_config, monkeypatch):
    load_base.cache_clear()
    config = make_config("finetune").model
    loaded = load_pretrained(config.name, config.path)
    encoder = dataclasses.replace(loaded, config=BertConfig(9, 8, 1, 2, 4))
    monkeypatch.setattr(assembly, "load_pretrained", lambda *_: encoder)
    with pytest.raises(UserError, match="is a Bert, which does not continue text"):
        load_base(config)
    load_base.cache_clear()
