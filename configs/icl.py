"""Few-shot prompting of the untuned model: `--config=configs/icl.py:esci[,MODEL][,smoke]`."""

from ml_collections import ConfigDict

from configs import common, models


def get_config(arg: str = "") -> ConfigDict:
    (task, *more), model, smoke = common.parse(arg, "configs/icl.py")
    if more:
        raise ValueError(f"one task at a time, such as configs/icl.py:{task}")
    config = ConfigDict()
    config.experiment = "icl"
    config.model = models.get(model)
    config.task = common.task(task, smoke)
    config.data = common.data(smoke)
    config.fewshot = common.fewshot(task, smoke)
    config.evaluation = common.evaluation([task], smoke)
    config.mesh = common.mesh()
    return config
