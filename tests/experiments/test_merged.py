"""Merges from folders to folders: what comes out, what is refused, what a kill leaves."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import merged as configs
from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.merge import Plan, merge
from ecomjax.errors import UserError
from ecomjax.experiments import merged
from ecomjax.experiments.config import from_config
from ecomjax.experiments.files import read_json
from ecomjax.hf import families
from ecomjax.hf.checkpoints import Identity, load_pretrained, save_pretrained
from ecomjax.hf.peft import CONFIG, WEIGHTS, read_adapter, write_adapter
from ecomjax.hf.peft_record import BASE
from ecomjax.models.llama import LlamaConfig
from ecomjax.typing import DoRA, LowRank

ROOT = Path(__file__).resolve().parents[2]
Q, DOWN = "layers/attn/q/kernel", "layers/mlp/down/kernel"
Q_A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def make_config(tiny_base):
    """Function (adapters, changes by dotted key) -> config on the tiny base."""

    def make(adapters, **changes):
        raw = configs.get_config()
        raw.model.path, raw.adapters = str(tiny_base), tuple(map(str, adapters))
        raw.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
        return from_config(raw)

    return make


@pytest.fixture
def pair(make_adapter):
    """Two adapters that differ in all they can: ranks, alpha, kernels, dtype, dropout."""
    first = make_adapter(1, {Q: 2, DOWN: 3}, dropout=0.1)
    return [first, make_adapter(2, {Q: 4}, alpha=3.0, dtype=ml_dtypes.bfloat16)]


def deltas(adapter):
    """{path: delta} in float64."""

    def dense(leaf):
        a, b, scale = (np.asarray(x).astype(np.float64) for x in (leaf.a, leaf.b, leaf.scale))
        return scale[..., None, None] * (a @ b)

    return {path: dense(leaf) for path, leaf in trees.flatten(adapter).items()}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_differs_is_summed_exactly(base, make_config, pair, tmp_path, capsys):
    config = make_config(pair, weights=(0.25, 0.5), method="task_arithmetic")
    merged.run(config, str(tmp_path / "run"))
    ours = read_adapter(tmp_path / "run" / "adapter", base.config, base.identity())
    one, other = (deltas(read_adapter(folder, base.config)) for folder in pair)
    expected = {Q: 0.25 * one[Q] + 0.5 * other[Q], DOWN: 0.25 * one[DOWN]}
    assert {path: leaf.dropout for path, leaf in trees.flatten(ours).items()} == {Q: 0, DOWN: 0}
    assert deltas(ours).keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(deltas(ours)[path], value, atol=1e-6 * np.abs(value).max())
    assert "task_arithmetic: 2 adapters, 4 matrices merged" in capsys.readouterr().err


def test_the_record(base, make_config, pair, tmp_path):
    config = make_config(pair, method="ties", options__rank=2, seed=7)
    merged.run(config, str(tmp_path / "run"))
    record = read_json(tmp_path / "run" / "merge.json")
    assert (record["method"], record["output"], record["seed"]) == ("ties", "adapter", 7)
    assert record["row"]["consensus"] == "sign" and "permutation" in record["row"]["laws"]
    assert record["options"]["rank"] == 2 and record["options"]["density"] == 0.5
    assert record["weights"] == [1.0, 1.0]
    assert record["base"] == dataclasses.asdict(base.identity())
    assert [one["path"] for one in record["adapters"]] == [str(folder) for folder in pair]
    assert [one["ranks"] for one in record["adapters"]] == [[2, 3], [4]]
    assert all(len(one["sha256"]) == 64 for one in record["adapters"])
    adapters = [read_adapter(folder, base.config) for folder in pair]
    found = merge(adapters, [1.0, 1.0], "ties", merged.options_of(config), seed=7)
    for path, kernel in record["kernels"].items():
        assert kernel == json.loads(json.dumps(dataclasses.asdict(found.report[path])))
    assert 0 < record["relative_error"] < 1 and {"jax", "numpy"} <= record["versions"].keys()
    assert len(read_json(tmp_path / "run" / "run.json")["starts"]) == 1


def test_how_alike_the_adapters_are_is_told(make_config, pair, tmp_path):
    merged.run(make_config([*pair, pair[0]]), str(tmp_path / "run"))
    found = read_json(tmp_path / "run" / "similarity.json")
    assert found["adapters"] == ["adapter-1", "adapter-2", "adapter-1"]
    cosine = np.asarray(found["overall"]["cosine"])
    np.testing.assert_allclose([cosine[0, 2], *np.diagonal(cosine)], 1.0, atol=1e-5)
    assert abs(cosine[0, 1]) < 0.9 and set(found["kernels"]) == {Q, DOWN}
    assert (tmp_path / "run" / "figures" / "similarity.svg").read_text().startswith("<?xml")
    merged.run(make_config(pair, similarity=False), str(tmp_path / "silent"))
    assert not (tmp_path / "silent" / "similarity.json").exists()


def test_a_merge_that_is_done_is_not_repeated(make_config, pair, tmp_path, monkeypatch):
    config = make_config(pair)
    merged.run(config, str(tmp_path / "run"))
    before = files_of(tmp_path / "run" / "adapter")
    monkeypatch.setattr(Plan, "kernel", None)
    merged.run(config, str(tmp_path / "run"))
    assert files_of(tmp_path / "run" / "adapter") == before
    change_config(lora_alpha=99)(pair[1])
    with pytest.raises(UserError, match=r"changed since it was read.*adapter-2"):
        merged.run(config, str(tmp_path / "run"))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_fused_model_is_the_one_that_is_saved_whole(
    tiny_base, base, make_config, pair, tmp_path, param_dtype
):
    """Byte by byte, where weights are stored in the dtype that they are fused in."""
    loaded = load_pretrained("tiny", str(tiny_base), param_dtype)
    save_pretrained(tmp_path / "base", loaded.config, loaded.params, loaded.tokenizer)
    model = {"model__path": str(tmp_path / "base"), "model__param_dtype": param_dtype}
    merged.run(make_config(pair, output="model", **model), str(tmp_path / "run"))
    adapter = merge([read_adapter(path, base.config) for path in pair], [1, 1], "linear").adapter
    params = jax.tree.map(jax.numpy.asarray, loaded.params)
    save_pretrained(tmp_path / "whole", loaded.config, lora.fuse(params, adapter), loaded.tokenizer)
    ours, whole = files_of(tmp_path / "run" / "model"), files_of(tmp_path / "whole")
    assert ours.keys() == whole.keys()
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run/model", "whole")]
    for name, tensor in weights[1].items():
        assert weights[0][name].dtype == tensor.dtype
        near = {"rtol": 1e-2, "atol": 1e-2} if param_dtype == "bfloat16" else {"atol": 1e-6}
        np.testing.assert_allclose(*(w[name].astype(np.float32) for w in weights), **near)
    assert load_pretrained("fused", str(tmp_path / "run" / "model")).config


def test_torch_computes_the_same_from_adapter_and_model(
    tiny_base, base, make_config, pair, tmp_path
):
    """The merged adapter beside the base in PEFT, the fused model, and ours."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for output in ("adapter", "model"):
        merged.run(make_config(pair, output=output), str(tmp_path / output))
    tokens = np.random.default_rng(1).integers(5, 500, (2, 17))

    def logits(model):
        with torch.no_grad():
            return model.eval()(torch.from_numpy(tokens)).logits.numpy()

    def load(path):
        return transformers.AutoModelForCausalLM.from_pretrained(path)

    plain, fused = logits(load(tiny_base)), logits(load(tmp_path / "model" / "model"))
    adapted = peft.PeftModel.from_pretrained(load(tiny_base), tmp_path / "adapter" / "adapter")
    one, other = (deltas(read_adapter(folder, base.config)) for folder in pair)
    torch_model = load(tiny_base)
    with torch.no_grad():
        for layer in range(base.config.layers):
            block = torch_model.model.layers[layer]
            q = (one[Q][layer] + other[Q][layer]) / 2
            block.self_attn.q_proj.weight += torch.from_numpy(q.T.astype(np.float32))
            down = one[DOWN][layer] / 2
            block.mlp.down_proj.weight += torch.from_numpy(down.T.astype(np.float32))
    expected = logits(torch_model)
    size = np.abs(expected).max()
    assert np.abs(expected - plain).max() > 1e-2 * size
    assert np.abs(fused - expected).max() < 1e-5 * size
    assert np.abs(logits(adapted) - expected).max() < 1e-5 * size


