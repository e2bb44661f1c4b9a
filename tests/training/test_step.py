import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.training.losses import causal_lm
from ecomjax.training.state import new_state
from ecomjax.training.step import make_joint_train_step, make_loss_pass, make_train_step
from ecomjax.typing import Batch

pytestmark = pytest.mark.usefixtures("loose_promotion")
RNG = np.random.default_rng(0)
ROWS, T, V = 8, 12, 61


@pytest.fixture(scope="module")
def rows():
    """Eight rows of 2 to 12 tokens, of which 1 to 11 are targets."""
    lengths, learnt = np.array([12, 3, 7, 2, 5, 12, 4, 9]), np.array([11, 1, 2, 1, 4, 1, 3, 8])
    slots = np.broadcast_to(np.arange(T, dtype=np.int32), (ROWS, T))
    targeted = (slots < lengths[:, None] - 1) & (slots >= lengths[:, None] - 1 - learnt[:, None])
    tokens, targets = RNG.integers(0, V, (2, ROWS, T)).astype(np.int32)
    inside = (slots < lengths[:, None]).astype(np.int32)
    return Batch(tokens, slots * inside, inside, targets, targeted.astype(np.float32))


def cut(rows, microbatches):
    """The rows as leaves [M, B, T]."""
    return jax.tree.map(lambda x: jnp.asarray(x).reshape(microbatches, -1, x.shape[-1]), rows)


def add_empty(rows, count):
    return jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:count])]), rows)


def toy_loss(trained, frozen, batch, key):
    """Squared error of a table lookup; not a number where there is no target."""
    error = (trained["w"][batch.tokens] - batch.targets) * frozen
    weight = batch.weights.sum()
    return (error**2 * batch.weights).sum() + 0.0 / weight, weight, {}


def toy_state(optimizer, seed=0):
    return new_state({"w": jnp.arange(V) / 10}, optimizer, jax.random.key(seed))


def slope(step):
    return 0.1 / (step + 1)


def run_toy(batch, loss=toy_loss, optimizer=None):
    step = make_train_step(loss, optimizer or optax.sgd(1.0), slope)
    return step(toy_state(optimizer or optax.sgd(1.0)), jnp.float32(0.5), batch)


def naive_toy(rows):
    """(loss, gradient) of the toy, token by token."""
    total, gradient = 0.0, np.zeros(V)
    fields = (np.ravel(x) for x in (rows.tokens, rows.targets, rows.weights))
    for token, target, weight in zip(*fields, strict=True):
        error = (token / 10 - target) * 0.5
        total += weight * error**2
        gradient[token] += weight * 2 * error * 0.5
    return total / rows.weights.sum(), gradient / rows.weights.sum()


@pytest.mark.parametrize("microbatches", [1, 2, 8])
def test_one_division_by_all_targets(rows, microbatches):
    """Not the mean of the means of microbatches, whose lengths differ elevenfold."""
    state, metrics = run_toy(cut(rows, microbatches))
    loss, gradient = naive_toy(rows)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-6)
    expected = np.arange(V) / 10 - gradient
    np.testing.assert_allclose(state.trained["w"], expected, rtol=1e-5, atol=1e-5)


def test_metrics(rows):
    _, metrics = run_toy(cut(rows, 2))
    assert set(metrics) == {
        "loss", "gradient_norm", "learning_rate", "skipped", "target_tokens", "tokens",
    }  # fmt: skip
    assert float(metrics["gradient_norm"]) == pytest.approx(
        np.linalg.norm(naive_toy(rows)[1]), rel=1e-5
    )
    assert float(metrics["target_tokens"]) == 31
    assert int(metrics["tokens"]) == 54
    assert float(metrics["learning_rate"]) == pytest.approx(0.1)


def test_groups_are_told_apart(rows):
    """Sums over microbatches, divided once; a group without a target in the step has no loss."""

    def grouped(trained, frozen, batch, key):
        total, weight, _ = toy_loss(trained, frozen, batch, key)
        by_group = jnp.zeros(2).at[1]
        parts = {"loss": by_group.set(total), "weight": by_group.set(weight)}
        return total, weight, parts | {"examples": by_group.set(1.0)}

    step = make_train_step(grouped, optax.sgd(1.0), slope, ("a", "b"))
    _, metrics = step(toy_state(optax.sgd(1.0)), jnp.float32(0.5), cut(add_empty(rows, 2), 5))
    assert float(metrics["loss/b"]) == pytest.approx(float(metrics["loss"]))
    assert np.isnan(float(metrics["loss/a"]))
    assert (float(metrics["examples/a"]), float(metrics["examples/b"])) == (0, 4)


