"""Few-shot prompting against one adapter per task: `--config=configs/study.py:quickstart`.

The experiments hold the study's own sections `model` and `data`, so that an override such as
`--config.data.source=local` reaches all of them.
"""

from ml_collections import ConfigDict

from configs import common, finetune, icl, models


def get_config(arg: str = "") -> ConfigDict:
    arg = common.choose(arg, ("quickstart", "smoke"), "configs/study.py")
    smoke = arg == "smoke"
    config = ConfigDict()
    config.experiment = "study"
    config.smoke = smoke
    config.model = models.get("smollm2_135m")
    config.data = common.data(smoke)
    config.tasks = tuple(common.TASKS)
    for name, make in (("finetune", finetune.get_config), ("icl", icl.get_config)):
        sections = {task: make(f"{task},smoke" if smoke else task) for task in common.TASKS}
        for section in sections.values():
            section.model, section.data = config.model, config.data
        config[name] = ConfigDict(sections)
    return config