@pytest.mark.parametrize("method", ["linear", "svd", "ties"])
def test_an_rslora_adapter_alone_comes_back(base, make_config, make_adapter, tmp_path, method):
    folder = make_adapter(1, {Q: 4, DOWN: 4})
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(fields | {"use_rslora": True, "lora_alpha": 5}))
    options = {"options__density": 1.0} if method == "ties" else {}
    merged.run(make_config([folder], method=method, **options), str(tmp_path / "run"))
    ours = deltas(read_adapter(tmp_path / "run" / "adapter", base.config))
    for path, value in deltas(read_adapter(folder, base.config)).items():
        np.testing.assert_allclose(ours[path], value, atol=1e-6 * np.abs(value).max())
        assert np.abs(value).max() > 0.01


def test_weights_by_layer(base, make_config, pair, tmp_path):
    by_layer = ((1.0, 0.0), (0.5, 2.0))
    config = make_config(pair, method="concatenation", weights_by_layer=by_layer)
    merged.run(config, str(tmp_path / "run"))
    ours = deltas(read_adapter(tmp_path / "run" / "adapter", base.config))
    one, other = (deltas(read_adapter(folder, base.config)) for folder in pair)
    for layer in range(2):
        expected = by_layer[0][layer] * one[Q][layer] + by_layer[1][layer] * other[Q][layer]
        np.testing.assert_allclose(ours[Q][layer], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gradient_free", {}),
        ("gradient", {"search__by_layer": True}),
        ("gradient", {"method": "svd", "output": "model"}),
    ],
)
def test_weights_are_searched_on_validation_examples(
    base, tiny_base, make_adapter, tmp_path, kind, changes
):
    """The sum by those weights is what is written, and answers are likelier under it."""
    folders = [make_adapter(1, {Q: 2, DOWN: 3}), make_adapter(2, {Q: 4})]
    raw = configs.get_config("esci+queryner")
    raw.model.path, raw.adapters = str(tiny_base), tuple(map(str, folders))
    raw.update_from_flattened_dict(
        {
            "method": "concatenation",
            "search.kind": kind,
            "search.budget": 12,
            "search.penalty": 0.0,
            "search.examples": 4,
            "data.validation_size": 8,
        }
        | {key.replace("__", "."): value for key, value in changes.items()}
    )
    run = tmp_path / "run"
    merged.run(from_config(raw), str(run))
    record = read_json(run / "merge.json")
    objectives, weights = record["search"]["objectives"], np.asarray(record["weights"])
    assert record["search"]["loss"] == min(objectives) < objectives[0]
    assert len(objectives) <= 12 and weights.shape == (
        (2, 2) if "search__by_layer" in changes else (2,)
    )
    assert np.abs(weights).max() > 0
    one, other = (deltas(read_adapter(folder, base.config)) for folder in folders)
    by_layer = np.broadcast_to(weights.reshape(2, -1), (2, 2))[..., None, None]
    if "output" in changes:
        # Of this kernel the sum has no larger rank than what it is brought to.
        expected = by_layer[0] * one[DOWN]
        before, after = (
            trees.flatten(load_pretrained("x", str(folder)).params)[DOWN]
            for folder in (tiny_base, run / "model")
        )
        got = (after - before).reshape(expected.shape)
    else:
        expected = by_layer[0] * one[Q] + by_layer[1] * other[Q]
        got = deltas(read_adapter(run / "adapter", base.config))[Q]
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max() + 1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search.kind": "gradient_free", "search.budget": 5}, "budget 5 for 2 weights"),
        ({"search.kind": "gradient", "search.penalty": 1e6}, "no weights suit"),
    ],
)
def test_a_search_that_finds_nothing_writes_nothing(
    tiny_base, make_adapter, tmp_path, changes, message
):
    folders = [make_adapter(1, {Q: 2}), make_adapter(2, {Q: 4})]
    raw = configs.get_config("esci")
    raw.model.path, raw.adapters = str(tiny_base), tuple(map(str, folders))
    raw.update_from_flattened_dict(
        {"method": "svd", "search.examples": 2, "data.validation_size": 4} | changes
    )
    with pytest.raises(UserError, match=message):
        merged.run(from_config(raw), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_linear", "slerp", "ties"])
def test_without_weights_the_same_adapter_twice_is_itself(
    base, make_config, make_adapter, tmp_path, method
):
    folder = make_adapter(1)
    read = {"linear", "task_arithmetic", "slerp"}.isdisjoint({method})
    options = {"options__density": 1.0} if read else {}
    for number, more in enumerate([{}] if method == "slerp" else [{}, {"normalise": "count"}]):
        changes = options | {f"options__{key}": value for key, value in more.items()}
        config = make_config([folder, folder], method=method, **changes)
        merged.run(config, str(tmp_path / f"run{number}"))
        ours = deltas(read_adapter(tmp_path / f"run{number}" / "adapter", base.config))
        for path, value in deltas(read_adapter(folder, base.config)).items():
            np.testing.assert_allclose(ours[path], value, atol=1e-5 * np.abs(value).max())


def test_run_folders_are_adapters_too_and_bases_go_along(base, make_config, pair, tmp_path):
    (tmp_path / "run-1").mkdir()
    pair[0].rename(tmp_path / "run-1" / "adapter")
    merged.run(make_config([tmp_path / "run-1", pair[1]]), str(tmp_path / "one"))
    merged.run(make_config([tmp_path / "one"]), str(tmp_path / "two"))
    origins = [read_json(tmp_path / name / "adapter" / BASE) for name in ("one", "two")]
    assert origins == [read_json(pair[1] / BASE)] * 2
    reference = read_json(tmp_path / "two" / "adapter" / CONFIG)["base_model_name_or_path"]
    assert reference == base.path


def test_adapters_of_peft_pass_with_a_note(make_config, pair, tmp_path, capsys):
    (pair[0] / BASE).unlink()
    merged.run(make_config(pair), str(tmp_path / "one"))
    assert f"{pair[0]} does not say which base" in capsys.readouterr().err
    assert (tmp_path / "one" / "adapter" / BASE).exists()
    (pair[1] / BASE).unlink()
    merged.run(make_config(pair), str(tmp_path / "none"))
    assert not (tmp_path / "none" / "adapter" / BASE).exists()
    assert read_json(tmp_path / "none" / "merge.json")["base"] is None


def other_base(folder):
    fields = read_json(folder / BASE) | {"name": "other", "fingerprint": "1" * 64}
    (folder / BASE).write_text(json.dumps(fields))


def change_config(**changes):
    def change(folder):
        fields = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(fields | changes))

    return change


