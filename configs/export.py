"""An adapter written for other programs: `--config=configs/export.py[:MODEL]`."""

from ml_collections import ConfigDict

from configs import common, models


def get_config(arg: str = "") -> ConfigDict:
    name = common.choose(arg, models.PRESETS, "configs/export.py") if arg else models.DEFAULT
    config = ConfigDict()
    config.experiment = "export"
    config.model = models.get(name)
    config.adapter = ""
    config.output = "model"
    config.vllm = False
    config.vllm_rank = 16
    config.any_base = False
    return config