def test_empty_microbatches_are_skipped(rows):
    """The toy loss of one is not a number, and so would be its gradient."""
    _, expected = run_toy(cut(rows, 8))
    state, metrics = run_toy(cut(add_empty(rows, 4), 12))
    assert float(metrics["loss"]) == float(expected["loss"])
    assert float(metrics["gradient_norm"]) == float(expected["gradient_norm"])
    assert np.isfinite(state.trained["w"]).all()


def test_f34_accumulation_of_a_model(make_llama, rows):
    """8 x 1, 1 x 8 and 2 x 4 rows: loss within 1e-6, every gradient within 5e-5 of its norm."""
    tiny, rng = make_llama(layers=2), np.random.default_rng(1)
    _, adapter = lora.init(tiny.params, tiny.axes, [LoraRule(rank=3)], jax.random.key(0))
    adapter = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), adapter)
    trained, fixed = lora.split(adapter)
    frozen = {"params": tiny.params, "fixed": fixed}
    step = make_train_step(causal_lm(tiny.model), optax.sgd(1.0), slope)
    results = {}
    for microbatches in (1, 2, 8):
        state = new_state(jax.tree.map(jnp.array, trained), optax.sgd(1.0), jax.random.key(0))
        state, metrics = step(state, frozen, cut(rows, microbatches))
        gradients = jax.tree.map(lambda new, old: new - old, state.trained, trained)
        results[microbatches] = float(metrics["loss"]), trees.flatten(gradients)
    loss, gradients = results.pop(1)
    assert loss > 0.1
    for other_loss, others in results.values():
        assert other_loss == pytest.approx(loss, rel=1e-6)
        for path, leaf in gradients.items():
            for name in ("a", "b"):
                ours, exact = getattr(others[path], name), getattr(leaf, name)
                assert np.linalg.norm(exact) > 0
                assert np.linalg.norm(ours - exact) <= 5e-5 * np.linalg.norm(exact)


def test_runs_side_by_side_are_those_of_each_alone(make_llama, rows):
    """Two steps: adapters, dropout, learning rates and numbers of microbatches of their own."""
    tiny, rng = make_llama(layers=2), np.random.default_rng(1)
    loss = causal_lm(tiny.model)
    optimizers = [(optax.sgd(0.1), slope), (optax.adamw(1e-2), slope), (optax.adamw(3e-2), slope)]
    batches = [cut(rows, 4), cut(jax.tree.map(lambda x: x[::-1][:4], rows), 2), cut(rows, 4)]
    base, states, frozen = {"params": tiny.params}, [], []
    for seed, (optimizer, _) in enumerate(optimizers):
        key = jax.random.key(seed)
        _, adapter = lora.init(tiny.params, tiny.axes, [LoraRule(rank=3, dropout=0.3)], key)
        adapter = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), adapter)
        trained, fixed = lora.split(adapter)
        states.append(new_state(jax.tree.map(jnp.asarray, trained), optimizer, key))
        frozen.append({"fixed": fixed})
    together = make_joint_train_step(loss, optimizers)
    copies, found = jax.tree.map(jnp.copy, states), []
    for _ in range(2):
        found = together(copies, base, frozen, batches)
        copies = [state for state, _ in found]
    for i, (state, metrics) in enumerate(found):
        step = make_train_step(loss, *optimizers[i])
        for _ in range(2):
            states[i], expected = step(states[i], base | frozen[i], batches[i])
        assert int(state.step) == 2
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5), name
        leaves = zip(*map(jax.tree.leaves, (state.trained, states[i].trained)), strict=True)
        for one, alone in leaves:
            assert np.linalg.norm(one - alone) <= 1e-5 * np.linalg.norm(alone)
    assert len({float(metrics["loss"]) for _, metrics in found}) == 3


