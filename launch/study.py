"""Few-shot prompting against one adapter per task: all runs, their table and report.md.

python -m launch.study --config=configs/study.py:quickstart --workdir=runs/quickstart
"""

from launch.command import main


def compare(config, workdir):
    from ecomjax.experiments import study

    study.run(config, workdir)


if __name__ == "__main__":
    main(compare, ["study"])
