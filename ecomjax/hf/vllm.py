"""What vLLM would refuse of an adapter in PEFT layout, or read otherwise than PEFT does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ecomjax.hf.files import read_json
from ecomjax.hf.peft_config import CONFIG


def refusals(folder: Path, most_rank: int) -> list[str]:
    """Why vLLM cannot serve an adapter as it is; empty if nothing is known against it.

    Checked is what the files say; whether the model itself is one that vLLM serves adapters of,
    and whether it knows the names of the targets, is not.

    By its `PEFTHelper` (vllm/lora/peft_helper.py), which refuses DoRA, `modules_to_save`, biases
    and ranks beyond its limit, and passes over the fields that it does not know: patterns of ranks
    and alphas, of which all kernels would be scaled alike, and target parameters.

    Args:
        folder: of the adapter.
        most_rank: vLLM's `max_lora_rank`, 16 unless it is told otherwise.
    """
    fields = read_json(folder / CONFIG)
    ranks, alphas = (fields.get(f"{name}_pattern") or {} for name in ("rank", "alpha"))
    rank, bias = max([fields["r"], *ranks.values()]), fields.get("bias", "none")
    known: dict[str, Any] = {
        "DoRA is not supported": fields.get("use_dora"),
        "modules_to_save is not supported": fields.get("modules_to_save"),
        f"bias {bias!r} is not supported": bias != "none",
        f"rank {rank} is above max_lora_rank {most_rank}": rank > most_rank,
        "rank_pattern and alpha_pattern are not read": ranks or alphas,
        "target_parameters, such as experts, are not read": fields.get("target_parameters"),
    }
    return [reason for reason, holds in known.items() if holds]
