"""Several adapters at once: each row answers as with its own alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.routing import hold_together
from ecomjax.adapters.rules import LoraRule
from ecomjax.errors import UserError
from ecomjax.typing import DoRA

INDEX = np.array([2, 0, 1, 0], np.int32)


def assert_close(ours, expected, tolerance=1e-5):
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


def rules_of(rank, alpha, **changes):
    return (LoraRule(".*/kernel", rank=rank, alpha=alpha, **changes),)


@pytest.fixture
def three(make_adapter):
    """Of different ranks and alphas."""
    return [
        make_adapter(seed, rules_of(rank, alpha))
        for seed, rank, alpha in ((1, 2, 8.0), (2, 5, 1.0), (3, 3, 3.0))
    ]


def test_each_row_as_with_its_adapter_alone(tiny, three, tokens):
    many = hold_together(three)
    mixed = tiny.logits(tokens, lora=many, index=INDEX)
    for row, number in enumerate(INDEX):
        assert_close(mixed[row], tiny.logits(tokens, lora=three[number])[row])
    assert many["layers"]["attn"]["q"]["kernel"].a.shape == (2, 3, 24, 5)


def test_the_empty_adapter_is_the_base_and_kernels_may_differ(tiny, make_adapter, tokens):
    embedding = (LoraRule("embed/embedding", rank=2),)
    adapters = [{}, make_adapter(1), make_adapter(2, embedding)]
    adapters[2]["embed"]["embedding"] = adapters[2]["embed"]["embedding"].replace(
        a=0.1 * np.random.default_rng(0).standard_normal((61, 2), np.float32)
    )
    mixed = tiny.logits(tokens, lora=hold_together(adapters), index=INDEX)
    base = tiny.logits(tokens)
    alone = [base, *(tiny.logits(tokens, lora=adapter) for adapter in adapters[1:])]
    for row, number in enumerate(INDEX):
        assert_close(mixed[row], alone[number][row])
        assert number == 0 or np.abs(alone[number] - base).max() > 1e-2 * np.abs(base).max()


@pytest.mark.parametrize("dispatch", ["ragged", "dense"])
@pytest.mark.parametrize("dora", [False, True])
def test_experts(make_llama, tokens, dispatch, dora):
    model = make_llama(layers=2, experts=3, experts_per_token=2, dispatch=dispatch)
    rng, adapters = np.random.default_rng(0), []
    for rank in (2, 4, 1):
        rule = LoraRule(rank=rank, alpha=rank * 2.0, dora=dora)
        _, adapter = lora.init(model.params, model.axes, [rule], jax.random.key(rank))

        def moved(leaf):
            more = {"magnitude": 1.3 * leaf.magnitude} if dora else {}
            b = 0.1 * rng.standard_normal(leaf.b.shape, np.float32)
            return leaf.replace(b=jnp.asarray(b), **more)

        adapters.append(trees.map_leaves(moved, adapter))
    many = hold_together(adapters)
    assert isinstance(many["layers"]["mlp"]["experts"]["up"]["kernel"], DoRA) == dora
    mixed = model.logits(tokens, lora=many, index=INDEX)
    for row, number in enumerate(INDEX):
        assert_close(mixed[row], model.logits(tokens, lora=adapters[number])[row])


def test_what_cannot_be_held_together(tiny, make_adapter, make_llama):
    plain = make_adapter(1)
    _, dora = lora.init(tiny.params, tiny.axes, rules_of(2, 4.0, dora=True), jax.random.key(0))
    wider = make_llama(layers=2, ffn=48)
    _, other = lora.init(wider.params, wider.axes, rules_of(2, 4.0), jax.random.key(0))
    for adapters, message in (
        ([plain, dora], "DoRA and LowRank in 2 of 2 adapters"),
        ([dora, {}], "DoRA in 1 of 2 adapters"),
        (
            [plain, other],
            r"shapes \(2, 40, 24\) and \(2, 48, 24\): kernel 'layers/mlp/down/kernel'",
        ),
        ([{}, {}], "no kernel"),
        ([], "no kernel"),
    ):
        with pytest.raises(UserError, match=message):
            hold_together(adapters)
