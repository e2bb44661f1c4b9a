"""Scores a trained adapter (a config of finetune), few-shot prompting (a config of icl), or any
adapters and the model without one (a config of score).

python -m launch.evaluate --config=configs/finetune.py:queryner --workdir=runs/queryner
python -m launch.evaluate --config=configs/icl.py:queryner --workdir=runs/queryner_fewshot
python -m launch.evaluate --config=configs/score.py:esci+queryner --workdir=runs/scores \\
    --config.adapters="('runs/esci','runs/queryner','runs/merged')"
"""

from launch.command import main


def score(config, workdir):
    from ecomjax.experiments import evaluate

    evaluate.run(config, workdir)


if __name__ == "__main__":
    main(score, ["finetune", "icl", "score"])
