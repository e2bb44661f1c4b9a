"""Systems against each other: all runs of a study, their tables, report.md and report.html.

python -m launch.study --config=configs/study.py:quickstart --workdir=runs/quickstart

Several processes with the same flags, on one host or on several that share the folder, share the
runs. With --dry_run they are only listed, with the time that they may take. If runs fail, the
others are run and reported all the same, and the exit status is 2.
"""

from absl import flags

from launch.command import main

DRY_RUN = flags.DEFINE_bool("dry_run", False, "List the runs and their times; start nothing.")


def compare(config, workdir):
    from ecomjax.experiments import study

    (study.dry_run if DRY_RUN.value else study.run)(config, workdir)


if __name__ == "__main__":
    main(compare, ["study"])