def change_tensor(tensor):
    def change(folder):
        save_file(load_file(folder / WEIGHTS) | {Q_A0: tensor}, folder / WEIGHTS)

    return change


def cut(folder):
    os.truncate(folder / WEIGHTS, 1000)


def keep(folder):
    pass


MISTAKES = {
    "another base": (other_base, {}, ["of base 'tiny'", "of 'other'", "any_base", "adapter-2"]),
    "another base than the model": (
        lambda folder: [other_base(folder), other_base(folder.parent / "adapter-1")],
        {"output": "model"},
        ["the model is of base", "'other'", "adapter-1"],
    ),
    "another shape": (
        change_tensor(np.zeros((4, 15), np.float32)),
        {},
        ["shape [4, 15], config and base say [4, 16]", "adapter-2"],
    ),
    "NaN": (
        change_tensor(np.full((4, 16), np.nan, ml_dtypes.bfloat16)),
        {},
        ["NaN", "q_proj", "adapter-2"],
    ),
    "truncated": (cut, {}, ["truncated", "adapter-2"]),
    "DoRA": (change_config(use_dora=True), {}, ["adapter-2"]),
    "modules_to_save": (
        change_config(modules_to_save=["embed_tokens"]),
        {},
        ["modules_to_save", "adapter-2"],
    ),
    "bias": (change_config(bias="all"), {}, ["'bias' is 'all'", "adapter-2"]),
    "unknown field": (change_config(use_nora=3), {}, ["'use_nora' is 3", "adapter-2"]),
    "weights": (keep, {"weights": (1.0,)}, ["1 weights for 2 adapters", "config.weights"]),
    "both weights": (
        keep,
        {"weights": (1.0, 1.0), "weights_by_layer": ((1.0, 1.0),) * 2},
        ["config.weights_by_layer"],
    ),
    "weights of other layers": (
        keep,
        {"weights_by_layer": ((1.0,) * 3,) * 2},
        ["3 weights by layer, the kernel has 2 layers"],
    ),
    "weights that cancel": (keep, {"weights": (1.0, -1.0)}, ["weights add up to 0.0"]),
    "a search without tasks": (
        keep,
        {"search__kind": "gradient", "method": "svd"},
        ["no tasks", "config.tasks", "configs/merged.py:TASK"],
    ),
    "tasks without a search": (
        keep,
        {"search__budget": 10},
        ["only a search of weights reads it", "config.search", "config.search.kind"],
    ),
    "a quantized base": (
        keep,
        {"model__quantization": "nf4", "output": "model"},
        ["not quantized", "config.model.quantization"],
    ),
    "a dropout that is none": (change_config(lora_dropout=5.0), {}, ["'lora_dropout' is 5.0"]),
    "a pattern that ends no name": (
        change_config(rank_pattern={"(?i)q_proj": 4}),
        {},
        ["broken pattern", "adapter-2"],
    ),
    "a kernel that one lacks": (
        keep,
        {"method": "slerp"},
        [f"adapter 1 lacks kernel '{DOWN}'", "slerp"],
    ),
    "a search beside weights": (
        keep,
        {"search__kind": "gradient", "method": "svd", "weights": (1.0, 1.0)},
        ["config.weights are given: config.search.kind"],
    ),
    "a search of a mean": (keep, {"search__kind": "gradient"}, ["'linear' is another", "svd"]),
    "no adapters": (keep, {"adapters": ()}, ["no adapters", "config.adapters"]),
    "one for slerp": (keep, {"one": True, "method": "slerp"}, ["1 adapters", "slerp"]),
    "no folder": (keep, {"adapters": ("no/such",)}, ["no such folder: no/such"]),
    "no adapter": (
        keep,
        {"adapters": ("configs",)},
        ["no adapter: configs", "adapter_config.json"],
    ),
    "unknown method": (keep, {"method": "tiez"}, ["unknown method 'tiez'", "ties"]),
    "option": (keep, {"options__density": 0.2}, ["'linear' does not", "config.options.density"]),
    "rank": (keep, {"method": "concatenation", "options__rank": 2}, ["config.options.rank"]),
    "unknown model": (
        keep,
        {"model__path": "", "model__name": "smollm9"},
        ["shape of model 'smollm9'", "smollm3_3b"],
    ),
    "no weights of the base": (
        keep,
        {"output": "model", "model__path": "no/base"},
        ["no folder or .gguf file: no/base"],
    ),
}


