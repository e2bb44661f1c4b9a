import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.data.encoded import Encoded, EncodedSet, shared_prefix
from ecomjax.data.packing import assemble, make_plan
from ecomjax.models.likelihood import token_log_likelihood
from ecomjax.training.losses import adapted, causal_lm

PACKINGS = ("shared_prefix", "plain", "pad")


@pytest.fixture(scope="module")
def tiny(make_llama):
    return make_llama(layers=2)


@pytest.fixture(scope="module")
def sequences():
    """Seven examples of one instruction; answers of 2 to 9 tokens."""
    rng = np.random.default_rng(0)
    opening, made = [5, 6, 7, 8], []
    for i, (prompt, answer) in enumerate(rng.integers((1, 2), (6, 10), (7, 2)).tolist()):
        tokens = (*opening, *rng.integers(1, 60, prompt + answer).tolist())
        made.append(Encoded(str(i), tokens, 4 + prompt))
    return made


@pytest.fixture(scope="module")
def run(tiny):
    """Function of a batch -> (loss sum, weight, gradient) of one random adapter."""
    rng = np.random.default_rng(1)
    rules = [LoraRule(rank=3, dropout=0.5)]
    _, adapter = lora.init(tiny.params, tiny.axes, rules, jax.random.key(0))
    adapter = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), adapter)
    trained, fixed = lora.split(adapter)
    loss = causal_lm(tiny.model)
    frozen = {"params": tiny.params, "fixed": fixed}

    @jax.jit
    def of_batch(trained, frozen, batch, key):
        def compute(trained):
            total, weight, aux = loss(trained, frozen, batch, key)
            assert aux == {}
            return total, weight

        (total, weight), grads = jax.value_and_grad(compute, has_aux=True)(trained)
        return total, weight, grads

    def run(batch, key=None):
        return of_batch(trained, frozen, jax.tree.map(jnp.asarray, batch), key)

    run.adapter = adapter
    return run


def pack(sequences, packing):
    """One step of all sequences, in seven rows however few they fill."""
    return lay_out(sequences, packing)[1]


def lay_out(sequences, packing):
    """Which sequences stand in each row of that step, and the step."""
    made = EncodedSet.of(sequences)
    plan = make_plan(
        made.lengths,
        [np.random.default_rng(0).permutation(len(made))],
        prefixes=[shared_prefix(made)],
        packing=packing,
        row_length=36,
        batch_size=7,
        rows_multiple=7,
    )
    rows = plan.step(0)
    return rows, assemble(rows, made, plan)


def test_counts_answers_token_by_token(tiny, run, sequences):
    """-log p of every answer token, each example alone, computed from all its logits."""
    expected = 0.0
    for sequence in sequences:
        padded = np.zeros((1, 20), np.int32)
        padded[0, : len(sequence.tokens)] = sequence.tokens
        logits = tiny.logits(padded, lora=run.adapter)[0].astype(np.float64)
        for i in range(sequence.prompt, len(sequence.tokens)):
            row = logits[i - 1]
            expected += np.log(np.exp(row).sum()) - row[sequence.tokens[i]]
    total, weight, _ = run(pack(sequences, "pad"))
    assert float(weight) == sum(len(s.tokens) - s.prompt for s in sequences)
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_f35_packing_changes_neither_loss_nor_gradient(run, sequences):
    packed = {packing: pack(sequences, packing) for packing in PACKINGS}
    used = {packing: int((b.segment_ids != 0).any(axis=1).sum()) for packing, b in packed.items()}
    assert used["shared_prefix"] < used["plain"] < used["pad"] == 7
    expected, weight, gradients = run(packed["pad"])
    for packing in ("shared_prefix", "plain"):
        total, same_weight, grads = run(packed[packing])
        assert float(same_weight) == float(weight)
        assert float(total) == pytest.approx(float(expected), rel=1e-5)
        theirs = trees.flatten(gradients)
        for path, leaf in trees.flatten(grads).items():
            for name in ("a", "b"):
                ours, exact = getattr(leaf, name), getattr(theirs[path], name)
                assert np.linalg.norm(exact) > 0
                assert np.linalg.norm(ours - exact) <= 5e-5 * np.linalg.norm(exact), (path, name)


