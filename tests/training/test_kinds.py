"""Losses of encoders and encoder-decoders: packed rows against transformers' padded batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax.data.encoded import NO_CLASS, Encoded, EncodedSet
from ecomjax.data.labelled import assemble_labelled
from ecomjax.data.pairs import assemble_pairs
from ecomjax.data.pipeline import one_pass
from ecomjax.hf import families
from ecomjax.models import registry
from ecomjax.training import losses

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, C, ROW = 67, 5, 24
LENGTHS = (9, 4, 7, 12, 5)
"""Of which two or three go into a row."""
BERT = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": ROW,
    "num_labels": C,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def made(config, end):
    """A random model of transformers, ours and our parameters."""
    torch.manual_seed(0)
    theirs = getattr(transformers, f"AutoModelFor{end}").from_config(config).eval()
    fields = theirs.config.to_dict() | {"architectures": [type(theirs).__name__]}
    ours = families.config_from_hf(fields, "here")
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = families.rule_table(ours).import_params(tensors, "float32", "here")
    return theirs, registry.build(ours), jax.tree.map(jnp.asarray, params)


def padded(values, fill):
    found = np.full((len(values), max(map(len, values))), fill, np.int64)
    for row, own in zip(found, values, strict=True):
        row[: len(own)] = own
    return torch.from_numpy(found)


def ours(loss, params, sequences, assemble, packing="plain"):
    """(mean loss, weight) of all sequences in one batch of rows, some of them empty."""
    made = EncodedSet.of(sequences)
    batch = one_pass(made, packing, ROW, len(made), 6, assemble)[0]
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    assert 1 < (batch.segment_ids != 0).any(axis=1).sum() < len(made) + (packing == "pad")
    total, weight, aux = jax.jit(loss, static_argnames="key")(params, {}, batch, key=None)
    assert aux == {}
    return float(total / weight), float(weight)


@pytest.mark.parametrize("end", ["TokenClassification", "SequenceClassification"])
def test_classes(end):
    """Of words at some of the tokens, or of whole sequences, with two types of tokens."""
    theirs, model, params = made(transformers.BertConfig(**BERT), end)
    rng, words = np.random.default_rng(0), end.startswith("Token")
    tokens = [rng.integers(5, V, n).tolist() for n in LENGTHS]
    types = [[0] * (n // 2) + [1] * (n - n // 2) for n in LENGTHS]
    classes = [rng.integers(0, C, n).tolist() for n in LENGTHS]
    for own in classes:
        for slot in range(len(own)):
            if slot % 3 != 1 if words else slot > 0:
                own[slot] = NO_CLASS
    labels = padded(classes, -100)
    labels[labels == NO_CLASS] = -100
    with torch.no_grad():
        expected = theirs(
            input_ids=padded(tokens, 0),
            token_type_ids=padded(types, 0),
            attention_mask=padded([[1] * n for n in LENGTHS], 0),
            labels=labels if words else labels[:, 0],
        ).loss.item()
    sequences = [
        Encoded(str(i), tuple(own), len(own), 0, tuple(zip(types[i], classes[i], strict=True)))
        for i, own in enumerate(tokens)
    ]
    for packing in ("plain", "pad"):
        found, weight = ours(losses.classes(model), params, sequences, assemble_labelled, packing)
        assert found == pytest.approx(expected, rel=1e-5)
        assert weight == (labels != -100).sum()


@functools.cache
def t5():
    config = transformers.T5Config(
        vocab_size=V,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=9,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return made(config, "Seq2SeqLM")


def test_pairs():
    """Teacher forcing of answers of 1 to 5 tokens, the end among them."""
    theirs, model, params = t5()
    rng = np.random.default_rng(1)
    sources = [(*rng.integers(2, V, n - 1).tolist(), 1) for n in LENGTHS]
    answers = [(*rng.integers(2, V, n).tolist(), 1) for n in (2, 0, 4, 3, 1)]
    with torch.no_grad():
        expected = theirs(
            input_ids=padded(sources, 0),
            attention_mask=padded([[1] * len(own) for own in sources], 0),
            labels=padded(answers, -100),
        ).loss.item()
    sequences = [
        Encoded(str(i), source + answer, len(source))
        for i, (source, answer) in enumerate(zip(sources, answers, strict=True))
    ]
    loss = losses.pairs(model, variables_of=losses.whole)
    for packing in ("plain", "pad"):
        found, weight = ours(loss, params, sequences, assemble_pairs((0,)), packing)
        assert found == pytest.approx(expected, rel=1e-5)
        assert weight == 15
