import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from ecomjax import sharding
from ecomjax.decoding.score import ROW, in_rows, label_log_likelihoods
from ecomjax.errors import UserError
from ecomjax.models.llama import Llama

END = 2
LABELS = [[11, END], [11, 12, END], [11, 12, 13, END], [30, END]]
"""The first three are prefixes of one another but for the end token."""


@pytest.fixture(scope="module")
def naive(prompts, log_probabilities):
    """One full forward for every prompt and label."""
    pairs = [(prompt, label) for prompt in prompts for label in LABELS]
    table = log_probabilities([prompt + label for prompt, label in pairs])
    scores = []
    for row, (prompt, label) in enumerate(pairs):
        slots = np.arange(len(prompt) - 1, len(prompt) + len(label) - 1)
        scores.append(table[row, slots, label].sum())
    return np.reshape(scores, (len(prompts), len(LABELS)))


def score(tiny, prompts, labels=LABELS, batch_size=16, window=64, **options):
    return label_log_likelihoods(
        tiny.model,
        {"params": tiny.params},
        prompts,
        labels,
        batch_size=batch_size,
        window=window,
        **options,
    )


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_f35_equals_one_forward_a_label(tiny, prompts, naive, batch_size):
    done = []
    scores = score(tiny, prompts, batch_size=batch_size, on_done=done.append)
    np.testing.assert_allclose(scores, naive, rtol=1e-5, atol=1e-5)
    assert sum(done) == len(prompts)


def test_f38_probabilities_of_labels_that_open_alike(tiny, prompts, naive):
    """The end token makes them exclusive: their shares are those of brute force, and sum to 1."""

    def shares(scores):
        return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)

    found = shares(score(tiny, prompts))
    np.testing.assert_allclose(found, shares(naive), atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-6)
    assert np.ptp(found, axis=1).min() > 0.01


def test_the_common_prefix_changes_nothing(tiny, prompts, naive):
    scores = score(tiny, [*prompts, [3]])
    np.testing.assert_allclose(scores[:-1], naive, rtol=1e-5, atol=1e-5)


def test_every_next_token_is_a_label(tiny, prompts):
    """The probabilities of all tokens as labels of one token sum to 1."""
    scores = score(tiny, prompts[:2], [[token] for token in range(61)])
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1.0, atol=1e-5)


@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 2)), max_size=60), st.integers(1, 8)
)
def test_rows_hold_every_prompt_once_and_none_too_many(prompts, batch_size):
    """Short prompts share rows, with those of the same adapter, and few rows are empty."""
    lengths, adapters = [length for length, _ in prompts], [adapter for _, adapter in prompts]
    batches = list(in_rows(lengths, adapters, batch_size))
    held = [row for rows, _ in batches for row in rows]
    assert sorted(i for row in held for i in row) == list(range(len(prompts)))
    for rows, slots in batches:
        assert len(rows) <= batch_size
        assert sum(map(bool, rows)) >= len(rows) // 2
        for row in rows:
            assert sum(lengths[i] for i in row) <= slots
            assert len({adapters[i] for i in row}) <= 1
    if prompts and max(lengths) <= ROW // 4 and len(set(adapters)) == 1:
        assert sum(map(bool, held)) <= 2 * sum(lengths) / ROW + 1


def test_rows_are_of_few_shapes_and_no_longer_than_prompts_need():
    assert list(in_rows([20], [0], 8)) == [([[0]], 32)]
    assert list(in_rows([20, 9], [0, 0], 8)) == [([[0, 1]], 32)]
    assert list(in_rows([20, 19], [0, 1], 8)) == [([[0], [1]], 32)]
    shapes = {(len(rows), slots) for rows, slots in in_rows([100] * 71, [0] * 71, 8)}
    assert shapes == {(8, ROW), (4, ROW)}


@pytest.mark.parametrize("parts", [2, 4])
def test_rows_divide_over_a_mesh(parts):
    with sharding.use(sharding.make_mesh(data=parts, devices=jax.devices()[:parts])):
        for count in (1, 3, 17):
            for rows, _ in in_rows([200] * count, [0] * count, 6):
                assert len(rows) % parts == 0


class Watched(Llama):
    """Counts how often it is traced."""

    traced = 0

    def logits(self, hidden, adapter_index=None):
        type(self).traced += 1
        return super().logits(hidden, adapter_index)


def test_nothing_is_compiled_anew_for_other_lengths_of_a_bucket(tiny):
    def run(prompts):
        before, model = Watched.traced, Watched(tiny.config)
        options = {"batch_size": 2, "window": 64}
        label_log_likelihoods(model, {"params": tiny.params}, prompts, LABELS, **options)
        return Watched.traced - before

    assert run([[1, 2, 3], [1, 2, 4, 5, 6], [1, 2, 3, 4]]) > 0
    assert run([[1, 2], [1, 3, 4], [1, 5, 6, 7, 8, 9, 10]]) == 0


def test_one_program_for_any_number_of_targets_beyond_a_chunk_of_the_head(tiny):
    """Whether 72 or 73 labels of two tokens follow a prompt."""

    def run(labels):
        before, model = Watched.traced, Watched(tiny.config)
        options = {"batch_size": 2, "window": 64}
        given = [[1, 2]], [[label % 61, END] for label in range(labels)]
        label_log_likelihoods(model, {"params": tiny.params}, *given, **options)
        return Watched.traced - before

    assert run(72) > 0
    assert run(73) == 0


def test_refusals(tiny):
    assert score(tiny, []).shape == (0, 4)
    with pytest.raises(UserError, match="empty prompt or label"):
        score(tiny, [[1], []])
    with pytest.raises(UserError, match="empty prompt or label"):
        score(tiny, [[1]], [[5], []])
    with pytest.raises(UserError, match=r"7 tokens and a label of 4 exceed .* of 10: prompt 1"):
        score(tiny, [[1] * 6, [1] * 7], window=10)
