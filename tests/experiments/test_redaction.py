import pytest

from ecomjax.experiments.redaction import redacted

ENVIRONMENT = {
    "HF_TOKEN": "hf-of-the-environment",
    "WANDB_API_KEY": "0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": "wJalr/XUtnFEMI+bPx",
    "PASSWORD": "short",
    "HOME": "/home/someone",
}


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("--workdir=/home/someone/short", "--workdir=/home/someone/short"),
        ("--config.adapter.targets=('.*/k/kernel',)", "--config.adapter.targets=('.*/k/kernel',)"),
        (
            "--config.model.path=/models/hf-of-the-environment/x",
            "--config.model.path=/models/[hidden]/x",
        ),
        ("wJalr/XUtnFEMI+bPx", "[hidden]"),
        ("--wandb_api_key=anything at all", "--wandb_api_key=[hidden]"),
        ("--config.tracker.Token=abc", "--config.tracker.Token=[hidden]"),
        ("https://me:pass@host/x?token=abc&y=1", "https://[hidden]@host/x?token=[hidden]&y=1"),
        ("s3://host/x", "s3://host/x"),
        ("--note=hf_abcdefghijklmnopqrst!", "--note=[hidden]!"),
        ("--config.training.max_new_tokens=64", "--config.training.max_new_tokens=64"),
    ],
)
def test_f50_no_secret_of_a_command_is_kept(argument, kept):
    assert redacted([argument], ENVIRONMENT) == [kept]
