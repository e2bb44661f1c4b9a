import dataclasses

import pytest
from ml_collections import ConfigDict

from configs import common, export, finetune, icl, merged, models, plans, score, study
from ecomjax.experiments.config import from_config, to_dict
from ecomjax.hf import presets

ALL = [
    *(
        (module, f"{task}{option}")
        for module in (finetune, icl)
        for task in common.TASKS
        for option in ("", ",smoke")
    ),
    (finetune, "queryner,minilm_l6"),
    (finetune, "instruction,roberta_base,smoke"),
    (finetune, "esci+queryner,t5_small"),
    (finetune, "review_summarization,flan_t5_xl"),
    (study, "quickstart"),
    (study, "smoke"),
    (study, "real"),
    (study, "own"),
    *((plans, name) for name in plans.PLANS),
    (merged, ""),
    (merged, "llama2_7b"),
    (merged, "esci+queryner,smollm2_360m"),
    (export, ""),
    (export, "llama2_7b"),
    (score, "esci+queryner,smollm2_360m"),
]


def keys(values, prefix=""):
    """All dotted keys of nested dicts."""
    found = set()
    for key, value in values.items():
        path = f"{prefix}{key}"
        found |= keys(value, f"{path}.") if isinstance(value, dict) else {path}
    return found


@pytest.mark.parametrize(("module", "arg"), ALL)
def test_every_config_is_valid_and_spells_out_every_key(module, arg):
    config = module.get_config(arg)
    assert keys(config.to_dict()) == keys(to_dict(from_config(config)))


@pytest.mark.parametrize(("module", "arg"), ALL)
def test_every_override_keeps_its_type(module, arg):
    """A key written as 1 where 1.0 is meant would refuse 0.5 on the command line."""
    spelled = keys_and_types(module.get_config(arg).to_dict())
    assert spelled == keys_and_types(dataclasses.asdict(from_config(module.get_config(arg))))


def keys_and_types(values):
    return {
        key: keys_and_types(value) if isinstance(value, dict) else type(value)
        for key, value in values.items()
    }


def test_configs_are_fresh_at_every_call():
    first = finetune.get_config("esci")
    first.adapter.rank = 1
    assert finetune.get_config("esci").adapter.rank == 16


def test_an_override_of_a_study_reaches_all_its_experiments():
    config = study.get_config("quickstart")
    config.data.source, config.data.path, config.model.remat = "local", "some/folder", "full"
    result = from_config(config)
    for section in (*result.finetune.values(), *result.icl.values(), result.mixed):
        assert section.data.path == "some/folder"
        assert section.model.remat == "full"


@pytest.mark.parametrize("task", study.TASKS["quickstart"])
def test_a_task_of_a_study_is_one_task_however_it_is_asked(task):
    config = study.get_config("quickstart")
    options = config.finetune[task].tasks[task].options
    for name in options:
        options[name] = {str: "changed", bool: not options[name], int: 7}[type(options[name])]
    told = dict(options)
    assert dict(config.icl[task].task.options) == told == dict(config.mixed.tasks[task].options)
    if task in config.conventional:
        assert dict(config.conventional[task].tasks[task].options) == told


def test_smoke_is_smaller():
    full, smoke = (from_config(study.get_config(arg)) for arg in ("quickstart", "smoke"))
    assert smoke.smoke and not full.smoke
    assert 0 < smoke.data.train_size < 100
    assert smoke.finetune["esci"].training.epochs < full.finetune["esci"].training.epochs


@pytest.mark.parametrize(
    ("module", "arg", "told"),
    [
        (finetune, "", "configs/finetune.py:queryner"),
        (finetune, "quieryner", "configs/finetune.py:queryner"),
        (icl, "esci,fast", "configs/icl.py:esci,smoke"),
        (icl, "esci,smoke,llama9", "configs/models.py"),
        (study, "queryner", "configs/study.py:quickstart"),
        (merged, "llama9", "configs/merged.py:llama2_7b"),
        (export, "llama9", "configs/export.py:llama2_7b"),
        (score, "", "configs/score.py:queryner"),
        (plans, "llama2_7b", "configs/plans.py:llama2_7b_lora"),
    ],
)
def test_an_unknown_argument_lists_the_known_ones(module, arg, told):
    with pytest.raises(ValueError, match="unknown") as caught:
        module.get_config(arg)
    assert told in str(caught.value)


def test_presets_fill_the_section_of_the_model():
    for name in models.PRESETS:
        assert isinstance(models.get(name), ConfigDict)
        assert models.get(name).name == name


def test_a_model_is_chosen_by_its_name():
    config = finetune.get_config("esci,mixtral_8x7b,smoke")
    assert (config.model.name, config.model.param_dtype) == ("mixtral_8x7b", "bfloat16")
    assert config.data.train_size == finetune.get_config("esci,smoke").data.train_size


def test_how_a_model_is_trained_depends_on_its_kind():
    tuned = {
        name: from_config(finetune.get_config(f"esci,{name}")).training
        for name in ("smollm2_135m", "minilm_l6", "t5_small", "flan_t5_xl")
    }
    assert [tuned[name].tune for name in tuned] == ["lora", "all", "all", "lora"]
    assert [tuned[name].packing for name in tuned] == ["shared_prefix", *["plain"] * 3]
    encoder = finetune.get_config("queryner,minilm_l6")
    assert (encoder.optimizer.learning_rate, encoder.training.epochs) == (2e-4, 4)
    assert encoder.training.batch_size == 32


def test_the_kinds_of_models_are_those_of_their_presets():
    by_type = {name: preset.fields["model_type"] for name, preset in presets.PRESETS.items()}
    encoders = {name for name, kind in by_type.items() if "bert" in kind}
    others = {name for name, kind in by_type.items() if kind in ("t5", "bart")}
    assert (set(models.ENCODERS), set(models.ENCODER_DECODERS)) == (encoders, others)


def test_every_known_model_has_a_preset():
    assert set(models.PRESETS) == set(presets.PRESETS)