def test_runs_side_by_side_share_the_base(make_llama, rows):
    """No operation has a kernel of it once for each run, and what none wants is skipped."""
    tiny = make_llama(layers=2)
    loss, optimizer = causal_lm(tiny.model), optax.sgd(0.1)
    _, adapter = lora.init(tiny.params, tiny.axes, [LoraRule(rank=3)], jax.random.key(0))
    trained, fixed = lora.split(adapter)
    state = new_state(jax.tree.map(jnp.asarray, trained), optimizer, jax.random.key(0))
    step = make_joint_train_step(loss, [(optimizer, slope)] * 5)
    given = [state] * 5, {"params": tiny.params}, [{"fixed": fixed}] * 5, [cut(rows, 2)] * 5
    text = step.lower(*given).as_text()
    shapes = {tuple(leaf.shape) for leaf in jax.tree.leaves(tiny.params) if leaf.ndim > 1}
    shapes |= {shape[1:] for shape in shapes if len(shape) > 2}
    for shape in shapes:
        dims = "x".join(map(str, shape))
        assert f"tensor<{dims}xf32>" in text
        for place in range(len(shape) + 1):
            copied = "x".join(map(str, (*shape[:place], 5, *shape[place:])))
            assert f"tensor<{copied}xf32>" not in text, copied
    alone = make_train_step(loss, optimizer, slope)
    expected = alone.lower(state, {"params": tiny.params, "fixed": fixed}, cut(rows, 2)).as_text()
    assert text.count("stablehlo.case") == expected.count("stablehlo.case") > 0


WAYS = {
    "remat": {"remat": "full"},
    "unrolled, with remat of dots": {"scan": False, "remat": "dots"},
    "nothing donated": {"donate": False},
}


@pytest.fixture(scope="module")
def stepped(make_llama, rows):
    """Function (changes of how a step is run) -> loss, and trained parameters a layer."""

    @functools.cache
    def run(scan=True, remat="none", donate=True):
        tiny, rng = make_llama(layers=2, scan=scan, remat=remat), np.random.default_rng(1)
        stacked = make_llama(layers=2)
        _, adapter = lora.init(stacked.params, stacked.axes, [LoraRule(rank=3)], jax.random.key(0))
        adapter = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), adapter)
        if not scan:
            adapter = trees.unstack_layers(adapter)
        trained, fixed = lora.split(adapter)
        frozen = jax.tree.map(jnp.asarray, {"params": tiny.params, "fixed": fixed})
        step = make_train_step(causal_lm(tiny.model), optax.sgd(1.0), slope)
        if not donate:
            step = jax.jit(step.__wrapped__)
        state = new_state(jax.tree.map(jnp.array, trained), optax.sgd(1.0), jax.random.key(0))
        before = jax.tree.leaves(state.trained)
        state, metrics = step(state, frozen, cut(rows, 2))
        assert all(leaf.is_deleted() == donate for leaf in before)
        moved = jax.tree.map(lambda new, old: np.asarray(new - old), state.trained, trained)
        return float(metrics["loss"]), moved if scan else trees.stack_layers(moved)

    return run


@pytest.mark.parametrize("way", WAYS)
def test_f36_a_step_does_the_same_however_it_is_run(stepped, way):
    loss, moved = stepped()
    other_loss, others = stepped(**WAYS[way])
    assert other_loss == pytest.approx(loss, rel=1e-6)
    expected, found = trees.flatten(moved), trees.flatten(others)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        for name in ("a", "b"):
            ours, exact = getattr(found[path], name), getattr(leaf, name)
            assert np.linalg.norm(ours - exact) <= 5e-6 * np.linalg.norm(exact) > 0, (path, name)


