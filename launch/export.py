"""Writes an adapter for other programs: fused into its base for transformers and vLLM, or alone.

python -m launch.export --config=configs/export.py --workdir=exports/queryner \\
    --config.adapter=runs/queryner
python -m launch.export --config=configs/export.py --workdir=exports/queryner-adapter \\
    --config.adapter=runs/queryner --config.output=adapter --config.vllm=True
"""

from launch.command import main


def export(config, workdir):
    from ecomjax.experiments import export

    export.run(config, workdir)


if __name__ == "__main__":
    main(export, ["export"])