def test_f35_an_example_costs_the_same_however_it_is_laid_out(tiny, run, sequences):
    """Packed three ways, padded on the left, and in a batch of its own."""
    variables = jax.tree.map(jnp.asarray, {"params": tiny.params, "lora": run.adapter})
    likelihood = jax.jit(lambda batch: token_log_likelihood(tiny.model, variables, batch))

    def costs(rows, batch):
        values = np.asarray(likelihood(jax.tree.map(jnp.asarray, batch)))
        return {
            example: -values[row][batch.segment_ids[row] == place + 1].sum()
            for row, examples in enumerate(rows)
            for place, example in enumerate(examples)
        }

    rows, padded = lay_out(sequences, "pad")
    left = (padded.segment_ids == 0).sum(axis=1)
    to_the_right = jax.tree.map(
        lambda x: np.stack([np.roll(row, n) for row, n in zip(x, left, strict=True)]), padded
    )
    assert (to_the_right.segment_ids[:, -1] == 1).all() and left.min() > 0
    alone = {}
    for i, row in enumerate(rows):
        alone |= costs([row], jax.tree.map(lambda x, i=i: x[i : i + 1], padded))
    laid_out = {packing: lay_out(sequences, packing) for packing in PACKINGS}
    found = [*(costs(*each) for each in laid_out.values()), costs(rows, to_the_right)]
    assert len(alone) == len(sequences) and min(alone.values()) > 1
    for each in found:
        assert each == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kernel", ["lm_head/kernel", "embed/embedding"])
def test_adapters_outside_the_layers_learn_as_well(make_llama, sequences, kernel):
    """Where they are, the head is none that has no gradient. Embeddings may be the head."""
    tiny, rng = (
        make_llama(layers=2, tied_embeddings=kernel.startswith("embed")),
        np.random.default_rng(3),
    )
    rules = [LoraRule(rank=2), LoraRule(kernel, rank=2)]
    _, adapter = lora.init(tiny.params, tiny.axes, rules, jax.random.key(0))
    adapter = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), adapter)
    trained, fixed = lora.split(adapter)
    frozen = jax.tree.map(jnp.asarray, {"params": tiny.params, "fixed": fixed})
    batch = jax.tree.map(jnp.asarray, pack(sequences, "plain"))

    def expected(trained):
        likelihood = token_log_likelihood(tiny.model, adapted(trained, frozen), batch)
        return -(likelihood * batch.weights).sum()

    found = jax.grad(lambda trained: causal_lm(tiny.model)(trained, frozen, batch, None)[0])(
        trained
    )
    exact = jax.grad(expected)(trained)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
        assert np.linalg.norm(theirs) > 0
        assert np.linalg.norm(ours - theirs) <= 5e-5 * np.linalg.norm(theirs)


def test_weights_weigh(run, sequences):
    batch = pack(sequences, "plain")
    total, weight, _ = run(batch)
    doubled = run(batch.replace(weights=2 * batch.weights))
    assert float(doubled[0]) == pytest.approx(2 * float(total), rel=1e-6)
    assert float(doubled[1]) == 2 * float(weight)


def test_dropout_needs_a_key(run, sequences):
    batch = pack(sequences, "plain")
    sure, once, again = run(batch), run(batch, jax.random.key(0)), run(batch, jax.random.key(0))
    other = run(batch, jax.random.key(1))
    assert float(once[0]) == float(again[0])
    assert len({float(x[0]) for x in (sure, once, other)}) == 3


def test_prompts_carry_no_loss(run, sequences):
    """Another target or another token where nothing is learnt from changes nothing."""
    batch = pack(sequences, "shared_prefix")
    noise = np.random.default_rng(2).integers(0, 60, batch.tokens.shape).astype(np.int32)
    changed = batch.replace(
        targets=np.where(batch.weights > 0, batch.targets, noise),
        tokens=np.where(batch.segment_ids == 0, noise, batch.tokens),
    )
    assert float(run(changed)[0]) == float(run(batch)[0])


def test_groups_tell_their_parts_of_the_loss(tiny, sequences):
    """Rows of two groups in one batch: each has the loss it has alone."""
    rows = pack(sequences, "pad")
    groups = np.array([0, 1, 1, 0, 1, 0, 0], np.int32)
    loss = jax.jit(causal_lm(tiny.model, groups=3))
    frozen = {"params": tiny.params, "fixed": {}}
    total, weight, parts = loss({}, frozen, rows.replace(groups=groups), None)
    assert float(parts["loss"].sum()) == pytest.approx(float(total), rel=1e-6)
    assert float(parts["weight"].sum()) == float(weight)
    for group in (0, 1):
        own = jax.tree.map(lambda x, group=group: x[groups == group], rows)
        alone, targets, _ = loss({}, frozen, own.replace(groups=groups[groups == group]), None)
        assert float(parts["loss"][group]) == pytest.approx(float(alone), rel=1e-5)
        assert float(parts["weight"][group]) == float(targets)
    assert parts["examples"].tolist() == [4, 3, 0]
