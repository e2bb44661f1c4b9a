"""Sections that the configs share, every key spelled out so that `--config.a.b=c` knows its type.

The values suit SmolLM2-135M on a small CPU machine. What the keys mean stands at the dataclasses
of `ecomjax/experiments/config.py`.
"""

from ml_collections import ConfigDict

from configs import models

TASKS = {
    "esci": {"max_new_tokens": 8, "batch_size": 16, "validation": 200},
    "queryner": {"max_new_tokens": 112, "batch_size": 64, "validation": 64},
}
"""What differs from task to task: length of answers, prompts at once, validation examples."""


def choose(arg: str, choices, file: str) -> str:
    """`arg` if it is one of `choices`; the message of the ValueError is for the user."""
    if arg not in choices:
        known = ", ".join(f"{file}:{choice}" for choice in choices)
        raise ValueError(f"unknown argument {arg!r} of {file}; choose one of {known}")
    return arg


def parse(arg: str, file: str) -> tuple[str, str, bool]:
    """Task, model and whether it is a smoke test: "queryner,llama3_1_8b,smoke"."""
    task, *options = arg.split(",")
    choose(task, TASKS, file)
    model, smoke = models.DEFAULT, False
    for option in options:
        if option == "smoke":
            smoke = True
        elif option in models.PRESETS:
            model = option
        else:
            raise ValueError(
                f"unknown option {option!r} of {file}; use {file}:{task},smoke "
                f"or a model of configs/models.py, such as {file}:{task},{model}"
            )
    return task, model, smoke


def task(name: str) -> ConfigDict:
    return ConfigDict({"name": name, "prompt": "chat"})


def data(smoke: bool = False) -> ConfigDict:
    return ConfigDict(
        {
            "source": "synthetic",
            "path": "",
            "revision": "",
            "seed": 0,
            "train_size": 32 if smoke else 0,
            "validation_size": 8 if smoke else 0,
            "test_size": 16 if smoke else 0,
        }
    )


def adapter() -> ConfigDict:
    return ConfigDict(
        {
            "rank": 16,
            "alpha": 32.0,
            "dropout": 0.0,
            "targets": (r"(.*/)?layers/.*(?<!/router)/kernel",),
            "rules": (),
        }
    )


def optimizer() -> ConfigDict:
    return ConfigDict(
        {
            "learning_rate": 1e-3,
            "warmup": 0.03,
            "schedule": "cosine",
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "beta1": 0.9,
            "beta2": 0.999,
        }
    )


def training(task: str, smoke: bool = False) -> ConfigDict:
    return ConfigDict(
        {
            "epochs": 1 if smoke else 3,
            "batch_size": 16,
            "row_length": 512,
            "rows": 1,
            "packing": "shared_prefix",
            "too_long": "drop",
            "seed": 0,
            "evaluate_every": 0,
            "validation_examples": 8 if smoke else TASKS[task]["validation"],
            "select": "metric",
            "patience": 0,
            "checkpoint_every": 50,
            "keep": 2,
        }
    )


def evaluation(task: str, smoke: bool = False) -> ConfigDict:
    return ConfigDict(
        {
            "split": "test",
            "method": "auto",
            "batch_size": TASKS[task]["batch_size"],
            "max_new_tokens": 16 if smoke else TASKS[task]["max_new_tokens"],
            "temperature": 0.0,
            "top_p": 1.0,
            "resamples": 200 if smoke else 2000,
            "seed": 0,
        }
    )


def fewshot(task: str, smoke: bool = False) -> ConfigDict:
    return ConfigDict(
        {
            "shots": (0, 1) if smoke else (0, 1, 3, 8),
            "select_examples": 8 if smoke else TASKS[task]["validation"],
            "seed": 0,
        }
    )
