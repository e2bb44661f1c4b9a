"""The Trainer of transformers learns from what ours learns from, and as ours does."""

import jax
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.data.encoded import NO_CLASS, Joined
from ecomjax.experiments import finetune
from ecomjax.experiments.assembly import load_base, make_tasks
from ecomjax.experiments.benchmarks import recipe, trainer
from ecomjax.experiments.benchmarks.peer import load_peer
from ecomjax.experiments.benchmarks.training import NO_LABEL
from ecomjax.experiments.initial import init_adapter, make_optimizer, make_rules
from ecomjax.experiments.learners import with_head
from ecomjax.experiments.task_data import plan_of
from ecomjax.experiments.workdir import Workdir
from ecomjax.hf.checkpoints import load_pretrained, save_pretrained
from ecomjax.hf.peft import read_adapter, write_adapter

pytestmark = pytest.mark.usefixtures("loose_promotion")

ALL_AT_ONCE = {
    "data.train_size": 8,
    "training.batch_size": 8,
    "training.epochs": 3,
    "training.dropout": 0.0,
    "optimizer.learning_rate": 1e-2,
    "optimizer.weight_decay": 0.1,
    "optimizer.warmup": 0.4,
}
"""Every step is over all examples, so their order is of no matter."""


@pytest.fixture(autouse=True)
def peers():
    pytest.importorskip("torch")
    pytest.importorskip("peft")


@pytest.fixture
def words(make_config, tiny_encoder):
    """Function (changes) -> config of an encoder that tags words."""

    def make(changes=()):
        own = {"model.path": str(tiny_encoder), "training.row_length": 96}
        return make_config("finetune", "queryner,minilm_l6", own | dict(changes))

    return make


def trained(config, base, model, folder):
    """The Trainer, done, and the rate of each of its steps."""
    import transformers

    rates = []

    class Told(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **more):
            rates.append(optimizer.optimizer.param_groups[0]["lr"])

    examples = trainer.examples_of(config, base)
    made = trainer.make_trainer(config, base.tokenizer, model, examples, str(folder))
    made.add_callback(Told())
    made.train()
    return made, rates


@pytest.mark.parametrize("task", ["esci", "queryner"])
def test_steps_and_their_rates_are_those_of_ours(make_config, words, tmp_path, task):
    """Of 23 examples, so that the last step of an epoch is smaller."""
    changes = {"data.train_size": 23, "optimizer.warmup": 0.4, "optimizer.learning_rate": 0.02}
    config = make_config("finetune", task, changes) if task == "esci" else words(changes)
    base = load_base(config.model, config.mesh, any_kind=True)
    examples = trainer.examples_of(config, base)
    steps = len(plan_of(Joined([examples]), [0], config, 1))
    _, schedule = make_optimizer(config.optimizer, steps)
    done, rates = trained(config, base, trainer.start(config, base), tmp_path)
    assert done.state.global_step == steps == 12
    np.testing.assert_allclose(rates, [schedule(step) for step in range(steps)], rtol=1e-6)


def test_examples_are_read_as_ours_with_labels_where_ours_have_a_loss(make_config, words):
    config = make_config("finetune")
    examples = trainer.examples_of(config, load_base(config.model))
    assert len(examples) == 24
    for example in examples:
        row = trainer.row_of(example)
        assert row["input_ids"] == list(example.tokens)
        assert row["labels"][: example.prompt] == [NO_LABEL] * example.prompt
        assert row["labels"][example.prompt :] == list(example.tokens[example.prompt :])
    config = words()
    examples = trainer.examples_of(config, load_base(config.model, any_kind=True))
    for example in examples:
        row = trainer.row_of(example)
        assert row["input_ids"] == list(example.tokens)
        given = [NO_CLASS if label == NO_LABEL else label for label in row["labels"]]
        assert list(zip(row["token_type_ids"], given, strict=True)) == list(example.marks)
        assert row["labels"][0] == NO_LABEL and max(row["labels"]) >= 0


def test_from_the_same_adapter_both_end_with_the_same(make_config, tmp_path, monkeypatch):
    """The peer adds up the gradients of two parts of each step, of different targets."""
    import peft

    changes = ALL_AT_ONCE | {"optimizer.weight_decay": 0.0}
    config = recipe.at_last_step(make_config("finetune", "esci", changes), 3)
    base = load_base(config.model, config.mesh)
    key, _ = jax.random.split(jax.random.key(3))
    rules = make_rules(config.adapter)
    _, adapter = init_adapter(base.params, base.axes, rules, key, base.mesh)
    write_adapter(tmp_path / "start", jax.device_get(adapter), base.config, base.identity)

    def same(config, base):
        path = str(tmp_path / "start")
        return peft.PeftModel.from_pretrained(load_peer(base), path, is_trainable=True)

    monkeypatch.setattr(trainer, "start", same)
    finetune.run(config, str(tmp_path / "ours"))
    trainer.train(config, Workdir(tmp_path / "peer"))
    ours, theirs = (
        trees.flatten(read_adapter(tmp_path / side / "adapter", base.config, base.identity))
        for side in ("ours", "peer")
    )
    before = trees.flatten(jax.device_get(adapter))
    for path, leaf in ours.items():
        moved = np.abs(leaf.a - before[path].a).max()
        assert moved > 1e-3
        np.testing.assert_allclose(theirs[path].a @ theirs[path].b, leaf.a @ leaf.b, atol=1e-4)


def test_from_the_same_head_both_end_with_the_same(words, tmp_path):
    config = words(ALL_AT_ONCE)
    tasks, base = make_tasks(config.tasks), load_base(config.model, any_kind=True)
    headed = with_head(base, tasks, config.training)
    save_pretrained(tmp_path / "start", headed.config, headed.params, headed.tokenizer)
    config = recipe.at_last_step(words(ALL_AT_ONCE | {"model.path": str(tmp_path / "start")}), 3)
    recipe.check(config)
    finetune.run(config, str(tmp_path / "ours"))
    trainer.train(config, Workdir(tmp_path / "peer"))
    before, ours, theirs = (
        trees.flatten(load_pretrained("any", str(path)).params)
        for path in (
            tmp_path / "start",
            tmp_path / "ours" / "model",
            tmp_path / "peer" / "model",
        )
    )
    for path, leaf in ours.items():
        # No softmax sees the bias of keys: its gradient is rounding, which Adam makes steps of.
        if not path.endswith("attn/k/bias"):
            np.testing.assert_allclose(theirs[path], leaf, atol=1e-4, err_msg=path)
    moved = {path: np.abs(leaf - before[path]).max() for path, leaf in ours.items()}
    assert moved["head/out/kernel"] > 1e-2


def test_the_seed_draws_the_new_weights(make_config, words):
    def drawn(config, seed, name):
        config = recipe.at_last_step(config, seed)
        base = load_base(config.model, config.mesh, any_kind=True)
        weights = trainer.start(config, base).state_dict()
        return next(value for key, value in weights.items() if name in key).numpy()

    for config, name in ((make_config("finetune"), "lora_A"), (words(), "classifier.weight")):
        first, again, other = (drawn(config, seed, name) for seed in (0, 0, 1))
        assert (first == again).all() and not np.allclose(first, other)
