"""Few-shot prompting against one adapter per task: `--config=configs/study.py:quickstart`.

The argument says how much: `smoke` shows that everything works, `quickstart` is a little of
everything with the synthetic shop, `real` an hour with 1,500 training rows a
task of `--config.data.source=local --config.data.path=DIR` and the whole test files there.

The experiments hold the study's own sections `model` and `data`, so that an override such as
`--config.data.source=local` reaches all of them.
"""

from ml_collections import ConfigDict

from configs import common, finetune, icl, models

SIZES = {
    "smoke": {"train": 32, "validation": 8, "test": 16},
    "quickstart": {"train": 192, "validation": 32, "test": 64},
    "real": {"train": 1500, "validation": 0, "test": 0},
}
"""Rows of each split; 0 is all."""

TASKS = ("esci", "queryner")

EPOCHS = {"esci": 2, "queryner": 1}
"""What fits the time; a QueryNER answer teaches at ten times as many tokens."""


def get_config(arg: str = "") -> ConfigDict:
    arg = common.choose(arg, tuple(SIZES), "configs/study.py")
    smoke = arg == "smoke"
    config = ConfigDict()
    config.experiment = "study"
    config.smoke = smoke
    config.model = models.get(models.DEFAULT)
    config.data = common.data(smoke)
    for split, size in SIZES[arg].items():
        config.data[f"{split}_size"] = size
    config.tasks = TASKS
    for name, make in (("finetune", finetune.get_config), ("icl", icl.get_config)):
        sections = {task: make(f"{task},smoke" if smoke else task) for task in TASKS}
        for task, section in sections.items():
            section.model, section.data = config.model, config.data
            if name == "finetune" and not smoke:
                section.update({"training": {"epochs": EPOCHS[task]}})
        config[name] = ConfigDict(sections)
    return config
