"""The commands as users meet them: status and messages, without running an experiment."""

import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("main", ["train", "evaluate", "merge", "study"])
def test_help_shows_the_flags(main):
    out, _ = call(main, "--help", status=0)
    assert f"python -m launch.{main}" in out
    assert "--config" in out and "--workdir" in out


@pytest.mark.parametrize("main", ["train", "evaluate", "merge", "study"])
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


def call_with(body, *arguments, status):
    """Runs the shared main with a stand-in for the experiment."""
    code = (
        "from ecomjax.errors import UserError\n"
        "from launch.command import main\n"
        f"def run(config, workdir):\n    {body}\n"
        "main(run, ['finetune'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, FINETUNE, "--workdir=w", *arguments],
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
        (["speed"], "unknown benchmark 'speed': launch.benchmark; known: packing, merge, merge_7b"),
        (["merge_7b", "--methods=linear,tiez"], "unknown method 'tiez': --methods; known: linear"),
        (["packing", "--jsn"], "jsn"),
        (["packing", "--data=no/such"], "no such folder"),
    ],
)
def test_benchmark_tells_mistakes_in_one_line(arguments, told):
    _, err = call("benchmark", *arguments, status=2)
    *_, last = err.splitlines()
    assert last.startswith("error: ") and told in last
