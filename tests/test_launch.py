"""The commands as users meet them: status and messages, without running an experiment."""

import contextlib
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FINETUNE = "--config=configs/finetune.py:esci"
MERGED = "--config=configs/merged.py"


def call(main, *arguments, status):
    """Runs a command; returns its stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{main}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("main", ["train", "evaluate", "merge", "study", "recipe"])
def test_help_shows_the_flags(main):
    out, _ = call(main, "--help", status=0)
    assert f"python -m launch.{main}" in out
    assert "--config" in out and "--workdir" in out


@pytest.mark.parametrize("main", ["train", "evaluate", "merge", "study", "plan", "recipe"])
def test_help_is_fast_because_jax_is_not_imported(main):
    code = (
        f"import sys, launch.{main}; print(sorted({{'jax', 'flax', 'orbax'}} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("main", "arguments", "told"),
    [
        ("train", [], "--config"),
        ("train", [FINETUNE], "--workdir"),
        ("train", [FINETUNE, "--workdir=w", "--wrkdir=x"], "wrkdir"),
        ("train", [FINETUNE, "--workdir=w", "stray"], "stray"),
        ("train", [FINETUNE, "--workdir"], "--workdir"),
        ("train", ["--config=configs/none.py", "--workdir=w"], "configs/none.py"),
        ("train", ["--config=configs/none.py", "--workdir=w", "--config.a=1"], "configs/none.py"),
        (
            "train",
            ["--config=configs/finetune.py:x", "--workdir=w"],
            "configs/finetune.py:queryner",
        ),
        ("train", ["--config=configs/finetune.py", "--workdir=w"], "configs/finetune.py:queryner"),
        ("train", ["--config=configs/icl.py:esci", "--workdir=w"], "configs/finetune.py"),
        (
            "train",
            [FINETUNE, "--workdir=w", "--config.optimizer.learning_rte=1"],
            "config.optimizer.learning_rte; did you mean config.optimizer.learning_rate?",
        ),
        ("train", [FINETUNE, "--workdir=w", "--config.optimiser.beta1=0.5"], '"optimizer"'),
        ("train", [FINETUNE, "--workdir=w", "--config.adapter.rank=0"], "config.adapter.rank"),
        ("train", [FINETUNE, "--workdir=w", "--config.adapter.rank=big"], "config.adapter.rank"),
        ("train", [FINETUNE, "--workdir=w", "--config.adapter.rank.x=1"], "adapter.rank.x"),
        ("study", [FINETUNE, "--workdir=w"], "configs/study.py"),
        ("recipe", ["--config=configs/icl.py:esci", "--workdir=w"], "configs/finetune.py"),
        ("recipe", [FINETUNE, "--workdir=w", "--seeds=0,x"], "bad seeds '0,x': --seeds"),
        ("merge", [FINETUNE, "--workdir=w"], "configs/merged.py"),
        ("merge", ["--config=configs/merged.py:x", "--workdir=w"], "configs/merged.py:llama2_7b"),
        ("merge", [MERGED, "--workdir=w"], "no adapters: config.adapters"),
        (
            "merge",
            [MERGED, "--workdir=w", "--config.adapters=('no/such','b')"],
            "no such folder: no/such",
        ),
        (
            "merge",
            [MERGED, "--workdir=w", "--config.options.density=0.0"],
            "config.options.density",
        ),
        ("merge", [MERGED, "--workdir=w", "--config.weights=('a','b')"], "config.weights[0]"),
        (
            "merge",
            [MERGED, "--workdir=w", "--config.weights_by_layer=((1,2),('x',))"],
            "config.weights_by_layer[1][0]",
        ),
        ("study", ["--config=configs/study.py:all", "--workdir=w"], "configs/study.py:quickstart"),
        (
            "evaluate",
            ["--config=configs/icl.py:esci", "--workdir=w", "--config.fewshot.shots=(0,-1)"],
            "config.fewshot.shots[1]",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(main, arguments, told):
    out, err = call(main, *arguments, status=2)
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert told in err


@pytest.mark.parametrize(
    "value",
    ["!!python/object/apply:os.mkdir ['{}']", "(__import__('os').mkdir('{}'),)", "(" * 5000],
    ids=["yaml", "python", "nested"],
)
def test_f49_an_override_is_a_value_and_no_program(tmp_path, value):
    made = tmp_path / "made"
    flags = [f"--workdir={tmp_path / 'w'}", f"--config.weights={value.format(made)}"]
    _, err = call("merge", MERGED, *flags, status=2)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "config.weights" in err and not made.exists()


def command(body):
    """The shared main with a stand-in for the experiment."""
    code = (
        "import os, signal, time\n"
        "from pathlib import Path\n"
        "from ecomjax.errors import UserError\n"
        "from ecomjax.preemption import Preempted\n"
        "from launch.command import main\n"
        f"def run(config, workdir):\n{textwrap.indent(body, '    ')}\n"
        "main(run, ['finetune'])"
    )
    return [sys.executable, "-c", code, FINETUNE]


def call_with(body, *arguments, status):
    done = subprocess.run(
        [*command(body), "--workdir=w", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


def test_the_experiment_gets_the_typed_config_and_the_folder():
    out, _ = call_with(
        "print(config.adapter.rank, config.model.remat, workdir)",
        "--config.adapter.rank=4",
        "--config.model.remat=full",
        status=0,
    )
    assert out == "4 full w\n"


def test_a_mistake_found_later_is_one_line_too():
    _, err = call_with("raise UserError('no such folder', 'x', 'make it')", status=2)
    assert err == "error: no such folder: x; make it\n"


def test_an_interrupt_is_one_line():
    _, err = call_with("raise KeyboardInterrupt", status=130)
    assert err == "interrupted; the same command resumes\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_f03_preempted_outside_of_training_is_status_75_in_one_line(name):
    _, err = call_with(f"os.kill(os.getpid(), signal.{name}); time.sleep(60)", status=75)
    assert err == "preempted; the same command resumes\n"


def test_f03_preempted_in_training_is_status_75_with_the_step():
    _, err = call_with("raise Preempted(40)", status=75)
    assert err == "preempted at step 40; the same command resumes\n"


WAITING = """
from ecomjax.experiments.workdir import Workdir
with Workdir(workdir).writing(config) as folder:
    (folder.path / "work").touch()
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        Path(workdir, "waits").touch()
        time.sleep(SECONDS)
