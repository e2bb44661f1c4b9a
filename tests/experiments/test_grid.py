import dataclasses

import pytest

from ecomjax.errors import UserError
from ecomjax.experiments import grid
from ecomjax.experiments.config import FinetuneConfig, IclConfig, MergedConfig, ScoreConfig
from ecomjax.experiments.grid import Choice


@pytest.fixture(scope="module")
def make(make_config):
    """Function of what differs -> the runs of a study on two tasks."""

    def runs(**changes):
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        tasks = {"tasks": ("esci", "queryner")}
        return grid.runs(make_config("study", "smoke", tasks | changed))

    return runs


def names(runs):
    return [run.name for run in runs]


def test_names_say_what_a_run_is_and_every_run_comes_after_what_it_needs(make):
    runs = make(grid__learning_rates=(5e-4, 1e-3), grid__merge_methods=("ties",))
    assert names(runs) == [
        "few-shot-esci-n24-s0",
        "few-shot-queryner-n24-s0",
        "lora-esci-n24-s0-lr5e-4",
        "lora-esci-n24-s0-lr1e-3",
        "lora-esci-n24-s0",
        "lora-queryner-n24-s0-lr5e-4",
        "lora-queryner-n24-s0-lr1e-3",
        "lora-queryner-n24-s0",
        "mixed-concatenate-n24-s0-lr5e-4",
        "mixed-concatenate-n24-s0-lr1e-3",
        "mixed-concatenate-n24-s0",
        "merged-ties-all-n24-s0",
        "merged-ties-all-n24-s0-scores",
    ]
    for place, run in enumerate(runs):
        assert set(run.needs) <= set(names(runs)[:place])
    by_name = {run.name: run for run in runs}
    merged = by_name["merged-ties-all-n24-s0"]
    assert merged.needs == ("lora-esci-n24-s0", "lora-queryner-n24-s0")
    assert isinstance(merged.config, MergedConfig) and merged.config.method == "ties"
    scores = by_name["merged-ties-all-n24-s0-scores"]
    assert isinstance(scores.config, ScoreConfig) and not scores.config.base
    assert list(scores.config.tasks) == ["esci", "queryner"]
    assert [run.name for run in runs if run.scored] == [
        *("few-shot-esci-n24-s0", "few-shot-queryner-n24-s0", "lora-esci-n24-s0"),
        *("lora-queryner-n24-s0", "mixed-concatenate-n24-s0", "merged-ties-all-n24-s0-scores"),
    ]


def test_sizes_seeds_and_candidates_multiply(make):
    axes = {"train_sizes": (8, 0), "seeds": (1, 2), "learning_rates": (1e-4, 1e-3)}
    changes = {f"grid__{key}": value for key, value in axes.items()}
    runs = make(**changes, grid__epochs=(1, 2), systems=("lora", "mixed", "few_shot"))
    assert len(set(names(runs))) == len(runs)
    trained = [run for run in runs if isinstance(run.config, FinetuneConfig)]
    # 2 sizes, 2 seeds, 4 candidates; the tasks, and their mixture.
    assert len(trained) == 2 * 2 * 4 * 3
    for run in trained:
        config = run.config
        assert config.data.train_size == run.train_size
        assert config.training.seed == run.seed
        assert run.name.endswith(
            f"-lr{'1e-3' if config.optimizer.learning_rate == 1e-3 else '1e-4'}"
            f"-e{config.training.epochs}"
        )
    assert "lora-esci-all-s2-lr1e-4-e2" in names(runs)
    for run in runs:
        if isinstance(run.config, Choice):
            assert run.config.candidates == run.needs and len(run.needs) == 4
            assert all(name.startswith(f"{run.name}-lr") for name in run.needs)
        if isinstance(run.config, IclConfig):
            assert run.config.data.train_size == 0  # All rows, the largest of the sizes.


def test_a_candidate_is_its_section_but_for_what_the_grid_varies(make, make_config):
    config = make_config("study", "smoke")
    run = make(grid__learning_rates=(7e-4,), grid__seeds=(5,))[2]
    section = config.finetune["esci"]
    assert run.config == dataclasses.replace(
        section,
        optimizer=dataclasses.replace(section.optimizer, learning_rate=7e-4),
        training=dataclasses.replace(section.training, seed=5),
    )


def test_adapters_of_several_seeds_are_merged_within_a_task(make):
    runs = {run.name: run for run in make(grid__seeds=(3, 4))}
    merged = runs["merged-linear-esci-seeds-n24-s3"]
    assert merged.needs == ("lora-esci-n24-s3", "lora-esci-n24-s4")
    assert list(runs[f"{merged.name}-scores"].config.tasks) == ["esci"]
    assert merged.label == "merged seeds (linear)"


def test_pairs_of_tasks_are_merged_where_that_is_asked(make, make_config):
    three = ("esci", "queryner", "review_summarization")
    runs = {run.name: run for run in make(tasks=three, grid__merge_pairs=True)}
    merged = [run.tasks for run in runs.values() if isinstance(run.config, MergedConfig)]
    assert merged == [three, three[:2], three[::2], three[1:]]
    pair = runs["merged-linear-esci+queryner-n24-s0"]
    assert pair.label == "merged (linear, esci+queryner)"
    assert not any("+" in name for name in names(make(tasks=three)))


def test_mixtures_are_of_the_tasks_that_are_compared(make):
    runs = make(systems=("mixed",), grid__mixtures=("concatenate", "proportional"))
    found = [run for run in runs if isinstance(run.config, FinetuneConfig)]
    assert [run.config.mixture.policy for run in found] == ["concatenate", "proportional"]
    for run in found:
        assert list(run.config.tasks) == list(run.config.mixture.weights) == ["esci", "queryner"]


def test_conventional_models_are_tuned_like_adapters_with_learning_rates_of_their_own(make_config):
    rates = {"grid.learning_rates": (1e-3,), "grid.conventional_learning_rates": (1e-5, 2e-4)}
    config = make_config("study", "smoke", {"tasks": ("esci",)} | rates, "any")
    runs = [run for run in grid.runs(config) if run.system == "conventional"]
    name = "minilm_l6-esci-n24-s0"
    assert names(runs) == [f"{name}-lr1e-5", f"{name}-lr2e-4", name]
    assert {run.label for run in runs} == {"minilm_l6"}
    assert {run.name for run in grid.runs(config)} >= {"lora-esci-n24-s0-lr1e-3"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"grid.seeds": (1, 1)}, "config.grid.seeds"),
        ({"grid.seeds": ()}, "config.grid.seeds"),
        ({"grid.learning_rates": (0.0,)}, r"config.grid.learning_rates\[0\]"),
        ({"grid.mixtures": ("even",)}, r"config.grid.mixtures\[0\]"),
        ({"systems": ("merged",)}, "add lora"),
        ({"systems": ("prompted",)}, r"config.systems\[0\]"),
        ({"tasks": ("esci", "instruction")}, "config.finetune"),
        ({"tasks": ()}, "config.tasks"),
    ],
)
def test_a_grid_that_makes_no_sense_is_told_by_its_key(make_config, changes, told):
    with pytest.raises(UserError, match=told):
        make_config("study", "smoke", changes)
