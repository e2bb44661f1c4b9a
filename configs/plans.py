"""What is planned ahead of time, by `python -m launch.plan`: configs, and the slices for them.

Each is a config like any other: `--config=configs/plans.py:llama2_7b_qlora` trains it.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import common, finetune, icl


class Planned(NamedTuple):
    """A config and where it is to run."""

    kind: str
    """Training ("lora", "qlora"), scoring of labels or decoding."""
    model: str
    topologies: tuple[str, ...]
    mesh: dict[str, int]
    rows: int = 1
    """Of a microbatch on each of the devices that rows are split over; or prompts at once."""
    length: int = 2048
    """Slots of a row; of prompts the part that differs."""
    prefix: int = 0
    """Slots that all prompts open with."""


PLANS = {
    "llama2_7b_lora": Planned("lora", "llama2_7b", ("v5e:2x4",), {"fsdp": 8}),
    "llama2_7b_qlora": Planned("qlora", "llama2_7b", ("v5e:2x4",), {"fsdp": 8}),
    "llama3_1_8b_lora": Planned(
        "lora", "llama3_1_8b", ("v5e:4x4", "v6e:2x4"), {"data": 1, "fsdp": -1}
    ),
    "llama3_3_70b_lora": Planned(
        "lora", "llama3_3_70b", ("v5p:2x2x4", "v5p:2x2x1"), {"data": 1, "fsdp": -1}
    ),
    "mixtral_8x7b_scoring": Planned(
        "scoring", "mixtral_8x7b", ("v5e:4x4",), {"fsdp": 2, "expert": 8}, 64, 512, 1024
    ),
    "mixtral_8x7b_decoding": Planned(
        "decoding", "mixtral_8x7b", ("v5e:4x4",), {"tensor": 2, "expert": 8}, 64, 512, 1024
    ),
    "mixtral_8x22b_scoring": Planned(
        "scoring", "mixtral_8x22b", ("v5p:2x2x2", "v5p:2x2x1"), {"expert": -1}, 32, 512, 1024
    ),
}


def get_config(arg: str = "") -> ConfigDict:
    plan = PLANS[common.choose(arg, PLANS, "configs/plans.py")]
    config: Any
    if plan.kind in ("lora", "qlora"):
        config = finetune.get_config(f"queryner,{plan.model}")
        config.training.rows, config.training.row_length = plan.rows, plan.length
        config.model.remat = "dots"
        config.model.quantization = "nf4" if plan.kind == "qlora" else "none"
    else:
        config = icl.get_config(f"esci,{plan.model}")
        config.evaluation.batch_size = plan.rows
        config.task.method = "generate" if plan.kind == "decoding" else "likelihood"
    config.mesh.update({"data": 1} | plan.mesh)
    return config