def test_f36_a_loss_is_the_same_op_by_op(make_llama, rows):
    """And so is a step of the toy, whose gradient has few operations to compile one by one."""
    tiny = make_llama(layers=2)
    params = jax.tree.map(jnp.asarray, tiny.params)
    arguments = ({}, {"params": params, "fixed": {}}, cut(rows, 1))
    pass_ = make_loss_pass(causal_lm(tiny.model))
    compiled = pass_(*arguments), run_toy(cut(rows, 2))
    with jax.disable_jit():
        found = pass_(*arguments), run_toy(cut(rows, 2))
    assert float(compiled[0][0]) > 1
    for ours, expected in zip(*map(jax.tree.leaves, (found, compiled)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_traced_once(rows):
    traces = []

    def counted(*args):
        traces.append(1)
        return toy_loss(*args)

    optimizer = optax.adamw(slope)
    step, state = make_train_step(counted, optimizer, slope), toy_state(optimizer)
    rates, structure = [], jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for number in range(4):
        state, metrics = step(state, jnp.float32(0.5), cut(rows, 2))
        rates.append(float(metrics["learning_rate"]))
        first = len(traces) if number == 0 else first
    assert len(traces) == first > 0
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == structure
    assert int(state.step) == 4
    np.testing.assert_allclose(rates, [slope(step) for step in range(4)], rtol=1e-6)


def noisy_loss(trained, frozen, batch, key):
    weight = batch.weights.sum()
    return weight * jax.random.uniform(key), weight, {}


def test_every_microbatch_of_every_step_has_its_own_key(rows):
    """And the key depends on nothing but seed, step and number: a resumed run draws the same."""
    step = make_train_step(noisy_loss, optax.sgd(0.0), slope)
    same = jax.tree.map(lambda x: np.stack([x[:1]] * 2), rows)

    def losses(seed, batch, start=0, steps=2):
        state = toy_state(optax.sgd(0.0), seed).replace(step=jnp.int32(start))
        drawn = []
        for _ in range(steps):
            state, metrics = step(state, None, batch)
            drawn.append(float(metrics["loss"]))
        return drawn

    both = losses(0, same)
    assert len({*both, *losses(1, same)}) == 4
    assert losses(0, same) == both
    assert losses(0, same, start=1, steps=1) == both[1:]
    alone = losses(0, jax.tree.map(lambda x: x[:1], same), steps=1)[0]
    assert both[0] != pytest.approx(alone, rel=1e-3)


def test_loss_pass_sums_without_a_key(rows):
    keys = []

    def watched(trained, frozen, batch, key):
        keys.append(key)
        return toy_loss(trained, frozen, batch, key)

    total, weight = make_loss_pass(watched)(
        {"w": jnp.arange(V) / 10}, jnp.float32(0.5), cut(add_empty(rows, 4), 6)
    )
    assert float(weight) == 31
    assert float(total) / 31 == pytest.approx(naive_toy(rows)[0], rel=1e-6)
    assert set(keys) == {None}


@jax.custom_jvp
def nothing(w, slope):
    """0, of the given slope in w."""
    return jnp.zeros(())


nothing.defjvp(lambda primals, tangents: (nothing(*primals), primals[1] * tangents[0]))


def broken_loss(trained, frozen, batch, key):
    """The toy loss times a number, and another that is added to a gradient alone."""
    scale, added = frozen
    total, weight, aux = toy_loss(trained, jnp.float32(0.5), batch, key)
    return total * scale + nothing(trained["w"][0], added), weight, aux


FAULTS = {
    "loss NaN": (jnp.nan, 0.0),
    "loss inf": (jnp.inf, 0.0),
    "gradient alone inf": (1.0, jnp.inf),
    "gradient norm beyond float32": (1.0, 1e38),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_f33_a_step_that_is_not_finite_changes_nothing_and_the_next_goes_on(rows, fault):
    """The run is the one without that step, but for the counters; learning rate included."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(slope, weight_decay=0.1))
    step, batch = make_train_step(broken_loss, optimizer, slope), cut(rows, 2)
    good, bad = (jnp.float32(1.0), jnp.float32(0.0)), tuple(map(jnp.float32, FAULTS[fault]))

    def run(scales):
        state, told = toy_state(optimizer), []
        for scale in scales:
            state, metrics = step(state, scale, batch)
            told.append(jax.device_get(metrics))
        return jax.device_get(state), told

    state, told = run([good, bad, bad, good])
    expected, without = run([good, good])
    assert [int(x["skipped"]) for x in told] == [0, 1, 2, 2]
    assert np.isfinite(told[1]["loss"]) == ("gradient" in fault)
    assert (int(state.step), int(state.skipped)) == (4, 2)
    for one, other in zip(
        jax.tree.leaves((state.trained, state.optimizer)),
        jax.tree.leaves((expected.trained, expected.optimizer)),
        strict=True,
    ):
        assert one.tobytes() == other.tobytes()
    for one, other in ((told[0], without[0]), (told[3], without[1])):
        assert {k: v.tobytes() for k, v in one.items() if k != "skipped"} == {
            k: v.tobytes() for k, v in other.items() if k != "skipped"
        }


def test_f33_a_large_loss_is_no_reason_to_skip(rows):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(slope))
    step = make_train_step(broken_loss, optimizer, slope)
    before = np.asarray(toy_state(optimizer).trained["w"])
    state, metrics = step(toy_state(optimizer), (jnp.float32(1e6), jnp.float32(0.0)), cut(rows, 2))
    assert int(metrics["skipped"]) == 0
    assert 0 < np.abs(state.trained["w"] - before).max() <= 0.11


def test_f26_a_batch_without_targets_changes_nothing_and_has_no_loss(rows):
    state, metrics = run_toy(cut(rows.replace(weights=np.zeros_like(rows.weights)), 2))
    assert np.isnan(float(metrics["loss"])) and float(metrics["target_tokens"]) == 0
    assert np.array_equal(state.trained["w"], toy_state(optax.sgd(1.0)).trained["w"])
