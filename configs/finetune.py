"""One LoRA adapter for one task, or for a mixture of several:
`--config=configs/finetune.py:queryner[,MODEL][,smoke]`, or `:esci+queryner` for two.
"""

from ml_collections import ConfigDict

from configs import common, models


def get_config(arg: str = "") -> ConfigDict:
    tasks, model, smoke = common.parse(arg, "configs/finetune.py")
    config = ConfigDict()
    config.experiment = "finetune"
    config.model = models.get(model)
    config.tasks = ConfigDict({task: common.task(task, smoke) for task in tasks})
    config.data = common.data(smoke)
    config.mixture = common.mixture(tasks)
    config.adapter = common.adapter()
    config.optimizer = common.optimizer()
    config.training = common.training(tasks, smoke)
    config.evaluation = common.evaluation(tasks, smoke)
    config.mesh = common.mesh()
    return config
