import pytest

from ecomjax.adapters.rules import LoraRule, resolve
from ecomjax.errors import UserError
from ecomjax.typing import ParamAxes

AXES = {
    "embed": {"embedding": ParamAxes(("vocab", "embed"))},
    "layers": {
        "norm": {"scale": ParamAxes(("layers", "embed"))},
        "q": {"kernel": ParamAxes(("layers", "embed", "heads", "head_dim"), 1)},
        "o": {"kernel": ParamAxes(("layers", "heads", "head_dim", "embed"), 2)},
    },
    "lm_head": {"kernel": ParamAxes(("embed", "vocab"), 1)},
}


def test_default_is_every_linear_but_the_head():
    rule = LoraRule()
    assert resolve([rule], AXES) == {"layers/q/kernel": rule, "layers/o/kernel": rule}


def test_default_finds_every_stack_and_leaves_routers_out():
    kernel = {"kernel": ParamAxes(("layers", "embed", "ffn"), 1)}
    block = {"mlp": {"router": kernel, "router_free": kernel, "experts": {"up": kernel}}}
    axes = {"encoder": {"layers": block}, "decoder": {"layers": block}, "router": block}
    paths = ("mlp/router_free/kernel", "mlp/experts/up/kernel")
    expected = {f"{stack}/layers/{path}" for stack in ("encoder", "decoder") for path in paths}
    assert set(resolve([LoraRule()], axes)) == expected


def test_the_last_rule_that_matches_wins():
    wide, narrow = LoraRule(".*/kernel", rank=8), LoraRule(".*/q/kernel", rank=2)
    both = {"layers/q/kernel": narrow, "layers/o/kernel": wide, "lm_head/kernel": wide}
    assert resolve([wide, narrow], AXES) == both
    assert set(resolve([narrow, wide], AXES).values()) == {wide}


@pytest.mark.parametrize(
    "pattern", ["layers/q", "q/kernel", ".*/embedding", ".*/scale", "layers/qq/kernel"]
)
def test_a_rule_without_a_kernel_is_refused(pattern):
    """Patterns match whole paths, and only of matrices."""
    with pytest.raises(UserError, match=f"'{pattern}'.*layers/q/kernel"):
        resolve([LoraRule(), LoraRule(pattern)], AXES)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_is_at_least_one(rank):
    with pytest.raises(UserError, match=f"rank {rank}"):
        LoraRule(rank=rank)
