"""A real `launch.train` killed with signal 9, and started again with the same command."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ecomjax.experiments.files import read_json, read_jsonl

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STEPS = 180


def start(base, workdir):
    """30 epochs of 6 steps, dropout drawn at each; the terminal is left out."""
    flags = {
        "model.path": base,
        "data.train_size": 24,
        "adapter.dropout": 0.1,
        "training.epochs": 30,
        "training.batch_size": 4,
        "training.evaluate_every": 40,
        "training.checkpoint_every": 7,
    }
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "launch.train",
            "--config=configs/finetune.py:esci,smoke",
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in flags.items()),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told


def last_step(workdir):
    """The last step that metrics.jsonl tells of in full."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return len([line for line in whole if b"train/loss" in line]) if whole else 0


def saved(workdir):
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return [name for name in names if name.isdigit()]


def writing(workdir):
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return any(name.startswith(".tmp-") for name in names)


MOMENTS = [
    ("before the first checkpoint", lambda w: last_step(w) >= 1),
    ("between two checkpoints", lambda w: last_step(w) > 15),
    ("while a checkpoint is written", lambda w: last_step(w) > 50 and writing(w)),
    ("after a checkpoint", lambda w: last_step(w) > 100 and "00000105" in saved(w)),
]


def test_killed_four_times_it_ends_like_a_run_that_was_not(tiny_base, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(tiny_base, whole))
    for what, moment in MOMENTS:
        process = start(tiny_base, killed)
        deadline = time.monotonic() + 300
        while process.poll() is None and not moment(killed) and time.monotonic() < deadline:
            time.sleep(0.0005)
        process.kill()
        _, told = process.communicate()
        assert process.returncode == -9, (what, told)
    assert last_step(killed) < STEPS and not (killed / "adapter").exists()
    finish(start(tiny_base, killed))

    run = read_json(killed / "run.json")
    assert len(run["starts"]) == len(MOMENTS) + 1
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "config.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    steps = [line["step"] for line in read_jsonl(whole / "metrics.jsonl") if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))
    kept = sorted(saved(whole))
    assert sorted(saved(killed)) == kept and kept[-1] == f"{STEPS:08d}"
    for step in kept:
        for path in (whole / "checkpoints" / step).glob("data.json"):
            twin = killed / "checkpoints" / step / path.name
            assert twin.read_bytes() == path.read_bytes()
