"""One LoRA adapter for one task: `--config=configs/finetune.py:queryner[,MODEL][,smoke]`."""

from ml_collections import ConfigDict

from configs import common, models


def get_config(arg: str = "") -> ConfigDict:
    task, model, smoke = common.parse(arg, "configs/finetune.py")
    config = ConfigDict()
    config.experiment = "finetune"
    config.model = models.get(model)
    config.task = common.task(task)
    config.data = common.data(smoke)
    config.adapter = common.adapter()
    config.optimizer = common.optimizer()
    config.training = common.training(task, smoke)
    config.evaluation = common.evaluation(task, smoke)
    return config
