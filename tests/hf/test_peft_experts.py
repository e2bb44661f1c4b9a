"""Adapters of experts, which transformers 5 holds as parameters and 4 as modules."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.hf import families
from ecomjax.hf.checkpoints import Identity
from ecomjax.hf.peft import WEIGHTS, read_adapter, write_adapter
from ecomjax.hf.peft_config import CONFIG
from ecomjax.hf.peft_record import BASE
from ecomjax.models.llama import LlamaConfig
from ecomjax.typing import DoRA, LowRank

L, E, D, F, R = 2, 3, 24, 40, 2
CONFIG_OF_MODEL = LlamaConfig(
    vocab_size=67,
    width=D,
    layers=L,
    heads=3,
    kv_heads=3,
    head_dim=8,
    ffn=F,
    model_type="mixtral",
    experts=E,
    experts_per_token=2,
)
IDENTITY = Identity("tiny", "local", "tiny", "0" * 64, "0" * 64)
MLP = "layers/mlp/"
Q, ROUTER = "layers/attn/q/kernel", MLP + "router/kernel"
GATE, UP, DOWN = (f"{MLP}experts/{name}/kernel" for name in ("gate", "up", "down"))
OLD = {
    Q: "self_attn.q_proj",
    ROUTER: "block_sparse_moe.gate",
    GATE: "block_sparse_moe.experts.{}.w1",
    UP: "block_sparse_moe.experts.{}.w3",
    DOWN: "block_sparse_moe.experts.{}.w2",
}


def draw(*paths, rank=R):
    """An adapter of these kernels, random."""
    table, rng = families.rule_table(CONFIG_OF_MODEL), np.random.default_rng(0)
    rules = {rule.ours: rule for rule in table.rules}
    leaves = {}
    for path in paths or OLD:
        d_out, d_in = rules[path].shape(table.sizes)
        stack = rules[path].stack(table.sizes)
        a = rng.standard_normal((*stack, d_in, rank), np.float32)
        b = rng.standard_normal((*stack, rank, d_out), np.float32)
        leaves[path] = LowRank(a, b, np.full(stack, 1.5, np.float32), dropout=0.1)
    return trees.unflatten(leaves)


def replaced(adapter, path, **fields):
    flat = trees.flatten(adapter)
    return trees.unflatten(flat | {path: flat[path].replace(**fields)})


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    "paths",
    [(), (GATE, UP), (GATE, DOWN), (UP,), (DOWN,), (Q, ROUTER), (Q,)],
    ids=["all", "gate and up", "gate and down", "up", "down", "router", "attention"],
)
def test_round_trip(tmp_path, paths):
    """Whatever part of a joined parameter is adapted."""
    adapter = draw(*paths)
    write_adapter(tmp_path / "adapter", adapter, CONFIG_OF_MODEL, IDENTITY)
    assert_same(read_adapter(tmp_path / "adapter", CONFIG_OF_MODEL, IDENTITY), adapter)


def test_layout(tmp_path):
    """Rows of A expert by expert, columns of B rank by rank; b of gate and up block-diagonal."""
    adapter = draw()
    write_adapter(tmp_path / "adapter", adapter, CONFIG_OF_MODEL, IDENTITY)
    tensors, flat = load_file(tmp_path / "adapter" / WEIGHTS), trees.flatten(adapter)
    module = "base_model.model.model.layers.1.mlp.experts"
    a = tensors[f"{module}.base_layer.lora_A.weight"].reshape(E, 2 * R, D)
    b = tensors[f"{module}.base_layer.lora_B.weight"].reshape(2 * F, 2 * R, E)
    for expert in range(E):
        delta = b[..., expert] @ a[expert]
        for half, path in enumerate((GATE, UP)):
            ours = (flat[path].a[1, expert] @ flat[path].b[1, expert]).T
            np.testing.assert_allclose(delta[half * F : half * F + F], ours, rtol=1e-5, atol=1e-5)
    assert tensors[f"{module}.lora_A.weight"].shape == (E * R, F)
    fields = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert fields["target_modules"] == ["q_proj"] and fields["lora_dropout"] == 0
    assert fields["target_parameters"] == [
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
        "mlp.gate.weight",
    ]
    assert fields["rank_pattern"] == {"mlp.experts.gate_up_proj": 2 * R}
    record = json.loads((tmp_path / "adapter" / BASE).read_text())
    assert record["naming"] == "transformers-5" and record["dropout"] == 0.1
    assert record["ranks"] == {GATE: [R] * L, UP: [R] * L}


def test_what_was_trained_further_is_read_whole(tmp_path):
    """Where B is no longer block-diagonal, the ranks in the record do not tell the parts."""
    adapter = draw(GATE, UP)
    write_adapter(tmp_path / "adapter", adapter, CONFIG_OF_MODEL, IDENTITY)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    name = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
    b = np.random.default_rng(1).standard_normal(tensors[name].shape, np.float32)
    save_file(tensors | {name: b}, tmp_path / "adapter" / WEIGHTS)
    gate = trees.flatten(read_adapter(tmp_path / "adapter", CONFIG_OF_MODEL, IDENTITY))[GATE]
    np.testing.assert_array_equal(gate.ranks, [[2 * R] * E, [R] * E])
    np.testing.assert_array_equal(gate.b[0, 1], b.reshape(2 * F, 2 * R, E)[:F, :, 1].T)
    np.testing.assert_array_equal(gate.a[1, ..., :R], trees.flatten(adapter)[GATE].a[1])


def write_modules(folder, adapter, dropout, record):
    """An adapter with a module for each expert, as PEFT wrote for transformers 4."""
    write_adapter(folder, adapter, CONFIG_OF_MODEL, IDENTITY)
    tensors = {}
    for path, leaf in trees.flatten(adapter).items():
        for index in np.ndindex(leaf.scale.shape):
            module = f"base_model.model.model.layers.{index[0]}.{OLD[path].format(*index[1:])}"
            tensors[module + ".lora_A.weight"] = np.ascontiguousarray(leaf.a[index].T)
            tensors[module + ".lora_B.weight"] = np.ascontiguousarray(leaf.b[index].T)
    save_file(tensors, folder / WEIGHTS)
    fields = json.loads((folder / CONFIG).read_text())
    fields |= {"target_modules": ["q_proj", "gate", "w1", "w2", "w3"], "target_parameters": None}
    fields |= {"rank_pattern": {}, "alpha_pattern": {}, "r": R, "lora_alpha": 1.5 * R}
    (folder / CONFIG).write_text(json.dumps(fields | {"lora_dropout": dropout}))
    written = json.loads((folder / BASE).read_text())
    written = {k: v for k, v in written.items() if k not in ("naming", "dropout", "ranks")}
    (folder / BASE).write_text(json.dumps(written | record))


@pytest.mark.parametrize("record", [{}, {"naming": "transformers-4"}], ids=["plain", "recorded"])
def test_a_module_for_each_expert_is_read(tmp_path, record):
    adapter = draw()
    write_modules(tmp_path / "adapter", adapter, 0.1, record)
    assert_same(read_adapter(tmp_path / "adapter", CONFIG_OF_MODEL, IDENTITY), adapter)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_peft_turns_modules_into_what_is_written(tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings = transformers.MixtralConfig(**families.config_to_hf(CONFIG_OF_MODEL), **special)
    write_adapter(tmp_path / "new", draw(), CONFIG_OF_MODEL, IDENTITY)
    write_modules(tmp_path / "old", draw(), 0.0, {})
    states = []
    for folder in ("new", "old"):
        model = transformers.MixtralForCausalLM(settings)
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / folder)
        states.append(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    assert states[0].keys() == states[1].keys() and len(states[0]) == 8 * L
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        (UP, {"scale": np.full((L, E), 2.0, np.float32)}, f"'{GATE}' and '{UP}' differ in scale"),
        (
            DOWN,
            {"scale": np.arange(L * E, dtype=np.float32).reshape(L, E)},
            f"experts of one layer of '{DOWN}' differ in scale",
        ),
        (
            DOWN,
            {"ranks": np.tile(np.array([R, R, 1], np.int32), (L, 1))},
            f"experts of one layer of '{DOWN}' differ in rank",
        ),
        (DOWN, {"dropout": 0.0}, "dropout rates"),
    ],
)
def test_refused_on_writing(tmp_path, path, fields, message):
    with pytest.raises(UserError, match=message):
        write_adapter(tmp_path / "a", replaced(draw(), path, **fields), CONFIG_OF_MODEL, IDENTITY)
    assert not (tmp_path / "a").exists()


def test_dora_of_experts_is_refused(tmp_path):
    def with_magnitude(leaf):
        magnitude = np.ones((*leaf.scale.shape, leaf.b.shape[-1]), np.float32)
        return DoRA(leaf.a, leaf.b, leaf.scale, magnitude)

    adapter = trees.map_leaves(with_magnitude, draw(Q, DOWN))
    with pytest.raises(UserError, match=r"DoRA of '.*down_proj', which is no linear layer"):
        write_adapter(tmp_path / "adapter", adapter, CONFIG_OF_MODEL, IDENTITY)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (
            CONFIG,
            {"target_parameters": ["mlp.experts.gate_proj"]},
            "target 'mlp.experts.gate_proj'",
        ),
        (CONFIG, {"target_modules": ["q_proj", "w1"]}, "target 'w1' is no linear layer"),
        (CONFIG, {"rank_pattern": {}}, r"experts\.base_layer\.lora_A.* \[12, 24\], .* \[6, 24\]"),
        (CONFIG, {"target_parameters": ["gate_up_proj"]}, r"experts\.lora_A.weight' has shape"),
        (BASE, {"naming": "transformers-6"}, "or of a newer version"),
        (BASE, {"ranks": {GATE: 3}}, "not the record of an adapter"),
    ],
)
def test_refused_on_reading(tmp_path, file, fields, message):
    folder = tmp_path / "adapter"
    write_adapter(folder, draw(), CONFIG_OF_MODEL, IDENTITY)
    changed = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps(changed))
    with pytest.raises(UserError, match=message):
        read_adapter(folder, CONFIG_OF_MODEL, IDENTITY)
