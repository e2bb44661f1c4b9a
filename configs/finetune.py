"""One LoRA adapter for one task, or for a mixture of several:
`--config=configs/finetune.py:queryner[,MODEL][,smoke]`, or `:esci+queryner` for two.

Encoders, such as `:queryner,minilm_l6`, are trained in full, with a head for their one task;
encoder-decoders, such as `:esci,t5_small`, in full unless they are of a size for bfloat16.
"""

from typing import Any

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
    if model in models.ENCODERS:
        _as_encoder(config, tasks, smoke)
    if model in models.ENCODER_DECODERS:
        _as_encoder_decoder(config)
    return config


def _as_encoder(config: Any, tasks: list[str], smoke: bool) -> None:
    """What fine-tuning in full, with a new head, usually takes."""
    config.optimizer.learning_rate = 2e-4
    config.training.update(
        {
            "tune": "all",
            "dropout": 0.1,
            "epochs": 1 if smoke else 4,
            "batch_size": 32,
            "row_length": max(common.ENCODER_ROWS.get(task, 512) for task in tasks),
            "rows": 2,
            "packing": "plain",
            "too_long": "truncate",
        }
    )
    config.evaluation.update({"batch_size": 64, "too_long": "truncate"})


def _as_encoder_decoder(config: Any) -> None:
    """What teacher forcing of pairs side by side takes."""
    whole = config.model.param_dtype == "float32"
    config.optimizer.learning_rate = 3e-4 if whole else 1e-3
    config.training.update(
        {"tune": "all" if whole else "lora", "packing": "plain", "too_long": "truncate"}
    )
    config.evaluation.too_long = "truncate"
