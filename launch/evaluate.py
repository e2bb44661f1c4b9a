"""Scores a trained adapter (a config of finetune) or few-shot prompting (a config of icl).

python -m launch.evaluate --config=configs/finetune.py:queryner --workdir=runs/queryner
python -m launch.evaluate --config=configs/icl.py:queryner --workdir=runs/queryner_fewshot
"""

from launch.command import main


def score(config, workdir):
    from ecomjax.experiments import evaluate

    evaluate.run(config, workdir)


if __name__ == "__main__":
    main(score, ["finetune", "icl"])
