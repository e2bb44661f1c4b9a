"""Adapters and their untuned model: `--config=configs/score.py:esci+queryner[,MODEL][,smoke]`."""

from ml_collections import ConfigDict

from configs import common, models


def get_config(arg: str = "") -> ConfigDict:
    tasks, model, smoke = common.parse(arg, "configs/score.py")
    config = ConfigDict()
    config.experiment = "score"
    config.model = models.get(model)
    config.adapters = ()
    config.base = True
    config.any_base = False
    config.tasks = ConfigDict({task: common.task(task, smoke) for task in tasks})
    config.data = common.data(smoke)
    config.evaluation = common.evaluation(tasks, smoke)
    config.mesh = common.mesh()
    return config
