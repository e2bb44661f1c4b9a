"""Sections that the configs share, every key spelled out so that `--config.a.b=c` knows its type.

The values suit SmolLM2-135M on a small CPU machine. What the keys mean stands at the dataclasses
of `ecomjax/experiments/config.py`.
"""

import inspect

from ml_collections import ConfigDict

from configs import models
from ecomjax.tasks import registry

USUAL = {"max_new_tokens": 64, "batch_size": 16, "validation": 64, "row_length": 1024}
"""Length of answers, prompts at once, validation examples and length of rows of any task."""

UNUSUAL = {
    "esci": {"max_new_tokens": 8, "validation": 200, "row_length": 512},
    "queryner": {"max_new_tokens": 112, "batch_size": 64, "row_length": 512},
    "review_summarization": {"max_new_tokens": 128, "validation": 32},
    "description_generation": {"max_new_tokens": 192, "validation": 32},
}
"""What differs."""

ENCODER_ROWS = {"queryner": 128, "esci": 256}
"""Length of packed rows of an encoder, where it is not its window: every slot is compared with all
of its row, and what is read of these tasks is shorter."""

TASKS = {name: USUAL | UNUSUAL.get(name, {}) for name in registry.TASKS}


def choose(arg: str, choices, file: str) -> str:
    """`arg` if it is one of `choices`; the message of the ValueError is for the user."""
    if arg not in choices:
        known = ", ".join(f"{file}:{choice}" for choice in choices)
        raise ValueError(f"unknown argument {arg!r} of {file}; choose one of {known}")
    return arg


def parse(arg: str, file: str) -> tuple[list[str], str, bool]:
    """Tasks, model and whether it is a smoke test: "esci+queryner,llama3_1_8b,smoke"."""
    first, *options = arg.split(",")
    names = first.split("+")
    for name in names:
        choose(name, TASKS, file)
    model, smoke = models.DEFAULT, False
    for option in options:
        if option == "smoke":
            smoke = True
        elif option in models.PRESETS:
            model = option
        else:
            raise ValueError(
                f"unknown option {option!r} of {file}; use {file}:{first},smoke "
                f"or a model of configs/models.py, such as {file}:{first},{model}"
            )
    return list(dict.fromkeys(names)), model, smoke


def options(task: str) -> dict:
    """What the task's class takes, at its defaults."""
    return {p.name: p.default for p in inspect.signature(registry.TASKS[task]).parameters.values()}


def mesh() -> ConfigDict:
    return ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "expert": 1})


def task(name: str, smoke: bool = False) -> ConfigDict:
    return ConfigDict(
        {
            "name": name,
            "options": options(name),
            "prompt": "chat",
            "method": "auto",
            "max_new_tokens": 16 if smoke else TASKS[name]["max_new_tokens"],
            "label_score": "sum",
        }
    )


def data(smoke: bool = False) -> ConfigDict:
    return ConfigDict(
        {
            "source": "synthetic",
            "path": "",
            "revision": "",
            "streaming": False,
            "stream_limit": 0,
            "version": "",
            "locale": "",
            "seed": 0,
            "train_size": 32 if smoke else 0,
            "validation_size": 8 if smoke else 0,
            "test_size": 16 if smoke else 0,
            "draw": "independent",
            "on_bad_row": "raise",
            "on_overlap": "warn",
            "cache": "",
        }
    )


def mixture(tasks: list[str]) -> ConfigDict:
    return ConfigDict(
        {
            "policy": "concatenate",
            "temperature": 1.0,
            "weights": dict.fromkeys(tasks, 1.0),
            "cap": 0,
            "examples": 0,
        }
    )


def adapter() -> ConfigDict:
    return ConfigDict(
        {
            "rank": 16,
            "alpha": 32.0,
            "dropout": 0.0,
            "rslora": False,
            "dora": False,
            "pissa": False,
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
            "loraplus_ratio": 1.0,
        }
    )


def training(tasks: list[str], smoke: bool = False) -> ConfigDict:
    return ConfigDict(
        {
            "tune": "lora",
            "dropout": 0.0,
            "epochs": 1 if smoke else 3,
            "batch_size": 16,
            "row_length": max(TASKS[task]["row_length"] for task in tasks),
            "rows": 1,
            "packing": "shared_prefix",
            "too_long": "drop",
            "seed": 0,
            "evaluate_every": 0,
            "validation_examples": 8 if smoke else min(TASKS[t]["validation"] for t in tasks),
            "select": "metric",
            "patience": 0,
            "checkpoint_every": 50,
            "keep": 2,
            "most_skipped": 10,
            "spike": 3.0,
        }
    )


def evaluation(tasks: list[str], smoke: bool = False) -> ConfigDict:
    return ConfigDict(
        {
            "split": "test",
            "batch_size": min(TASKS[task]["batch_size"] for task in tasks),
            "too_long": "raise",
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop": (),
            "resamples": 200 if smoke else 2000,
            "seed": 0,
        }
    )


def fewshot(task: str, smoke: bool = False) -> ConfigDict:
    return ConfigDict(
        {
            "shots": (0, 1) if smoke else (0, 1, 3, 8),
            "policy": "fixed",
            "order": "drawn",
            "select_examples": 8 if smoke else TASKS[task]["validation"],
            "seed": 0,
        }
    )
