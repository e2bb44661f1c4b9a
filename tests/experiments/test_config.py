import copy

import pytest
from ml_collections import ConfigDict

from configs import finetune, icl, study
from ecomjax.adapters.rules import EVERY_LINEAR
from ecomjax.errors import UserError
from ecomjax.experiments.config import FinetuneConfig, from_config, to_dict, to_json
from ecomjax.experiments.conversion import section_of
from ecomjax.experiments.sections import AdapterConfig


def plain(make=finetune.get_config, arg="esci"):
    return to_dict(from_config(make(arg)))


def changed(values, path, value):
    """A copy of nested dicts with another value at a dotted path."""
    values = copy.deepcopy(values)
    *parents, key = path.split(".")
    node = values
    for parent in parents:
        node = node[parent]
    node[key] = value
    return values


def test_a_config_becomes_typed_and_immutable():
    config = from_config(finetune.get_config("queryner"))
    assert isinstance(config, FinetuneConfig)
    assert [task.name for task in config.tasks.values()] == ["queryner"]
    assert config.adapter.targets == (EVERY_LINEAR,)
    with pytest.raises(AttributeError):
        config.adapter.rank = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("make", "arg"), [(finetune, "esci"), (icl, "queryner"), (study, "quickstart")]
)
def test_json_and_back_is_the_same_config(make, arg):
    config = from_config(make.get_config(arg))
    assert from_config(to_dict(config)) == config
    assert to_json(config) == to_json(from_config(to_dict(config)))


def test_overrides_of_a_config_dict_arrive():
    config = finetune.get_config("esci")
    config.adapter.rank = 4
    config.adapter.rules = ({"pattern": "layers/attn/q/kernel", "rank": 2, "alpha": 8},)
    adapter = from_config(config).adapter
    assert [(r.pattern, r.rank, r.alpha) for r in adapter.all_rules] == [
        (EVERY_LINEAR, 4, 32.0),
        ("layers/attn/q/kernel", 2, 8.0),
    ]


def test_an_int_will_do_for_a_float_but_nothing_else_for_anything():
    config = from_config(changed(plain(), "adapter.alpha", 8))
    assert isinstance(config.adapter.alpha, float)


@pytest.mark.parametrize(
    ("path", "value", "where", "told"),
    [
        (
            "optimizer.learning_rte",
            1e-3,
            "config.optimizer.learning_rte",
            "optimizer.learning_rate?",
        ),
        ("adaptor", {}, "config.adaptor", "config.adapter?"),
        ("adapter.rank", 0, "config.adapter.rank", "1 or more"),
        ("adapter.rank", 1.0, "config.adapter.rank", "type int"),
        ("adapter.rank", None, "config.adapter.rank", "type int"),
        ("adapter.alpha", 0.0, "config.adapter.alpha", "above 0"),
        ("adapter.dropout", 1.0, "config.adapter.dropout", "[0, 1)"),
        ("adapter.targets", "q", "config.adapter.targets", "type tuple"),
        ("adapter.targets", ["(q"], "config.adapter.targets[0]", "regular expression"),
        ("adapter.targets", ["(" * 5000], "config.adapter.targets[0]", "regular expression"),
        ("adapter.rules", [{"rank": 1}], "config.adapter.rules[0].pattern", "missing key"),
        ("adapter.rules", [{"rnk": 1}], "config.adapter.rules[0].rnk", "rank?"),
        ("data.train_size", -1, "config.data.train_size", "0 or more"),
        ("data.source", "disk", "config.data.source", "synthetic, local, hub"),
        ("data.source", "local", "config.data.path", "folder"),
        ("evaluation.top_p", 0.0, "config.evaluation.top_p", "(0, 1]"),
        ("experiment", "finetuned", "config.experiment", "finetune, icl, study"),
        ("experiment", ["finetune"], "config.experiment", "finetune, icl, study"),
        ("model", "smollm2_135m", "config.model", "section"),
        ("model.remat", True, "config.model.remat", "none, dots, full"),
        ("optimizer.learning_rate", float("nan"), "config.optimizer.learning_rate", "above 0"),
        ("optimizer.learning_rate", float("inf"), "config.optimizer.learning_rate", "above 0"),
        ("optimizer.learning_rate", "1e-3", "config.optimizer.learning_rate", "type float"),
        ("optimizer.learning_rate", True, "config.optimizer.learning_rate", "type float"),
        ("training.seed", True, "config.training.seed", "type int"),
    ],
)
def test_f49_a_mistake_is_told_with_its_path(path, value, where, told):
    with pytest.raises(UserError) as caught:
        from_config(changed(plain(), path, value))
    assert caught.value.where == where
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_section_is_told():
    values = plain()
    del values["training"]
    with pytest.raises(UserError, match=r"missing key: config\.training"):
        from_config(values)


