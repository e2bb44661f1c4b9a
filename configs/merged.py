"""Several adapters merged into one, or into their base: `--config=configs/merged.py[:MODEL]`."""

from ml_collections import ConfigDict

from configs import common, models


def get_config(arg: str = "") -> ConfigDict:
    model = common.choose(arg or models.DEFAULT, models.PRESETS, "configs/merged.py")
    config = ConfigDict()
    config.experiment = "merged"
    config.model = models.get(model)
    config.adapters = ()
    config.method = "linear"
    config.weights = ()
    config.weights_by_layer = ()
    config.options = ConfigDict(
        {
            "rank": 0,
            "density": 0.5,
            "gamma": 0.01,
            "epsilon": 0.1,
            "rescale": "expectation",
            "elect": "weighted",
            "votes": "total",
            "normalise": "method",
        }
    )
    config.seed = 0
    config.output = "adapter"
    config.any_base = False
    return config
