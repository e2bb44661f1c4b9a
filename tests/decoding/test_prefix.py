import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.decoding import prefix

sequences = st.lists(st.integers(0, 1), min_size=1, max_size=6)


@given(sequences, st.lists(sequences, min_size=1, max_size=4))
def test_common_prefix_leaves_every_prompt_a_token(opening, tails):
    prompts = [opening + tail for tail in tails]
    longest = len(os.path.commonprefix(prompts))  # noqa: RUF071 - of lists, not of paths
    assert prefix.common_prefix(prompts) == min(longest, min(map(len, prompts)) - 1)


@pytest.mark.parametrize(("length", "slots"), [(0, 0), (1, 32), (32, 32), (33, 64)])
def test_buckets(length, slots):
    assert prefix.bucketed(length) == slots


def test_few_classes_of_size_and_none_half_empty():
    classes = {prefix.size_class(length) for length in range(1, 2049)}
    assert sorted(classes)[:8] == [32, 64, 96, 128, 192, 256, 384, 512] and len(classes) == 12
    for length in range(1, 2049):
        assert length <= prefix.size_class(length) < max(1.5 * length, length + 32)


def test_the_cache_of_a_prefix(tiny, variables):
    """One row of 32 slots: three tokens of the shared segment, the rest padding."""
    cache = prefix.fill_prefix(tiny.model, variables, [5, 6, 7])
    assert cache.keys.shape == (2, 1, 2, 32, 8)
    assert cache.segment_ids.tolist() == [[-1] * 3 + [0] * 29]
    assert cache.positions[0, :3].tolist() == [0, 1, 2]
    assert int(cache.length) == 32


def test_no_prefix_is_a_bucket_of_padding(tiny, variables):
    cache = prefix.fill_prefix(tiny.model, variables, [])
    assert cache.segment_ids.tolist() == [[0] * 32]
