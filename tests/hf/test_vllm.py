import json

import pytest

from ecomjax.hf.peft_config import CONFIG
from ecomjax.hf.vllm import refusals

SOUND = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"r": 16, "use_rslora": True, "bias": "none", "modules_to_save": None}, []),
        ({"use_dora": True}, ["DoRA is not supported"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save is not supported"]),
        ({"bias": "all"}, ["bias 'all' is not supported"]),
        ({"r": 17}, ["rank 17 is above max_lora_rank 16"]),
        ({"alpha_pattern": {"k_proj": 4}}, ["rank_pattern and alpha_pattern are not read"]),
        (
            {"rank_pattern": {"k_proj": 32}, "use_dora": True},
            [
                "DoRA is not supported",
                "rank 32 is above max_lora_rank 16",
                "rank_pattern and alpha_pattern are not read",
            ],
        ),
        (
            {"target_parameters": ["mlp.experts.gate_up_proj"]},
            ["target_parameters, such as experts, are not read"],
        ),
    ],
)
def test_every_reason_is_named(tmp_path, changes, told):
    (tmp_path / CONFIG).write_text(json.dumps(SOUND | changes))
    assert refusals(tmp_path, 16) == told
