"""Few-shot prompting of the untuned model: `--config=configs/icl.py:esci[,MODEL][,smoke]`."""

from ml_collections import ConfigDict

from configs import common, models


def get_config(arg: str = "") -> ConfigDict:
    task, model, smoke = common.parse(arg, "configs/icl.py")
    config = ConfigDict()
    config.experiment = "icl"
    config.model = models.get(model)
    config.task = common.task(task)
    config.data = common.data(smoke)
    config.fewshot = common.fewshot(task, smoke)
    config.evaluation = common.evaluation(task, smoke)
    return config
