"""Trains one LoRA adapter: a config of finetune in, a run folder out.

python -m launch.train --config=configs/finetune.py:queryner --workdir=runs/queryner
"""

from absl import flags

from launch.command import main

ALLOW = flags.DEFINE_list(
    "allow_config_change",
    [],
    "Keys of the config, such as training.keep, that may change where a run is resumed.",
)


def train(config, workdir):
    from ecomjax.experiments import finetune

    finetune.run(config, workdir, ALLOW.value)


if __name__ == "__main__":
    main(train, ["finetune"])
