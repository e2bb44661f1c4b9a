"""Merges adapters: into one in PEFT layout, or into their base as a Hugging Face folder.

python -m launch.merge --config=configs/merged.py --workdir=runs/merged \\
    --config.adapters="('runs/esci','runs/queryner')" --config.method=ties
"""

from launch.command import main


def merge(config, workdir):
    from ecomjax.experiments import merged

    merged.run(config, workdir)


if __name__ == "__main__":
    main(merge, ["merged"])
