"""Trains one LoRA adapter: a config of finetune in, a run folder out.

python -m launch.train --config=configs/finetune.py:queryner --workdir=runs/queryner
"""

from launch.command import main


def train(config, workdir):
    from ecomjax.experiments import finetune

    finetune.run(config, workdir)


if __name__ == "__main__":
    main(train, ["finetune"])
