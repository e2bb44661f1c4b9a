import jax
import pytest

from ecomjax import trees
from ecomjax.adapters import rules as rules_module
from ecomjax.adapters.rules import LoraRule
from ecomjax.errors import UserError
from ecomjax.typing import ParamAxes

AXES = {
    "embed": {"embedding": ParamAxes(("vocab", "embed"), 1)},
    "position_embed": {"embedding": ParamAxes(("positions", "embed"))},
    "layers": {
        "norm": {"scale": ParamAxes(("layers", "embed"))},
        "q": {"kernel": ParamAxes(("layers", "embed", "heads", "head_dim"), 1)},
        "o": {"kernel": ParamAxes(("layers", "heads", "head_dim", "embed"), 2)},
    },
    "lm_head": {"kernel": ParamAxes(("embed", "vocab"), 1)},
}
SIZES = {"layers": 3, "embed": 6, "heads": 2, "head_dim": 4, "vocab": 9, "ffn": 5, "positions": 7}


def shapes_of(axes):
    def shape(leaf):
        return jax.ShapeDtypeStruct([SIZES[name] for name in leaf.names], "float32")

    return trees.map_leaves(shape, axes)


def resolve(rules, axes=AXES):
    return rules_module.resolve(rules, axes, shapes_of(axes))


def alone(rules, axes=AXES):
    """The rules of kernels whose layers all have the same."""
    found = resolve(rules, axes)
    assert all(len(set(own)) == 1 for own in found.values())
    return {path: own[0] for path, own in found.items()}


def test_default_is_every_linear_but_the_head():
    rule = LoraRule()
    assert alone([rule]) == {"layers/q/kernel": rule, "layers/o/kernel": rule}


def test_default_finds_every_stack_and_leaves_routers_out():
    kernel = {"kernel": ParamAxes(("layers", "embed", "ffn"), 1)}
    block = {"mlp": {"router": kernel, "router_free": kernel, "experts": {"up": kernel}}}
    axes = {"encoder": {"layers": block}, "decoder": {"layers": block}, "router": block}
    paths = ("mlp/router_free/kernel", "mlp/experts/up/kernel")
    expected = {f"{stack}/layers/{path}" for stack in ("encoder", "decoder") for path in paths}
    assert set(alone([LoraRule()], axes)) == expected


def test_the_last_rule_that_matches_wins():
    wide, narrow = LoraRule(".*/kernel", rank=8), LoraRule(".*/q/kernel", rank=2)
    both = {"layers/q/kernel": narrow, "layers/o/kernel": wide, "lm_head/kernel": wide}
    assert alone([wide, narrow]) == both
    assert set(alone([narrow, wide]).values()) == {wide}


@pytest.mark.parametrize(
    "pattern", ["layers/q", "q/kernel", "position_embed/embedding", ".*/scale", "layers/qq/kernel"]
)
def test_a_rule_without_a_kernel_is_refused(pattern):
    """Patterns match whole paths, and only of matrices."""
    with pytest.raises(UserError, match=f"'{pattern}'.*layers/q/kernel"):
        resolve([LoraRule(), LoraRule(pattern)])


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_is_at_least_one(rank):
    with pytest.raises(UserError, match=f"rank {rank}"):
        LoraRule(rank=rank)


def test_embeddings_and_head_are_kernels_when_named():
    named = [LoraRule("embed/embedding"), LoraRule("lm_head/.*")]
    assert set(resolve(named)) == {"embed/embedding", "lm_head/kernel"}


def test_a_rule_may_be_of_some_layers():
    """By the last that matches, whatever it says of the other layers."""
    every = LoraRule(rank=4)
    last = LoraRule(".*/q/kernel", rank=2, layers=(2,))
    first = LoraRule(".*/q/kernel", rank=8, alpha=1.0, rslora=True, layers=(0, 2))
    assert resolve([every, first, last]) == {
        "layers/q/kernel": [first, every, last],
        "layers/o/kernel": [every] * 3,
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([LoraRule(".*/q/kernel", layers=(0, 2))], "layer 1 has no rule: kernel 'layers/q/kernel'"),
        ([LoraRule(layers=(3,))], "layer 3 of 3: .*; use layers from 0 to 2"),
        ([LoraRule(), LoraRule("lm_head/kernel", layers=(1,))], "layer 1 of 1"),
        ([LoraRule(), LoraRule(dora=True, layers=(1,))], r"differ in dora: \[False, True\]"),
        ([LoraRule(), LoraRule(dropout=0.5, layers=(1,))], "differ in dropout"),
    ],
)
def test_layers_that_do_not_go_together_are_refused(rules, message):
    with pytest.raises(UserError, match=message):
        resolve(rules)


def test_scales():
    assert LoraRule(rank=16, alpha=8.0).scale == 0.5
    assert LoraRule(rank=16, alpha=8.0, rslora=True).scale == 2.0
