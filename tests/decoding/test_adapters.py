"""A batch whose prompts use several adapters answers as several runs, in one compiled program."""

import jax
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.routing import hold_together
from ecomjax.adapters.rules import LoraRule
from ecomjax.decoding.beam import BeamOptions, beam_search
from ecomjax.decoding.generate import GenerateOptions, generate
from ecomjax.decoding.score import label_log_likelihoods
from ecomjax.errors import UserError
from ecomjax.models import registry
from ecomjax.models.t5 import T5Config

LABELS = [[11, 2], [11, 12, 2], [30, 2]]
OF_PROMPTS = [0, 1, 2, 2, 1, 0, 0, 2]
NEW = 5


def make_adapters(params, axes):
    """Three of different rank and alpha."""
    rng, made = np.random.default_rng(0), []
    for rank, alpha in ((2, 8.0), (5, 3.0), (1, 2.0)):
        rules = [LoraRule(rank=rank, alpha=alpha)]
        _, adapter = lora.init(params, axes, rules, jax.random.key(rank))

        def drawn(leaf):
            return leaf.replace(b=0.2 * rng.standard_normal(leaf.b.shape, np.float32))

        made.append(trees.map_leaves(drawn, adapter))
    return made


def sampled(model, variables, prompts, adapters=None):
    options = GenerateOptions(NEW, 2, batch_size=4, temperature=1.5)
    found = generate(model, variables, prompts, options, adapters=adapters)
    return [(one.tokens, one.log_probability) for one in found]


def greedy(model, variables, prompts, adapters=None):
    options = GenerateOptions(NEW, 2, batch_size=3)
    found = generate(model, variables, prompts, options, adapters=adapters)
    return [(one.tokens, one.log_probability) for one in found]


def beams(model, variables, prompts, adapters=None, start=()):
    options = BeamOptions(NEW, 2, batch_size=4, beams=3, start=start)
    found = beam_search(model, variables, prompts, options, adapters=adapters)
    return [(one.tokens, one.score) for one in found]


def labels(model, variables, prompts, adapters=None):
    found = label_log_likelihoods(
        model, variables, prompts, LABELS, batch_size=3, window=64, adapters=adapters
    )
    return [((), row) for row in found]


def sourced(model, variables, prompts, adapters=None):
    return beams(model, variables, prompts, adapters, start=(0,))


def assert_as_alone(answer, model, params, adapters, prompts):
    together = answer(
        model, {"params": params, "lora": hold_together(adapters)}, prompts, OF_PROMPTS
    )
    alone = [answer(model, {"params": params, "lora": one}, prompts) for one in adapters]
    differ = 0
    for prompt, number in enumerate(OF_PROMPTS):
        tokens, value = alone[number][prompt]
        assert together[prompt][0] == tokens
        np.testing.assert_allclose(together[prompt][1], value, rtol=1e-5, atol=1e-5)
        others = [np.asarray(one[prompt][1]) for one in alone]
        differ += not np.allclose(others[number], others[number - 1], atol=1e-2)
    assert differ > len(prompts) / 2


@pytest.mark.parametrize("answer", [greedy, sampled, beams, labels])
def test_every_prompt_as_with_its_adapter_alone(tiny, prompts, answer):
    """The prompts open alike, and what they open with is of another adapter for each."""
    adapters = make_adapters(tiny.params, tiny.axes)
    assert_as_alone(answer, tiny.model, tiny.params, adapters, prompts)


def test_sources_of_an_encoder_decoder(prompts):
    model = registry.build(T5Config(61, 16, 2, 2, 2, 8, 20, gated=True))
    shapes, axes = registry.describe(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes)
    assert_as_alone(sourced, model, params, make_adapters(params, axes), prompts)


def test_one_program_whichever_adapters_the_prompts_use(tiny, prompts, watched):
    model, count = watched(tiny.config)
    many = {
        "params": tiny.params,
        "lora": hold_together(make_adapters(tiny.params, tiny.axes)),
    }
    options = GenerateOptions(NEW, 2, batch_size=8)

    def run(adapters):
        generate(model, many, prompts, options, adapters=adapters)

    traced, _ = count(run, OF_PROMPTS)
    assert 0 < traced <= 4
    assert count(run, OF_PROMPTS[::-1])[0] == count(run, [0] * len(prompts))[0] == 0


@pytest.mark.parametrize("answer", [greedy, labels])
@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([0, 1, 2, 2, 1, 0, 0, 3], "adapter 3 of 3 that are held"),
        ([0, 1, 2, 2, 1, 0, 0, -1], "adapter -1 of 3 that are held"),
        ([0, 1, 2], "3 adapters for 8 prompts"),
        ([0] * 9, "9 adapters for 8 prompts"),
    ],
)
def test_an_adapter_that_is_not_held_is_refused(tiny, prompts, answer, adapters, message):
    """Jax would take the nearest that is."""
    held = hold_together(make_adapters(tiny.params, tiny.axes))
    with pytest.raises(UserError, match=message):
        answer(tiny.model, {"params": tiny.params, "lora": held}, prompts, adapters)


def test_without_adapters_none_can_be_named(tiny, prompts):
    with pytest.raises(UserError, match="adapter 0 of 0"):
        greedy(tiny.model, {"params": tiny.params}, prompts, [0] * len(prompts))
