"""Rule tables: layouts as einops would read them, both ways strict."""

import weakref
from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ecomjax import sharding, trees
from ecomjax.errors import UserError
from ecomjax.hf import llama
from ecomjax.hf.rules import Rule, RuleTable
from ecomjax.models import registry

SIZES = {"L": 2, "E": 3, "N": 4, "H": 2, "D": 5, "F": 7}
TABLE = RuleTable(
    rules=(
        Rule("h.{layer}.q", "layers/q", "(N H) D -> D N H"),
        Rule("h.{layer}.moe.{expert}.up", "layers/up", "F D -> D F"),
        Rule("norm", "norm", "D -> D"),
    ),
    sizes=SIZES,
    copies={"twin": "norm"},
    ignored=r"const\d",
)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    shapes = {f"h.{i}.q": (8, 5) for i in range(2)} | {"norm": (5,)}
    shapes |= {f"h.{i}.moe.{j}.up": (7, 5) for i in range(2) for j in range(3)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_layout_splits_transposes_and_stacks(tensors):
    params = TABLE.import_params(tensors, "float32", "test")
    for layer in range(2):
        expected = tensors[f"h.{layer}.q"].reshape(4, 2, 5).transpose(2, 0, 1)
        np.testing.assert_array_equal(params["layers"]["q"][layer], expected)
        for expert in range(3):
            expected = tensors[f"h.{layer}.moe.{expert}.up"].T
            np.testing.assert_array_equal(params["layers"]["up"][layer, expert], expected)


def test_export_is_the_inverse(tensors):
    exported = dict(TABLE.export_tensors(TABLE.import_params(tensors, "float32", "test")))
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_import_casts(tensors, stored, dtype):
    held = {name: tensor.astype(stored) for name, tensor in tensors.items()}
    norm = TABLE.import_params(held, dtype, "test")["norm"]
    assert norm.dtype == dtype
    np.testing.assert_array_equal(norm, held["norm"].astype(dtype))


def test_what_carries_nothing_may_be_there(tensors):
    extra = {"const1": np.zeros(1), "twin": tensors["norm"]}
    TABLE.import_params(tensors | extra, "float32", "test")


class Lazy(Mapping):
    """Makes each tensor when it is read; sees to it that those read before are gone."""

    def __init__(self, shapes):
        self.shapes, self.reads, self.last = shapes, [], None

    def __getitem__(self, name):
        assert self.last is None or self.last() is None, f"{self.reads[-1]} is still held"
        tensor = np.random.default_rng(len(name)).standard_normal(self.shapes[name], np.float32)
        self.last = weakref.ref(tensor)
        self.reads.append(name)
        return tensor

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


LARGE = RuleTable(
    rules=(
        Rule("h.{layer}.q", "layers/q", "(N H) D -> D N H"),
        Rule("h.{layer}.moe.{expert}.up", "layers/up", "F D -> D F"),
        Rule("embed", "embed", "V D -> V D"),
    ),
    sizes={"L": 2, "E": 4, "N": 8, "H": 16, "D": 512, "F": 256, "V": 1024},
)
SPECS = {
    "layers": {
        "q": PartitionSpec(None, "fsdp", "tensor", None),
        "up": PartitionSpec(None, "expert", "fsdp", "tensor"),
    },
    "embed": PartitionSpec("tensor"),
}


@pytest.fixture
def lazy():
    named = {name: rule for rule in LARGE.rules for _, name in rule.names(LARGE.sizes)}
    return Lazy({name: rule.shape(LARGE.sizes) for name, rule in named.items()})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_to_devices(lazy, dtype):
    expected = LARGE.import_params(lazy, dtype, "test")
    # The checks of annotations read the first one too.
    names = ["h.1.q", "h.1.moe.3.up", "embed"]
    assert [lazy.reads.count(name) for name in names] == [1, 1, 1]
    lazy.reads.clear()
    shardings = sharding.shardings(SPECS, sharding.make_mesh(1, 2, 2, 2))
    params = LARGE.import_params(lazy, dtype, "test", shardings)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    for path, leaf in trees.flatten(params).items():
        assert leaf.dtype == dtype
        assert leaf.sharding == trees.flatten(shardings)[path]
    # An expert is read for its own devices only, in parts of two by two; the table in two parts.
    assert [lazy.reads.count(name) for name in names] == [4, 4, 2]


def test_import_to_devices_holds_one_part_and_one_tensor(lazy, monkeypatch):
    """That no two tensors are held is what `Lazy` sees to."""
    make, put, sizes, last = RuleTable._part, jax.device_put, [], lambda: None

    def part(*args):
        nonlocal last
        assert last() is None
        made = make(*args)
        last = weakref.ref(made)
        sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(RuleTable, "_part", part)
    # On CPU a device shares the memory of what it is given.
    monkeypatch.setattr(jax, "device_put", lambda x, device: put(x.copy(), device))
    shardings = sharding.shardings(SPECS, sharding.make_mesh(1, 2, 2, 2))
    params = LARGE.import_params(lazy, "float32", "test", shardings)
    leaves = jax.tree.leaves(params)
    assert set(sizes) == {leaf.addressable_shards[0].data.nbytes for leaf in leaves}
    assert sum(sizes) == trees.bytes_of(params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": None}, "missing tensor 'norm'"),
        ({"h.0.q": None, "h.1.q": None}, "missing tensor 'h.0.q' and 1 more"),
        ({"h.2.q": np.zeros((8, 5))}, "unknown tensor 'h.2.q'"),
        ({"norm": np.zeros(6)}, "'norm' has shape [6], the config says [5]"),
        ({"h.1.q": np.zeros((5, 8))}, "'h.1.q' has shape [5, 8], the config says [8, 5]"),
        ({"norm": np.zeros(5, np.int32)}, "'norm' has dtype int32"),
        ({"twin": np.zeros(5, np.float32)}, "'twin' differs from 'norm'"),
    ],
)
def test_import_refuses(tensors, change, message):
    held = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    with pytest.raises(UserError) as error:
        TABLE.import_params(held, "float32", "here.safetensors")
    assert message in str(error.value)
    assert "here.safetensors" in str(error.value)


def test_export_refuses_another_tree(tensors):
    params = TABLE.import_params(tensors, "float32", "test")
    with pytest.raises(ValueError, match="bias"):
        list(TABLE.export_tensors(params | {"bias": np.zeros(5)}))
    with pytest.raises(ValueError, match="norm"):
        list(TABLE.export_tensors(params | {"norm": np.zeros(6)}))


def test_llama_table_covers_the_model(config):
    """Every leaf of the model has a rule, of its shape."""
    shapes, axes = registry.describe(registry.build(config))
    table = llama.rule_table(config)
    expected = {rule.ours: rule.our_shape(table.sizes) for rule in table.rules}
    assert {path: leaf.shape for path, leaf in trees.flatten(shapes).items()} == expected
    inputs = {path: a.inputs for path, a in trees.flatten(axes).items()}
    matrices = {rule.ours: rule.linear or rule.embedding for rule in table.rules}
    assert matrices == {path: count > 0 for path, count in inputs.items()}