def test_keys_with_a_default_may_be_left_out():
    values = changed(plain(), "adapter", {})
    assert from_config(values).adapter == AdapterConfig()


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("tasks", ["esci", "esci"], "config.tasks"),
        ("tasks", ["esci", "instruction"], "config.finetune"),
        ("finetune.esci.tasks", {"queryner": {"name": "queryner"}}, "config.finetune.esci"),
        ("icl.esci.task.name", "queryner", "config.icl.esci"),
        ("icl.queryner.model.name", "other", "config.icl.queryner"),
        ("finetune.esci.data.seed", 9, "config.finetune.esci"),
        ("icl.esci.fewshot.shots", [0, -1], "config.icl.esci.fewshot.shots[1]"),
    ],
)
def test_a_study_whose_parts_disagree_is_refused(path, value, where):
    with pytest.raises(UserError) as caught:
        from_config(changed(plain(study.get_config, "quickstart"), path, value))
    assert caught.value.where == where


def test_what_is_no_config_at_all_is_refused():
    with pytest.raises(UserError, match="section of keys"):
        section_of(3, "config")
    with pytest.raises(UserError, match="missing key"):
        from_config(ConfigDict())


@pytest.mark.parametrize(
    ("module", "section", "key"),
    [(finetune, "adapter", "targets"), (icl, "fewshot", "shots")],
)
def test_some_tuples_must_hold_something(module, section, key):
    config = module.get_config("esci")
    config[section][key] = ()
    with pytest.raises(UserError, match=rf"empty tuple: config\.{section}\.{key}"):
        from_config(config)


def test_several_tasks_are_a_mixture():
    config = from_config(finetune.get_config("esci+queryner"))
    assert list(config.tasks) == ["esci", "queryner"]
    assert config.mixture.weights == {"esci": 1.0, "queryner": 1.0}


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("tasks", {}, "no tasks: config.tasks"),
        ("tasks", {"../x": {"name": "esci"}}, "'../x': config.tasks"),
        ("mixture", {"policy": "weights"}, r"weights for \[\]: config.mixture.weights"),
        ("mixture.policy", "random", "config.mixture.policy"),
        ("mixture.temperature", 2.0, "'concatenate' does not use it: config.mixture.temperature"),
        ("mixture.weights", {"a": 1.0, "b": 2.0}, "does not use it: config.mixture.weights"),
        ("mixture.examples", 9, "does not use it: config.mixture.examples"),
        ("tasks.esci.options", 3, "config.tasks.esci.options"),
    ],
)
def test_tasks_and_mixtures_that_cannot_be_are_refused(path, value, told):
    with pytest.raises(UserError, match=told):
        from_config(changed(plain(), path, value))


def test_pissa_of_a_quantized_base_is_refused():
    values = changed(plain(), "adapter.pissa", True)
    from_config(values)
    with pytest.raises(UserError, match=r"config\.adapter\.pissa; set config\.model\.quant"):
        from_config(changed(values, "model.quantization", "nf4"))
