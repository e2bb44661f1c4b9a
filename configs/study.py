"""Systems against each other on the same tasks and data: `--config=configs/study.py:quickstart`.

The argument says how much: `smoke` shows that everything works, `quickstart` is a little of
everything with the synthetic shop, `real` takes hours with 1,500 training rows a
task of `--config.data.source=local --config.data.path=DIR` and the whole test files there.
`own` is for rows of instruction, input and output of your own, all of those in
DIR/instruction/{train,validation,test}.jsonl of `--config.data.path=DIR`.

The experiments hold the study's own sections `model` and `data`, so that an override such as
`--config.data.source=local` reaches all of them.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common, finetune, icl, models

SIZES = {
    "smoke": {"train": 8, "validation": 2, "test": 4},
    "quickstart": {"train": 64, "validation": 8, "test": 60},
    "real": {"train": 1500, "validation": 0, "test": 0},
    "own": {"train": 0, "validation": 0, "test": 0},
}
"""Rows of each split; 0 is all."""

TASKS = {
    "smoke": ("esci", "queryner", "review_summarization", "description_generation"),
    "quickstart": ("esci", "queryner", "review_summarization", "description_generation"),
    "real": ("esci", "queryner", "review_summarization"),
    "own": ("instruction",),
}

EPOCHS = {
    **{"esci": 2, "queryner": 1, "review_summarization": 1, "description_generation": 1},
    "instruction": 2,
}
"""What fits the time; an answer to ESCI teaches at the fewest tokens."""

CONVENTIONAL = {"esci": "minilm_l6", "queryner": "minilm_l6"}
"""An encoder for each task that has classes."""

GRIDS = {
    "smoke": {"merge_methods": ("linear",)},
    "quickstart": {"merge_methods": ("linear", "ties")},
    "real": {
        "learning_rates": (5e-4, 1e-3),
        "conventional_learning_rates": (1e-4, 2e-4),
        "merge_methods": ("linear", "ties"),
    },
    "own": {"learning_rates": (5e-4, 1e-3)},
}

SHOTS = {"smoke": (0, 1), "quickstart": (0, 1), "real": (0, 1, 3, 8), "own": (0, 1, 3, 8)}


def get_config(arg: str = "") -> ConfigDict:
    arg = common.choose(arg, tuple(SIZES), "configs/study.py")
    smoke, tasks = arg == "smoke", TASKS[arg]
    option = ",smoke" if smoke else ""
    config = ConfigDict()
    config.experiment = "study"
    config.smoke = smoke
    config.model = models.get(models.DEFAULT)
    config.data = common.data(smoke)
    if arg == "own":
        config.data.source, config.data.path = "local", "data"
    for split, size in SIZES[arg].items():
        config.data[f"{split}_size"] = size
    config.tasks = tasks
    # Mixtures and merges are of several tasks.
    several = ("mixed", "merged") if len(tasks) > 1 else ()
    config.systems = ("few_shot", "lora", *several)
    config.grid = ConfigDict(
        {
            "train_sizes": (),
            "seeds": (0,),
            "learning_rates": (),
            "conventional_learning_rates": (),
            "epochs": (),
            "mixtures": ("concatenate",),
            "merge_methods": (),
            "merge_pairs": False,
            "together": 1,
        }
        | GRIDS[arg]
    )
    # Their sections are known by name alone.
    mixed: Any
    tuned: dict[str, Any] = {task: finetune.get_config(task + option) for task in tasks}
    asked: dict[str, Any] = {task: icl.get_config(task + option) for task in tasks}
    mixed = finetune.get_config("+".join(tasks) + option)
    encoders: dict[str, Any] = {
        task: finetune.get_config(f"{task},{CONVENTIONAL[task]}{option}")
        for task in tasks
        if task in CONVENTIONAL
    }
    for section in (*tuned.values(), *asked.values(), mixed):
        section.model, section.data = config.model, config.data
    for section in encoders.values():
        section.data = config.data
    for task in tasks:
        asked[task].update({"fewshot": {"shots": SHOTS[arg]}})
        # However a task is asked, it is one task.
        options = tuned[task].tasks[task].options
        asked[task].task.options = mixed.tasks[task].options = options
        if task in encoders:
            encoders[task].tasks[task].options = options
    if not smoke:
        mixed.update({"training": {"epochs": 1}})
        for task in tasks:
            tuned[task].update({"training": {"epochs": EPOCHS[task]}})
    config.finetune, config.icl = ConfigDict(tuned), ConfigDict(asked)
    config.mixed, config.conventional = mixed, ConfigDict(encoders)
    return config
