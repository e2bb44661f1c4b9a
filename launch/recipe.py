"""The same recipe by ecomjax and by the Trainer of transformers (with PEFT): scores by seed.

python -m launch.recipe --config=configs/finetune.py:queryner,minilm_l6 --workdir=runs/recipe \\
    --config.data.source=local --config.data.path=../shared/data
python -m launch.recipe --config=configs/finetune.py:esci --workdir=runs/recipe \\
    --config.data.source=local --config.data.path=../shared/data --config.training.epochs=2

Both train an encoder in full for classes of words, or LoRA of every linear layer of a decoder;
both are taken at their last step, and scored by us. What is scored stays scored.
"""

from absl import flags

from launch.command import main

SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Of both sides, in place of training.seed.")


def compare(config, workdir):
    from ecomjax.experiments.benchmarks import recipe

    recipe.run(config, workdir, SEEDS.value)


if __name__ == "__main__":
    main(compare, ["finetune"])