@pytest.mark.parametrize(("change", "changes", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_and_can_be_mended(make_config, pair, tmp_path, change, changes, told):
    changes = dict(changes)
    adapters = changes.pop("adapters", pair[:1] if changes.pop("one", False) else pair)
    change(pair[1])
    with pytest.raises(UserError) as caught:
        merged.run(make_config(adapters, **changes), str(tmp_path / "run"))
    line = str(caught.value)
    assert "\n" not in line and all(part in line for part in told), line
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "model").exists()
    # Nothing stands in the way of the same folder with a mended config.
    merged.run(make_config(pair[:1]), str(tmp_path / "run"))


def test_any_base_lets_other_bases_pass(base, make_config, pair, tmp_path):
    other_base(pair[1])
    for output in ("adapter", "model"):
        merged.run(make_config(pair, any_base=True, output=output), str(tmp_path / output))
        assert read_json(tmp_path / output / "merge.json")["any_base"]
    record = read_json(tmp_path / "adapter" / "adapter" / BASE)
    assert record["fingerprint"] == base.identity().fingerprint


def test_dora_is_refused_by_name(base, make_config, pair, tmp_path):
    leaf = trees.flatten(read_adapter(pair[0], base.config))[Q]
    dora = DoRA(leaf.a, leaf.b, leaf.scale, np.ones((2, 16), np.float32))
    write_adapter(pair[0], trees.unflatten({Q: dora}), base.config, base.identity())
    with pytest.raises(UserError, match=r"is DoRA.*adapter-1; fuse it with launch\.export"):
        merged.run(make_config(pair), str(tmp_path / "run"))


@pytest.mark.parametrize("output", ["adapter", "model"])
def test_what_no_merge_has_made_is_not_replaced(make_config, pair, tmp_path, output):
    target = tmp_path / "run" / output
    target.mkdir(parents=True)
    (target / WEIGHTS).write_text("mine")
    with pytest.raises(UserError, match="what no merge has made"):
        merged.run(make_config(pair, output=output), str(tmp_path / "run"))
    assert files_of(target) == {WEIGHTS: b"mine"} and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("output", ["adapter", "model"])
def test_an_interrupt_leaves_nothing_half_written(make_config, pair, tmp_path, monkeypatch, output):
    done = []

    def interrupt(self, path, on_matrix):
        if done:
            raise KeyboardInterrupt
        done.append(path)
        return kernel(self, path, on_matrix)

    kernel = Plan.kernel
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "kernel", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merged.run(make_config(pair, output=output), str(tmp_path / "run"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}
    merged.run(make_config(pair, output=output), str(tmp_path / "run"))
    assert (tmp_path / "run" / output).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rank"), [("concatenation", 400), ("ties", 8)])
def test_no_more_is_held_than_the_adapters_and_a_few_matrices(
    make_config, tmp_path, monkeypatch, method, rank
):
    """The whole merge; two adapters, of which concatenation makes one as large as both.

    Telling how alike they are takes bases of their spaces, which at such ranks are matrices too.
    """
    config = LlamaConfig(50, 1024, 4, 4, 4, 256, 1536)
    monkeypatch.setattr(merged, "load_config", lambda *_: config)
    rng, folders = np.random.default_rng(0), [tmp_path / "one", tmp_path / "two"]
    table = families.rule_table(config)
    for folder in folders:
        leaves = {}
        for rule in table.rules:
            if rule.transposed and rule.ours.startswith("layers/"):
                stack, (d_out, d_in) = rule.stack(table.sizes), rule.shape(table.sizes)
                a = rng.standard_normal((*stack, d_in, rank), np.float32)
                b = rng.standard_normal((*stack, rank, d_out), np.float32)
                leaves[rule.ours] = LowRank(a, b, np.ones(stack, np.float32))
        base = Identity("none", "none", "", "0" * 64, "0" * 64)
        write_adapter(folder, trees.unflatten(leaves), config, base)
    held = 2 * trees.bytes_of(leaves)
    kernel = 4 * 2 * rank * (1024 + 1536) * 4 if method == "concatenation" else 0
    del leaves, a, b
    tracemalloc.start()
    try:
        merged.run(make_config(folders, method=method, similarity=False), str(tmp_path / "run"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # At the rank of concatenation one merged kernel is larger than matrices, but not all are held.
    # Modules and caches that come up on the way take less than a matrix.
    assert held < peak < held + (2 + 2) * 1024 * 1536 * 4 + 2 * kernel + 2**22


KILLED = """
import os, signal, sys
from pathlib import Path
from configs import merged as configs
from ecomjax.adapters import merge
from ecomjax.experiments import merged
from ecomjax.experiments.config import from_config
from ecomjax.hf import checkpoints, files, peft

base, output, workdir, moment, *adapters = sys.argv[1:]

def killing(module, name, number, after=False):
    kept, calls = getattr(module, name), []
    def call(*args, **kwargs):
        calls.append(0)
        result = kept(*args, **kwargs) if after else None
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result if after else kept(*args, **kwargs)
    setattr(module, name, call)

if moment == "first kernel":
    killing(merge.Plan, "kernel", 1, after=True)
elif moment == "second kernel":
    killing(merge.Plan, "kernel", 2)
elif moment == "weights complete":
    killing(peft, "replace_file", 1)
    killing(checkpoints, "replace_file", 1)
elif moment == "before the folder moves":
    killing(files.os, "rename", 1)
elif moment in ("after the folder moved", "between two folders"):
    killing(files.os, "rename", 1, after=True)
elif moment == "before the record":
    killing(merged, "write_json", 1)
raw = configs.get_config()
raw.model.path, raw.output, raw.adapters = base, output, tuple(adapters)
merged.run(from_config(raw), workdir)
"""
MOMENTS = {
    "first kernel": False,
    "second kernel": False,
    "weights complete": False,
    "before the folder moves": False,
    "after the folder moved": True,
    "between two folders": False,
    "before the record": True,
}
"""And whether the folder is then there; between two, the old one has just been moved away."""


@pytest.mark.slow
@pytest.mark.parametrize("output", ["adapter", "model"])
def test_killed_at_any_moment_the_folder_is_absent_or_complete(
    tiny_base, make_config, pair, tmp_path, output
):
    """The same folder is killed at each moment in turn, and then merged."""
    merged.run(make_config(pair, output=output), str(tmp_path / "whole"))
    expected = files_of(tmp_path / "whole" / output)
    run = tmp_path / "run"
    for moment, complete in MOMENTS.items():
        arguments = [tiny_base, output, run, moment, *pair]
        done = subprocess.run(
            [sys.executable, "-c", KILLED, *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == -signal.SIGKILL, (moment, done.stderr)
        assert not (run / "merge.json").exists()
        assert (run / output).exists() == complete, moment
        if complete:
            assert files_of(run / output) == expected
        left = any(path.name.startswith(f".{output}.") for path in run.iterdir())
        assert left == (moment != "before the record")
    merged.run(make_config(pair, output=output), str(run))
    assert files_of(run / output) == expected and (run / "merge.json").exists()
    assert not any(path.name.startswith(f".{output}.") for path in run.iterdir())
