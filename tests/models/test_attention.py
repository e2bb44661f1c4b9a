import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax.models.attention import KeyValues, attend, make_mask, related
from ecomjax.typing import BRANCHES

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape, np.float32))


def naive_attend(q, parts):
    """One query at a time, head by head; query head n reads key head n // (N / K)."""
    out = np.zeros(q.shape)
    group = q.shape[2] // parts[0][0].keys.shape[1]
    for b, t, n in np.ndindex(q.shape[:3]):
        scores, values = [], []
        for (keys, vectors), mask in parts:
            row = b if len(keys) > 1 else 0
            seen = np.flatnonzero(mask[b, t])
            query = np.asarray(q[b, t, n], np.float64)
            scores.extend(np.asarray(keys, np.float64)[row, n // group, seen] @ query)
            values.extend(np.asarray(vectors, np.float64)[row, n // group, seen])
        weights = np.exp((np.array(scores) - max(scores)) / np.sqrt(q.shape[-1]))
        out[b, t, n] = weights / weights.sum() @ np.array(values)
    return out


def part(rows, slots):
    """Random keys and values, and a mask for three rows, of which the first sees nothing shared."""
    mask = RNG.random((3, 5, slots)) < 0.5
    mask[:, :, 0] = True
    mask[0] &= rows > 1
    return KeyValues(normal(rows, 2, slots, 4), normal(rows, 2, slots, 4)), jnp.asarray(mask)


def test_grouped_queries_attend_as_head_by_head():
    """To slots of their own, and to slots that all rows share, in one softmax."""
    q, own, shared = normal(3, 5, 6, 4), part(3, 7), part(1, 4)
    for parts in ([own], [shared, own]):
        np.testing.assert_allclose(attend(q, parts), naive_attend(q, parts), atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_the_formula(shared):
    """By queries, keys and values, those of rows and those that all rows share."""
    q, direction = normal(3, 5, 6, 4), normal(3, 5, 6, 4)
    parts = [part(1, 4), part(3, 7)] if shared else [part(3, 7)]
    masks = [mask for _, mask in parts]

    def formula(q, key_values):
        """One softmax over all slots, keys and values repeated for every row and query head."""

        def whole(index):
            arrays = [kv[index] for kv in key_values]
            rows = [jnp.broadcast_to(x, (3, *x.shape[1:])) for x in arrays]
            return jnp.repeat(jnp.concatenate(rows, axis=2), 3, axis=1)

        scores = jnp.einsum("BTNH,BNSH->BNTS", q, whole(0)) / 2.0
        mask = jnp.concatenate(masks, axis=2)[:, None]
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        return jnp.einsum("BNTS,BNSH->BTNH", weights, whole(1))

    def ours(q, key_values):
        return attend(q, list(zip(key_values, masks, strict=True)))

    def gradients(function):
        def total(q, key_values):
            return (function(q, key_values) * direction).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1)))(q, [kv for kv, _ in parts])

    found, expected = gradients(ours), gradients(formula)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def bfloat16_parts(rows):
    """Queries and keys whose scores lie around 40, in slots of their own and in shared ones."""
    q = (normal(rows, 4, 4, 64) + 2).astype(jnp.bfloat16)
    parts = []
    for owners, slots in ((1, 5), (rows, 9)):
        arrays = normal(owners, 2, slots, 64) + 2, normal(owners, 2, slots, 64)
        mask = jnp.ones((rows, 4, slots), bool)
        parts.append((KeyValues(*(x.astype(jnp.bfloat16) for x in arrays)), mask))
    return q, parts


@pytest.mark.parametrize("rows", [1, 3])
def test_scores_and_softmax_are_of_float32(rows):
    """Scores around 40 lie 0.25 apart in bfloat16, which is 28 % of a weight."""
    q, parts = bfloat16_parts(rows)
    out = jax.jit(attend)(q, parts)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), naive_attend(q, parts), atol=0.02)


def test_gradients_in_bfloat16():
    """They come out in bfloat16, near those of float32 on the same numbers."""
    inputs = bfloat16_parts(3)

    @jax.jit
    def gradients(q, parts):
        def total(q, key_values):
            masks = [mask for _, mask in parts]
            return attend(q, list(zip(key_values, masks, strict=True))).sum()

        return jax.grad(total, argnums=(0, 1))(q, [kv for kv, _ in parts])

    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype != bool else x, inputs)
    leaves = [jax.tree.leaves(gradients(*x)) for x in (inputs, exact)]
    for half, full in zip(*leaves, strict=True):
        assert half.dtype == jnp.bfloat16
        assert np.abs(half.astype(jnp.float32) - full).max() <= 0.03 * np.abs(full).max()


def mask_of(queries, keys, first=0):
    return np.asarray(make_mask(jnp.asarray(queries), jnp.asarray(keys), jnp.int32(first)))


def naive_mask(queries, keys, first):
    mask = np.zeros((len(queries), queries.shape[1], keys.shape[1]), bool)
    for b, t, s in np.ndindex(mask.shape):
        own = first + t
        if queries[b, t] == 0:
            mask[b, t, s] = s == own
        else:
            ahead = own < s < first + queries.shape[1]
            stem = queries[b, t] // BRANCHES or queries[b, t]
            mask[b, t, s] = not ahead and keys[b, s] in (queries[b, t], stem, -1)
    return mask


def test_mask_slot_by_slot():
    ids = np.array([-1, 0, 1, 2, 2 * BRANCHES, 2 * BRANCHES + 1, 3 * BRANCHES], np.int32)
    keys = RNG.choice(ids, (3, 12))
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


def test_a_prefix_is_seen_by_all_but_padding():
    queries, keys = jnp.array([[1, 2, 0], [0, -1, 1]]), jnp.array([[-1, -1, 0]])
    seen = np.asarray(related(queries, keys)).astype(int)
    nothing, everything = [0, 0, 0], [1, 1, 0]
    np.testing.assert_array_equal(seen[0], [everything, everything, nothing])
    np.testing.assert_array_equal(seen[1], [nothing, everything, everything])
