"""Rows that are refilled answer as if every prompt were alone, in fewer steps and few programs."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from ecomjax import sharding
from ecomjax.decoding.generate import GenerateOptions, generate
from ecomjax.decoding.stopping import STRIDE, StopStrings
from ecomjax.models import registry
from ecomjax.models.t5 import T5Config

NEW, ROWS = 12, 8
OFTEN = tuple(range(0, 61, 6))
"""Tokens that end an answer, about one in six that are drawn."""


def drawing(**changes):
    options = GenerateOptions(NEW, 0, ROWS, temperature=2.0, stop_ids=OFTEN[1:])
    return dataclasses.replace(options, **changes)


def make_prompts(seed):
    """Of 4 to 75 tokens, in no order, that open with the same three."""
    rng = np.random.default_rng(seed)
    lengths = [1, 40, 9, 1, 70, 3, 31, 33, 2, 2, 18, 64, 1, 5, 50, 7, 22, 1, 72, 4]
    return [[7, 8, 9, *rng.integers(0, 61, length).tolist()] for length in lengths]


@pytest.fixture(scope="module")
def long_prompts():
    return make_prompts(0)


@pytest.fixture(scope="module")
def alone(tiny, variables, long_prompts):
    """Answers where there is one row, so that no prompt has neighbours."""
    return generate(tiny.model, variables, long_prompts, drawing(batch_size=1))


def assert_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.tokens, ours.ended) == (theirs.tokens, theirs.ended)
        assert ours.log_probabilities == pytest.approx(theirs.log_probabilities, abs=1e-4)


def test_answers_are_those_of_prompts_alone_in_fewer_steps(
    tiny, variables, watched, long_prompts, alone
):
    """They end at very different times, and later prompts take more slots; nothing is compiled
    anew for other prompts of such lengths, however their answers end."""
    drawn = [len(answer.log_probabilities) for answer in alone]
    assert min(drawn) == 1 and max(drawn) == NEW
    model, count = watched(tiny.config)
    found = []

    def run(prompts):
        found[:] = generate(model, variables, prompts, drawing())

    traced, heads = count(run, long_prompts)
    assert_equal(found, alone)
    # Prompts are in three classes of length, of which each is filled in and continued.
    assert traced <= 6
    by_length = np.array(drawn)[np.argsort([len(p) for p in long_prompts], kind="stable")]
    longest = [max(by_length[i : i + ROWS]) - 1 for i in range(0, len(drawn), ROWS)]
    refills = len(drawn) // 2
    assert sum(drawn) / ROWS <= heads - refills < sum(longest)
    assert count(run, make_prompts(1))[0] == 0


def test_rows_split_over_devices(tiny, variables, long_prompts, alone, caplog):
    """Answers are the same, and every program is compiled once for each class of length."""
    with sharding.use(sharding.make_mesh(data=4, tensor=2)), jax.log_compiles():
        options = drawing(batch_size=4)
        assert_equal(generate(tiny.model, variables, long_prompts, options), alone)
    compiled = re.findall(r"Compiling (?:jit\()?(run|refill)\b", caplog.text)
    assert compiled.count("run") == compiled.count("refill") == 3


def digits(ids):
    return "".join(f"{i:02d}" for i in ids)


def test_rows_are_freed_where_a_stop_string_appears(tiny, variables, prompts, watched):
    """While others go on; the answers are whole ones, cut."""
    options = GenerateOptions(5 * STRIDE, 61, 2, temperature=2.0)
    whole = generate(tiny.model, variables, prompts, options, decode=digits)
    strings = ("11", "22", "595")
    model, count = watched(tiny.config)
    stopping = dataclasses.replace(options, stop=strings)
    found = []

    def run():
        found[:] = generate(model, variables, prompts, stopping, decode=digits)

    _, heads = count(run)
    for answer, full in zip(found, whole, strict=True):
        stopped = StopStrings(strings, digits).find(full.tokens, 0, finished=True)
        assert stopped is not None and answer.ended
        assert answer.text == stopped.text and answer.tokens == full.tokens[: stopped.kept]
        assert len(answer.log_probabilities) == stopped.kept + 1
    assert heads < 0.8 * len(prompts) * 5 * STRIDE / 2


def test_sources_of_very_different_lengths():
    """What is remembered of them is a row's own, and takes more slots as longer ones come."""
    model = registry.build(T5Config(61, 16, 2, 2, 2, 8, 20, gated=True))
    rng = np.random.default_rng(0)
    shapes, _ = registry.describe(model)
    params = jax.tree.map(lambda x: 0.5 * rng.standard_normal(x.shape, np.float32), shapes)
    sources = [rng.integers(0, 61, n).tolist() for n in (60, 3, 35, 1, 9, 20, 40)]
    options = drawing(start=(0, 4), stop_ids=OFTEN[1:5])

    def run(batch_size):
        changed = dataclasses.replace(options, batch_size=batch_size)
        return generate(model, {"params": params}, sources, changed)

    expected = run(1)
    assert len({len(answer.tokens) for answer in expected}) > 2
    assert_equal(run(4), expected)
