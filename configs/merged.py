"""Several adapters merged into one, or into their base: `--config=configs/merged.py[:MODEL]`.

Tasks, as in `configs/merged.py:esci+queryner[,MODEL]`, are those whose validation examples
`--config.search.kind` finds weights on.
"""

from ml_collections import ConfigDict

from configs import common, models


def get_config(arg: str = "") -> ConfigDict:
    file = "configs/merged.py"
    tasks, model, smoke = [], models.DEFAULT, False
    if arg.split("+")[0].split(",")[0] in common.TASKS:
        tasks, model, smoke = common.parse(arg, file)
    elif arg:
        model = common.choose(arg, models.PRESETS, file)
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
    config.search = ConfigDict(
        {
            "kind": "none",
            "by_layer": False,
            "budget": 60,
            "penalty": 0.05,
            "bound": 1.5,
            "examples": 64,
            "row_length": 512,
        }
    )
    config.tasks = ConfigDict({task: common.task(task, smoke) for task in tasks})
    config.data = common.data(smoke)
    config.seed = 0
    config.output = "adapter"
    config.similarity = True
    config.any_base = False
    return config
