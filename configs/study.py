"""Few-shot prompting against one adapter per task: `--config=configs/study.py:quickstart`.

The experiments hold the study's own sections `model` and `data`, so an override of
`--config.model.path` or `--config.data.source` reaches all of them.
"""

from ml_collections import ConfigDict

from configs import common, finetune, icl


def get_config(arg: str = "") -> ConfigDict:
    arg = common.choose(arg, ("quickstart", "smoke"), "configs/study.py")
    option = ",smoke" if arg == "smoke" else ""
    config = ConfigDict()
    config.experiment = "study"
    config.smoke = arg == "smoke"
    config.tasks = tuple(common.TASKS)
    config.finetune = ConfigDict({t: finetune.get_config(t + option) for t in config.tasks})
    config.icl = ConfigDict({t: icl.get_config(t + option) for t in config.tasks})
    first = config.finetune[config.tasks[0]]
    config.model, config.data = first.model, first.data
    for section in (*config.finetune.values(), *config.icl.values()):
        section.model, section.data = config.model, config.data
    return config
