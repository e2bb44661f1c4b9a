import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax.decoding.classes import class_log_probabilities
from ecomjax.models import registry
from ecomjax.models.heads import SequenceClassifierConfig, TokenClassifierConfig

SHAPE = {"vocab_size": 61, "width": 16, "layers": 2, "heads": 2, "ffn": 24, "max_positions": 40}
LENGTHS = (40, 3, 33, 1, 17)
RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, 61, n).tolist() for n in LENGTHS]
TYPES = [[0] * (n // 2) + [1] * (n - n // 2) for n in LENGTHS]


@pytest.mark.parametrize("kind", [SequenceClassifierConfig, TokenClassifierConfig])
def test_each_sequence_is_read_as_if_alone(kind):
    """Whatever else is read with it, and as long as the table of positions is."""
    model = registry.build(kind(**SHAPE, labels=("a", "b", "c")))
    shapes, _ = registry.describe(model)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.3 * RNG.standard_normal(x.shape, np.float32)), shapes
    )
    variables, done = {"params": params}, []
    found = class_log_probabilities(model, variables, SEQUENCES, TYPES, 2, done.append)
    assert sum(done) == len(LENGTHS)
    for i in (1, 2):
        n = LENGTHS[i]
        slots = np.array(SEQUENCES[i])[None], np.arange(n)[None], np.ones((1, n))
        args = [jnp.asarray(x, jnp.int32) for x in slots]
        types = jnp.asarray([TYPES[i]], jnp.int32)
        logits = model.apply(variables, *args, token_types=types, method="of_slots")[0]
        expected = np.asarray(jax.nn.log_softmax(logits))
        rows = 1 if kind is SequenceClassifierConfig else n
        assert found[i].shape == (rows, 3)
        np.testing.assert_allclose(found[i], expected[:rows], atol=1e-5)
