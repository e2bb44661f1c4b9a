"""Decoding over a cache of int8 keys and values is near to what the float model says of it."""

import dataclasses

import jax
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.routing import hold_together
from ecomjax.adapters.rules import LoraRule
from ecomjax.data.forms import one_of
from ecomjax.decoding.automaton import from_form
from ecomjax.decoding.beam import BeamOptions, beam_search
from ecomjax.decoding.constrain import generate_constrained
from ecomjax.decoding.generate import GenerateOptions, generate
from ecomjax.decoding.score import label_log_likelihoods
from ecomjax.models import registry

NEAR = 0.2
"""Between log-probabilities of whole answers; 0.064 was the most that any test measured."""
END = 60
LIMITS = {"max_new_tokens": 6, "end": END, "window": 88}


@pytest.fixture(scope="module")
def quantized(tiny):
    return registry.build(dataclasses.replace(tiny.config, kv_cache="int8"))


@pytest.fixture(scope="module")
def tables(tiny, prompts):
    """Function of answers -> log p of what may come at each of their tokens, by the float model."""

    def run(answers, **model):
        padded = np.zeros((len(prompts), 32), np.int32)
        for row, prompt, answer in zip(padded, prompts, answers, strict=True):
            row[: len(prompt) + len(answer)] = (*prompt, *answer)
        logits = tiny.logits(padded, **model).astype(np.float64)
        table = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return [
            row[len(prompt) - 1 : len(prompt) - 1 + len(answer)]
            for row, prompt, answer in zip(table, prompts, answers, strict=True)
        ]

    return run


def whole(found):
    return [(*one.tokens, END) if one.ended else one.tokens for one in found]


def assert_near(found, tables):
    for one, answer, table in zip(found, whole(found), tables, strict=True):
        exact = table[np.arange(len(answer)), answer].sum()
        assert one.log_probability == pytest.approx(exact, abs=NEAR)


def test_greedy_answers_in_refilled_rows(quantized, variables, prompts, tables):
    options = GenerateOptions(batch_size=4, **LIMITS)
    found = generate(quantized, variables, prompts, options)
    assert_near(found, tables(whole(found)))


def test_beams(quantized, variables, prompts, tables):
    found = beam_search(quantized, variables, prompts, BeamOptions(batch_size=8, **LIMITS))
    assert_near(found, tables(whole(found)))


def test_constrained_answers(quantized, variables, prompts, tables):
    texts = ["abc", "abd", "bca", "bccc", "d"]

    def encode(texts):
        return [[10 + ord(letter) - ord("a") for letter in text] for text in texts]

    automaton = from_form(one_of(texts), encode, END, "here")
    found = generate_constrained(
        quantized, variables, prompts, [automaton] * 8, batch_size=8, window=88
    )
    allowed = [(*ids, END) for ids in encode(texts)]
    answers = [(*one.tokens, END) for one in found]
    for one, answer, table in zip(found, answers, tables(answers), strict=True):
        assert answer in allowed
        exact = 0.0
        for place, token in enumerate(answer):
            following = {x[place] for x in allowed if x[:place] == answer[:place]}
            exact += table[place, token] - np.logaddexp.reduce(table[place, sorted(following)])
        assert one.log_probability == pytest.approx(exact, abs=NEAR)


def test_a_prefix_for_each_adapter(tiny, quantized, prompts, tables):
    """Greedy answers and labels, whose prompts open with the same three tokens."""
    adapters, rng = [], np.random.default_rng(0)
    for seed in (1, 2):
        _, adapter = lora.init(
            tiny.params, tiny.axes, [LoraRule(rank=2, alpha=4.0)], jax.random.key(seed)
        )
        drawn = trees.map_leaves(
            lambda leaf: leaf.replace(b=0.3 * rng.standard_normal(leaf.b.shape, np.float32)),
            adapter,
        )
        adapters.append(drawn)
    held, own = hold_together(adapters), [0, 1, 1, 0, 1, 0, 0, 1]
    variables = {"params": tiny.params, "lora": held}
    options = GenerateOptions(batch_size=8, **LIMITS)
    found = generate(quantized, variables, prompts, options, adapters=own)
    exact = tables(whole(found), lora=held, index=np.array(own, np.int32))
    assert_near(found, exact)
    labels = [[3], [4, 5]]
    scored = label_log_likelihoods(
        quantized, variables, prompts, labels, batch_size=8, window=88, adapters=own
    )
    expected = label_log_likelihoods(
        tiny.model, variables, prompts, labels, batch_size=8, window=88, adapters=own
    )
    assert 0 < np.abs(scored - expected).max() < NEAR