"""
"""Holds a folder, and takes its time to end."""


@contextlib.contextmanager
def started(body, workdir):
    """The process of a command, its three streams pipes of bytes."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    arguments: Any = [*command(body), f"--workdir={workdir}"]
    with subprocess.Popen(arguments, cwd=ROOT, **pipes) as process:
        yield process


@contextlib.contextmanager
def waiting(workdir, seconds):
    with started(WAITING.replace("SECONDS", str(seconds)), workdir) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process
    assert (workdir / ".lock").read_bytes() == b""


@pytest.mark.parametrize("interrupts", [1, 2])
def test_f52_interrupted_once_or_twice_the_folder_is_given_back(tmp_path, interrupts):
    with waiting(tmp_path, 0.5 if interrupts == 1 else 60) as process:
        process.send_signal(signal.SIGINT)
        if interrupts == 2:
            while not (tmp_path / "waits").exists():
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"interrupted; the same command resumes\n")


def test_f52_the_folder_is_given_back_when_the_terminal_closes(tmp_path):
    with waiting(tmp_path, 0) as process:
        process.stderr.close()
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=30) == 75


UNREAD = [("stdout", True), ("stdout", False), ("stderr", True)]


@pytest.mark.parametrize(("stream", "flush"), UNREAD)
def test_f52_output_that_nobody_reads_ends_cleanly(tmp_path, stream, flush):
    """As that of `| head`; what is still in a buffer may not fail at exit either."""
    body = f"import sys\nsys.stdin.read()\nprint('x', file=sys.{stream}, flush={flush})"
    with started(body, tmp_path) as process:
        getattr(process, stream).close()
        process.stdin.close()
        assert process.wait(timeout=30) == 141
        if stream == "stdout":
            told = b"nobody reads the output any more; the same command resumes\n"
            assert process.stderr.read() == told


def test_a_defect_keeps_its_traceback():
    _, err = call_with("{}['key']", status=1)
    assert "Traceback" in err and "KeyError: 'key'" in err


def test_benchmark_shows_what_it_takes():
    out, _ = call("benchmark", "--help", status=0)
    for told in ("python -m launch.benchmark packing", "benchmark merge_7b", "--json"):
        assert told in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no benchmark named"),
        (["speed"], "unknown benchmark 'speed': launch.benchmark; known: packing, train"),
        (["merge_7b", "--methods=linear,tiez"], "unknown method 'tiez': --methods; known: linear"),
        (["packing", "--jsn"], "jsn"),
        (["packing", "--data=no/such"], "no such folder"),
    ],
)
def test_benchmark_tells_mistakes_in_one_line(arguments, told):
    _, err = call("benchmark", *arguments, status=2)
    *_, last = err.splitlines()
    assert last.startswith("error: ") and told in last


def test_plan_shows_what_it_takes_and_how_it_counts():
    out, _ = call("plan", "--help", status=0)
    for told in ("python -m launch.plan --all", "--topology", "--json", "--slots", "trip count"):
        assert told in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing to plan"),
        (["llama2_7b"], "unknown plan 'llama2_7b': configs/plans.py; choose of llama2_7b_lora,"),
        ([FINETUNE], "give it a --topology"),
        ([FINETUNE, "--topology=cuda", "--all"], "a config is planned alone"),
        ([MERGED, "--topology=cuda"], "this command wants a config of finetune or icl"),
        (["--config=configs/plans.py:x", "--topology=cuda"], "configs/plans.py:llama2_7b_lora"),
        ([FINETUNE, "--topology=cuda"], "no CUDA device here"),
        (["--al"], "al"),
    ],
)
def test_plan_tells_mistakes_in_one_line(arguments, told):
    out, err = call("plan", *arguments, status=2)
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert told in err
