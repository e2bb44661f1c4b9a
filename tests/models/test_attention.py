import jax.numpy as jnp
import numpy as np

from ecomjax.models.attention import attend, empty_cache, make_mask

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape, np.float32))


def naive_attend(q, k, v, mask):
    """One query at a time, head by head; query head n reads key head n // (N / K)."""
    q, k, v = map(np.asarray, (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        scores = k[b, mask[b, t], n // group] @ q[b, t, n] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, mask[b, t], n // group]
    return out


def test_grouped_queries_attend_as_head_by_head():
    q, k, v = normal(2, 5, 6, 4), normal(2, 7, 2, 4), normal(2, 7, 2, 4)
    mask = RNG.random((2, 5, 7)) < 0.5
    mask[:, :, 0] = True
    out = attend(q, k, v, jnp.asarray(mask))
    np.testing.assert_allclose(out, naive_attend(q, k, v, mask), atol=1e-5)


def test_scores_and_softmax_are_of_float32():
    """Scores around 40 lie 0.25 apart in bfloat16, which is 28 % of a weight."""
    q, k = normal(1, 4, 2, 64) + 2, normal(1, 9, 2, 64) + 2
    inputs = [x.astype(jnp.bfloat16) for x in (q, k, normal(1, 9, 2, 64))]
    mask = np.ones((1, 4, 9), bool)
    out = attend(*inputs, jnp.asarray(mask))
    assert out.dtype == jnp.bfloat16
    exact = naive_attend(*(x.astype(jnp.float32) for x in inputs), mask)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)


def mask_of(queries, keys, first=0):
    return np.asarray(make_mask(jnp.asarray(queries), jnp.asarray(keys), jnp.int32(first)))


def naive_mask(queries, keys, first):
    mask = np.zeros((len(queries), queries.shape[1], keys.shape[1]), bool)
    for b, t, s in np.ndindex(mask.shape):
        own = first + t
        if queries[b, t] == 0:
            mask[b, t, s] = s == own or (keys[b, s] == -1 and s <= own)
        else:
            mask[b, t, s] = s <= own and keys[b, s] in (queries[b, t], -1)
    return mask


def test_mask_slot_by_slot():
    keys = RNG.integers(-1, 4, (3, 12)).astype(np.int32)
    for first, count in [(0, 12), (5, 4), (11, 1)]:
        queries = keys[:, first : first + count]
        mask = mask_of(queries, keys, first)
        np.testing.assert_array_equal(mask, naive_mask(queries, keys, first))


def test_nobody_sees_padding_and_every_query_sees_something():
    keys = np.array([[0, -1, 1, 0, 1, 2, 0]], np.int32)
    mask = mask_of(keys, keys)[0]
    assert mask.any(axis=1).all()
    seen = mask[keys[0] != 0]
    assert not seen[:, keys[0] == 0].any()


def test_shared_slots_see_the_shared_prefix_alone():
    keys = np.array([[-1, -1, 1, 2]], np.int32)
    mask = mask_of(keys, keys)[0].astype(int)
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]])


def test_empty_cache_holds_padding():
    cache = empty_cache(3, 2, 5, 4, 8, jnp.bfloat16)
    assert cache.keys.shape == cache.values.shape == (3, 2, 5, 4, 8)
    assert cache.keys.dtype == jnp.bfloat16
    assert not cache.segment_ids.any() and int(cache.length) == 0
