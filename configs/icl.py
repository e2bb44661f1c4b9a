"""Few-shot prompting of the untuned model: `--config=configs/icl.py:esci[,smoke]`."""

from ml_collections import ConfigDict

from configs import common, models


def get_config(arg: str = "") -> ConfigDict:
    task, smoke = common.parse_task(arg, "configs/icl.py")
    config = ConfigDict()
    config.experiment = "icl"
    config.model = models.get("smollm2_135m")
    config.task = common.task(task)
    config.data = common.data(smoke)
    config.fewshot = common.fewshot(task, smoke)
    config.evaluation = common.evaluation(task, smoke)
    return config
