import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax import trees
from ecomjax.typing import LowRank

keys = st.text("abz_0.", min_size=1, max_size=3)
nested = st.recursive(st.integers(), lambda t: st.dictionaries(keys, t, min_size=1), max_leaves=9)
tree_dicts = st.dictionaries(keys, nested)


def low_rank(shape=()):
    return LowRank(a=np.ones((*shape, 4, 2)), b=np.ones((*shape, 2, 3)), scale=np.ones(shape))


@given(tree_dicts)
def test_unflatten_inverts_flatten(tree):
    flat = trees.flatten(tree)
    assert trees.unflatten(flat) == tree
    assert not any(isinstance(leaf, dict) for leaf in flat.values())


def test_flatten_joins_keys_in_the_order_of_the_tree():
    tree = {"z": {"b": 1, "a": {"c": 2}}, "y": 3}
    assert list(trees.flatten(tree).items()) == [("z/b", 1), ("z/a/c", 2), ("y", 3)]


def test_structs_are_leaves():
    leaf = low_rank()
    assert trees.flatten({"q": {"kernel": leaf}}) == {"q/kernel": leaf}
    assert trees.map_leaves(lambda x: x.scale, {"q": {"kernel": leaf}}) == {
        "q": {"kernel": leaf.scale}
    }


def test_select_matches_whole_paths():
    tree = {"layers": {"q": {"kernel": 1}, "k": {"kernel": 2}}, "q": {"kernel": 3}}
    assert trees.select(tree, r"layers/.*/kernel") == {"layers/q/kernel": 1, "layers/k/kernel": 2}
    assert trees.select(tree, r"q/kernel") == {"q/kernel": 3}
    assert trees.select(tree, r"layers/q") == {}


def test_map_leaves_pairs_leaves_by_path():
    left, right = {"a": {"b": 1, "c": 2}}, {"a": {"c": 30, "b": 10}, "more": 5}
    assert trees.map_leaves(lambda x, y: x - y, left, right) == {"a": {"b": -9, "c": -28}}
    with pytest.raises(KeyError, match="a/b"):
        trees.map_leaves(lambda x, y: x, left, {"a": {"c": 1}})


def test_sizes_of_arrays_and_of_shapes():
    tree = {"a": np.zeros((3, 4), np.float32), "b": {"c": jnp.zeros((), jnp.bfloat16)}}
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))
    for form in (tree, shapes):
        assert trees.count(form) == 13
        assert trees.bytes_of(form) == 3 * 4 * 4 + 2
    assert trees.count({"kernel": low_rank((5,))}) == 5 * (4 * 2 + 2 * 3 + 1)


def test_layers_stack_by_number():
    """Layer 10 comes after layer 9, not after layer 1; the rest of the tree stays."""
    tree = {f"layers_{i}": {"q": {"kernel": np.float32([i, i])}} for i in reversed(range(12))}
    tree |= {"embed": {"embedding": np.ones(3)}, "layer_norm": {"scale": np.ones(2)}}
    stacked = trees.stack_layers(tree)
    assert set(stacked) == {"layers", "embed", "layer_norm"}
    np.testing.assert_array_equal(stacked["layers"]["q"]["kernel"][:, 0], np.arange(12))
    back = trees.unstack_layers(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_layers_of_structs_stack_field_by_field():
    stacked = trees.stack_layers({f"layers_{i}": {"kernel": low_rank()} for i in range(2)})
    assert stacked["layers"]["kernel"].a.shape == (2, 4, 2)
    assert stacked["layers"]["kernel"].scale.shape == (2,)


def test_trees_without_layers_stay():
    tree = {"embed": {"embedding": 1}}
    assert trees.stack_layers(tree) == tree
    assert trees.unstack_layers(tree) == tree
