"""A real `launch.train` that is killed or asked to end, and started again with the same command."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from ecomjax.experiments.files import read_json, read_jsonl
from ecomjax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STEPS, KILLS = 180, 8


@pytest.fixture(scope="module")
def start(tiny_base, tmp_path_factory):
    """Function workdir -> process of 30 epochs of 6 steps, dropout drawn at each.

    It saves every second step. What it compiles is kept from the first start on.
    """
    flags = {
        "model.path": tiny_base,
        "mesh.data": 1,
        "data.train_size": 24,
        "adapter.dropout": 0.1,
        "training.epochs": 30,
        "training.batch_size": 4,
        "training.evaluate_every": 40,
        "training.checkpoint_every": 2,
    }
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(workdir):
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
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def finish(process, status=0):
    """Waits for the end; returns what it told."""
    _, told = process.communicate(timeout=300)
    assert process.returncode == status, told
    return told


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder))
    return folder


def last_step(workdir):
    """The last step that metrics.jsonl tells of in full."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return len([x for x in lines if x.endswith(b"\n") and b"train/loss" in x])


def wait_for_step(process, workdir, step):
    """Returns when the process has told of a step; it must not end before."""
    deadline = time.monotonic() + 300
    while last_step(workdir) < step and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def arrays(checkpoints, step):
    """path -> bytes of a state, whatever it is of."""
    place = checkpoints.folder / f"{step:08d}" / "state"
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), ocp.metadata(str(place)).metadata
    )
    state, data, _ = checkpoints.restore(step, shapes)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves}, data


def assert_same(run, whole):
    """Adapter, metrics and kept checkpoints, bit by bit: parameters, optimizer, data position."""
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "config.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    steps = [line["step"] for line in read_jsonl(whole / "metrics.jsonl") if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))
    kept = names(whole / "checkpoints")
    assert names(run / "checkpoints") == kept == ["00000178", "00000180", "best"]
    for folder in ("checkpoints", "checkpoints/best"):
        ours, theirs = Checkpoints(run / folder), Checkpoints(whole / folder)
        assert ours.steps() == theirs.steps()
        for step in theirs.steps():
            (found, data), expected = arrays(ours, step), arrays(theirs, step)
            assert (found, data) == expected
            assert len(found) > 10


def test_f01_killed_again_and_again_it_ends_like_a_run_that_was_not(start, whole, tmp_path):
    """At moments drawn from steps and the time they take, of which saves are the larger part."""
    draw, saving, reached = random.Random(0), 0, []
    for _ in range(KILLS):
        process = start(tmp_path)
        wait_for_step(process, tmp_path, last_step(tmp_path) + draw.randint(1, 20))
        time.sleep(draw.uniform(0.0, 0.1))
        process.kill()
        _, told = process.communicate()
        assert process.returncode == -signal.SIGKILL, told
        saving += any(name.startswith(".tmp-") for name in names(tmp_path / "checkpoints"))
        reached.append(last_step(tmp_path))
    assert reached[-1] < STEPS and not (tmp_path / "adapter").exists()
    assert saving >= 2 and len(set(reached)) > KILLS // 2, (saving, reached)
    finish(start(tmp_path))
    assert len(read_json(tmp_path / "run.json")["starts"]) == KILLS + 1
    assert_same(tmp_path, whole)


def test_f03_f52_asked_to_end_it_saves_and_goes_on_like_a_run_that_was_not(start, whole, tmp_path):
    process = start(tmp_path)
    wait_for_step(process, tmp_path, 21)
    process.send_signal(signal.SIGTERM)
    told = finish(process, 75).splitlines()[-1]
    latest = Checkpoints(tmp_path / "checkpoints").latest()
    assert latest >= 21 and latest == last_step(tmp_path)
    assert told == f"preempted at step {latest}; the same command resumes"

    process = start(tmp_path)
    wait_for_step(process, tmp_path, 61)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, told = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in told
    assert (tmp_path / ".lock").read_bytes() == b""
    finish(start(tmp_path))
    assert_same(tmp_path, whole)
